"""Starts the real program for a browser to look at, and ends it the way a person would, with Ctrl+C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 120


class Studio:
    def __init__(self, url: str) -> None:
        self.url = url

    def status(self) -> dict:
        with urlopen(f"{self.url}/ui/status", timeout=30) as response:
            return json.load(response)

    def wait_until(self, is_so, what: str) -> None:
        """Ask for the status until `is_so` holds; the limit is for a hang, not for speed."""
        deadline = time.monotonic() + START_LIMIT_S
        while not is_so(self.status()):
            assert time.monotonic() < deadline, f"{what}: {self.status()}"
            time.sleep(0.05)


@contextmanager
def running_studio(*arguments: str) -> Iterator[Studio]:
    command = [
        sys.executable,
        "app.py",
        "--server-port",
        "0",
        "--device",
        "cpu",
        *arguments,
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"NO_PROXY": "*"}
    )
    try:
        address = process.stdout.readline()
        assert address.startswith("LMDeck: http"), f"the program said {address!r}"
        studio = Studio(address.split()[1])
        studio.wait_until(lambda status: "name" in status, "the model does not load")
        yield studio
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
