"""Routes: /health, /v1/models, /v1/chat/completions. The bodies are in schema, the answers in completion."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from engine.api import completion, schema
from engine.api.errors import ApiError, ApiRoute
from engine.api.security import Guard
from engine.engine import Engine
from engine.errors import RequestError

MAX_BODY_BYTES = 48 * 2**20
BODY_TIMEOUT_S = 120.0
MAX_READING = 2  # requests whose decoded pictures are in memory at a time
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE"]
_CHAT, _MODELS = "/v1/chat/completions", "/v1/models"
T = TypeVar("T")


class Host(Protocol):
    """What the routes need of engine.host.ModelHost."""

    def names(self) -> list[str]: ...
    def get(self, name: str | None = None) -> Engine: ...


def create_router(
    host: Host, api_keys: tuple[str, ...] = (), allowed_hosts: Sequence[str] = ()
) -> APIRouter:
    """The OpenAI API over the loaded models; see security for api_keys and allowed_hosts."""
    router = APIRouter(route_class=ApiRoute)
    guard = Guard(api_keys, allowed_hosts)
    created = int(time.time())
    reading = asyncio.Semaphore(MAX_READING)

    @router.get("/health")
    async def health() -> Response:
        return _health(host)

    @router.get(_MODELS)
    async def list_models(request: Request) -> Response:
        guard.check(request)
        data = [_model(name, created) for name in host.names()]
        return JSONResponse({"object": "list", "data": data})

    @router.get(_MODELS + "/{name:path}")
    async def show_model(request: Request, name: str) -> Response:
        guard.check(request)
        return JSONResponse(_model(_find_engine(host, name).name, created))

    @router.post(_CHAT)
    async def create_chat_completion(request: Request) -> Response:
        guard.check(request)
        body = await run_in_threadpool(schema.parse_body, await _read_body(request))
        answer = completion.answer(_find_engine(host, body.model), body, reading)
        del body  # its pictures are large
        return await _unless_disconnected(request, answer)

    @router.api_route("/v1", methods=_METHODS, include_in_schema=False)
    @router.api_route("/v1/{path:path}", methods=_METHODS, include_in_schema=False)
    async def unknown(request: Request, path: str = "") -> Response:
        guard.check(request)
        allowed = {_CHAT: "POST", _MODELS: "GET"}.get(request.scope["path"].rstrip("/"))
        if allowed and request.method != allowed:
            raise ApiError(
                405,
                f"Use {allowed} with this path, not {request.method}.",
                headers={"Allow": allowed},
            )
        raise ApiError(
            404,
            f"There is nothing at /v1/{path[:100]}. The API has {_MODELS} and {_CHAT}.",
            code="unknown_url",
        )

    return router


def _health(host: Host) -> Response:
    names = host.names()
    try:
        is_healthy = all(host.get(name).healthy() for name in names)
    except RequestError:  # unloaded between the two calls
        names, is_healthy = [], True
    state = "ok" if is_healthy and names else "no model loaded" if is_healthy else "engine stalled"
    return JSONResponse({"status": state, "models": names}, 200 if is_healthy else 503)


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "lmdeck"}


def _find_engine(host: Host, name: str | None) -> Engine:
    names = host.names()
    if not names:
        raise ApiError(
            503,
            "No model is loaded yet. Wait for the load to end, or load one.",
            code="model_not_loaded",
            headers={"Retry-After": "5"},
        )
    if name is not None and name not in names:
        raise ApiError(
            404,
            f"Model {name[:200]!r} is not loaded; loaded: {', '.join(names)}.",
            param="model",
            code="model_not_found",
        )
    return host.get(name)


async def _read_body(request: Request) -> bytes:
    """The body, refused by its announced length where there is one, and counted as it comes."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, f"The body's type is {kind[:100]!r}; send Content-Type: application/json."
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "The body is compressed. Send it plain, without Content-Encoding.")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > MAX_BODY_BYTES:
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
    except TimeoutError:
        raise ApiError(
            408, f"The body did not arrive within {BODY_TIMEOUT_S:g} s. Send it again."
        ) from None
    return bytes(body)


def _too_large() -> ApiError:
    return ApiError(
        413,
        f"The body is larger than {MAX_BODY_BYTES // 2**20} MiB, the most that is read. Send less.",
        headers={"Connection": "close"},
    )


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await work, but cancel it when the caller hangs up: cancelling aborts the generation."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            continue

    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, watching):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
