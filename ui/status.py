"""What the header polls: the model and the engine's load as JSON, and the header's frame.

A short request now and then rather than a stream, because browsers allow six streams per host and a
seventh tab would hang. Names reach the page as textContent only (assets/page.js), never as HTML.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ui.service import StudioService
from ui.text import text

STATUS_PATH = "/ui/status"


def create_router(service: StudioService) -> APIRouter:
    router = APIRouter()

    @router.get(STATUS_PATH, include_in_schema=False)
    def status(conversation: str | None = None) -> dict[str, Any]:
        return service.status(conversation)

    return router


def header_html() -> str:
    """The header's fixed markup: a name, and empty places that the page's script fills."""
    return f"""
<div class="lm-brand"><svg viewBox="0 0 24 24" aria-hidden="true"><rect x="3" y="4" width="14" height="3.4"
 rx="1.7"/><rect x="3" y="10.3" width="18" height="3.4" rx="1.7"/><rect x="3" y="16.6" width="10" height="3.4"
 rx="1.7"/></svg><h1>{text("app.title")}</h1></div>
<div class="lm-model" role="status" aria-live="polite">
 <span id="lm-dot" data-phase="empty"></span><span id="lm-name"></span><span id="lm-facts"></span>
 <span id="lm-words"></span></div>
<button id="lm-theme" type="button" aria-label="{text("button.theme")}"><svg viewBox="0 0 24 24"
 aria-hidden="true"><path d="M12 3a9 9 0 1 0 9 9c0-.5 0-.9-.1-1.4A5.5 5.5 0 0 1 13.4 3.1 9 9 0 0 0 12 3z"/></svg></button>"""
