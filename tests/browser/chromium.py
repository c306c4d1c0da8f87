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


def main() -> int:
    if find_chromium():
        return 0
    print("No Chromium found; installing Playwright's own for the browser tests.")
    done = subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=False)
    if done.returncode:
        print("That failed. Install Chromium, or set PLAYWRIGHT_CHROMIUM to a browser's path.")
    return done.returncode if os.environ.get("CI") else 0


if __name__ == "__main__":
    sys.exit(main())
