"""One program and one browser for all browser tests; a fresh page for each, watched for trouble."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.browser.chromium import ARGUMENTS, find_chromium
from tests.browser.studio import running_studio

expect.set_options(timeout=60_000)  # against a hang; a slow machine is no failure

# What Gradio's client reports about the streams that a reload cuts off; no trouble of ours.
CUT_OFF = ("AbortError: signal is aborted", "Unexpected error Connection errored out")


@pytest.fixture(scope="session")
def browser():
    path = find_chromium()
    if path is None:
        reason = "No Chromium found; install one or set PLAYWRIGHT_CHROMIUM to its path."
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def studio(browser):
    with running_studio() as studio:
        yield studio


@pytest.fixture
def open_page(browser, studio):
    """Opens pages, each a different person's; afterwards none may have called another host or failed."""
    contexts, troubles, leaving = [], [], []
    own = urlsplit(studio.url).netloc

    def watch(request):
        parts = urlsplit(request.url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.netloc != own:
            troubles.append(f"request to another host: {request.url}")

    def hear(message):
        if message.type == "error" and not (leaving and message.text.startswith(CUT_OFF)):
            troubles.append(f"console: {message.text}")

    def leave_and_reload(reload):
        def wrapped():
            leaving.append(True)
            reload()

        return wrapped

    def open_page(query: str = "", **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
        contexts.append(context)
        context.on("request", watch)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(f"script error: {error}"))
        page.on("console", hear)
        page.reload = leave_and_reload(page.reload)
        page.goto(f"{studio.url}/{query}")
        page.locator("#lm-name:not(:empty)").wait_for()
        page.locator("#composer textarea").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not troubles


@pytest.fixture
def page(open_page):
    return open_page()
