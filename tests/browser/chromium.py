"""Finds a Chromium for the browser tests; run as a module it fetches one if the machine has none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# A test browser: no sandbox inside containers, no GPU, nothing asked of the network on its own.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find_chromium() -> str | None:
    """PLAYWRIGHT_CHROMIUM, else a system browser, else the one that Playwright installed."""
    named = os.environ.get("PLAYWRIGHT_CHROMIUM")
    if named:
        return named
    installed = next((path for path in map(shutil.which, NAMES) if path), None)
    if installed:
        return installed
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


def install_chromium() -> bool:
    """Debian's package where this user may install it, else Playwright's own build."""
    playwright = [sys.executable, "-m", "playwright", "install", "chromium"]
    commands = [playwright]
    if shutil.which("apt-get") and os.geteuid() == 0:
        commands = [["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "chromium"]]
    return all(subprocess.run(command, check=False).returncode == 0 for command in commands)


def main() -> int:
    if find_chromium():
        return 0
    print("No Chromium found; installing one for the browser tests.")
    if install_chromium():
        return 0
    print("That failed. Install Chromium, or set PLAYWRIGHT_CHROMIUM to a browser's path.")
    return 1 if os.environ.get("CI") else 0


if __name__ == "__main__":
    sys.exit(main())
