"""One program and one browser for all browser tests; a fresh page for each, watched for trouble."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.browser.chromium import ARGUMENTS, find_chromium
from tests.browser.studio import ROOT, running_studio

DEMO_MODEL = ROOT / "assets" / "demo_model"

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


@pytest.fixture(scope="session")
def endless_studio(browser, tmp_path_factory):
    """The same program on a copy of the demo model that knows no end: answers run until they are cut."""
    folder = tmp_path_factory.mktemp("endless") / "endless_model"
    shutil.copytree(DEMO_MODEL, folder)
    for name in ("config.json", "generation_config.json"):
        known = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(known | {"eos_token_id": 0}), encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        words = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(words.replace("<|im_end|>", "<|endoftext|>"), encoding="utf-8")
    with running_studio("--model", str(folder)) as studio:
        yield studio


@pytest.fixture
def open_page(browser, studio):
    with pages_of(browser, studio) as open_page:
        yield open_page


@pytest.fixture
def open_endless_page(browser, endless_studio):
    with pages_of(browser, endless_studio) as open_page:
        yield open_page


@contextmanager
def pages_of(browser, studio):
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


@pytest.fixture
def endless_page(open_endless_page):
    return open_endless_page()
