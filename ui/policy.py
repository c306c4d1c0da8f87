"""What a browser may do with our pages: talk to this server, and to nobody else; and who may open them.

Answers are rendered as Markdown, so a model could be talked into writing a picture whose address carries
the conversation to a stranger. The content security policy makes the browser refuse that. A page that
only this machine should see does not answer to a foreign host name, which is how a web site could reach
it through its owner's browser (DNS rebinding). The API has its own guard (engine.api).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import PlainTextResponse

from ui.text import text

API_PREFIX = "/v1/"
# Gradio's page needs inline scripts and styles, and builds functions for its HTML templates.
POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    ]
)
PAGE_HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


class PagePolicy:
    """ASGI middleware: the headers above on every HTML response, and only the given host names.

    hosts None answers to any name.
    """

    def __init__(self, app: Any, hosts: Sequence[str] | None) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", []))
                kinds = [value for name, value in headers if name.lower() == b"content-type"]
                if any(kind.startswith(b"text/html") for kind in kinds):
                    message = {**message, "headers": headers + PAGE_HEADERS}
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._is_welcome(scope):
            await self._app(scope, receive, send_with_policy)
        else:
            refusal = PlainTextResponse(text("error.foreign_host"), status_code=403)
            await refusal(scope, receive, send)

    def _is_welcome(self, scope: Any) -> bool:
        if self._hosts is None or scope["path"].startswith(API_PREFIX):
            return True
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        return host.rpartition(":")[0] in self._hosts or host in self._hosts
