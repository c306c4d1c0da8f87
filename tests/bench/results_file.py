"""Where benchmark results go: JSON with the device, the versions and the commit beside every figure."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "bench" / "results"
PACKAGES = ("torch", "triton", "transformers", "gradio")


def describe_machine() -> dict:
    """Device, cores, versions, commit: what a reader needs to repeat a figure."""
    device = "cpu"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "device": device,
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "command": " ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def save(name: str, figures: dict, folder: Path = RESULTS) -> Path:
    """Write figures beside the machine's description; return the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps({"machine": describe_machine(), "figures": figures}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _commit() -> str:
    """The commit, with a mark when the tree differs from it; "unknown" outside a checkout."""
    try:
        arguments = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        found = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ModuleNotFoundError:
        return None
