"""What a browser may do with our pages: talk to this server, and to nobody else.

Answers are rendered as Markdown, so a model could be talked into writing a picture whose address carries
the conversation to a stranger. The content security policy makes the browser refuse that.
"""

from __future__ import annotations

from typing import Any

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
    """ASGI middleware that adds the headers above to every HTML response."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", []))
                kinds = [value for name, value in headers if name.lower() == b"content-type"]
                if any(kind.startswith(b"text/html") for kind in kinds):
                    message = {**message, "headers": headers + PAGE_HEADERS}
            await send(message)

        await self._app(scope, receive, send_with_policy if scope["type"] == "http" else send)
