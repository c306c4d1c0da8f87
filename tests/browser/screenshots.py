"""Takes the README's pictures with the demo model: light, dark, and as on a phone.

`python -m tests.browser.screenshots` writes assets/screenshots/*.png.
"""

from __future__ import annotations

import sys

from playwright.sync_api import Page, sync_playwright

from tests.browser.chromium import ARGUMENTS, find_chromium
from tests.browser.studio import ROOT, running_studio

FOLDER = ROOT / "assets" / "screenshots"
PICTURE = ROOT / "assets" / "samples" / "boat.png"
QUESTIONS = ("Describe this picture.", "What color is the sail?")
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 380, "height": 740}
SHOTS = (("light", "light", DESKTOP), ("dark", "dark", DESKTOP), ("phone", "light", PHONE))


def converse(page: Page) -> None:
    """Two questions about a sample picture, and their likeliest answers."""
    if not page.locator("#temperature").is_visible():
        page.click("#toggle-settings")
    temperature = page.locator("#temperature input[type=number]")
    temperature.fill("0")
    temperature.press("Tab")
    if page.viewport_size == PHONE:
        page.keyboard.press("Escape")
    page.set_input_files("#composer input[type=file]", PICTURE)
    page.locator("#composer .thumbnail-item").wait_for()
    for count, words in enumerate(QUESTIONS, start=1):
        page.fill("#composer textarea", words)
        page.click("#composer .submit-button")
        page.locator("#chat-log .lm-stats").nth(count - 1).wait_for()


def main() -> int:
    path = find_chromium()
    if path is None:
        print("No Chromium found; install one or set PLAYWRIGHT_CHROMIUM to its path.")
        return 1
    FOLDER.mkdir(parents=True, exist_ok=True)
    with running_studio() as studio, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        for name, theme, size in SHOTS:
            page = browser.new_context(viewport=size, reduced_motion="reduce").new_page()
            page.goto(f"{studio.url}/?__theme={theme}")
            page.locator("#lm-name:not(:empty)").wait_for()
            page.locator("#composer textarea").wait_for()
            converse(page)
            page.mouse.move(0, 0)
            page.screenshot(path=FOLDER / f"chat_{name}.png")
            print(FOLDER / f"chat_{name}.png")
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
