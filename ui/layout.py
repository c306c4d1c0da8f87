"""The page: header, tabs, look. Each tab is a file with a `build`; this one only puts them together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from fastapi import FastAPI

from ui import chat, status
from ui.policy import PagePolicy
from ui.service import StudioService
from ui.text import text
from ui.theme import studio_theme

ASSETS = Path(__file__).parent.parent / "assets"
MAX_UPLOAD_BYTES = 32 * 2**20
CACHE_CHECK_S, CACHE_AGE_S = 3600, 24 * 3600
MAX_PARALLEL_HANDLERS = 40  # Gradio's thread pool; its own default would run one at a time


def build_page(service: StudioService) -> gr.Blocks:
    with gr.Blocks(
        title=text("app.title"),
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(CACHE_CHECK_S, CACHE_AGE_S),
    ) as page:
        gr.HTML(status.header_html(), elem_id="header", padding=False)
        with gr.Tabs(elem_id="tabs"), gr.Tab(text("tab.chat"), id="chat"):
            chat.build(service, page)
    page.queue(default_concurrency_limit=MAX_PARALLEL_HANDLERS)
    return page


def mount(app: FastAPI, service: StudioService, hosts: Sequence[str] | None = None) -> FastAPI:
    """Put the page at / of `app`, after routes that must win over it; hosts as in PagePolicy."""
    app.include_router(status.create_router(service))
    app.add_middleware(PagePolicy, hosts=hosts)
    page = build_page(service)
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=studio_theme(),
        css_paths=[ASSETS / "style.css"],
        head=_script(),
        allowed_paths=[str(chat.SAMPLES)],
        max_file_size=MAX_UPLOAD_BYTES,
        show_error=False,
        run_history=False,
        ssr_mode=False,
        footer_links=[],
    )


def _script() -> str:
    """The page's script with its texts; both are ours and fixed, so nothing here needs escaping."""
    names = ("chat.attach", "chat.send", "chat.stop", "chat.composer", "state.unreachable")
    names += ("button.settings", "button.theme", "chip.text_only")
    texts = json.dumps({name: _raw(name) for name in names})
    code = (ASSETS / "page.js").read_text(encoding="utf-8")
    return f"<script>const LMDECK_TEXT = {texts};\n{code}</script>"


def _raw(key: str) -> str:
    """The text with its {name} left for the page's script to fill in."""
    return text(key, name="{name}")
