"""Every failure under /v1 as OpenAI's error body: {"error": {message, type, param, code}}.

A route class does it and not exception handlers of the app, which would change the answers of
Gradio's routes in the same app.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from engine.errors import (
    CapacityError,
    ConfigError,
    EngineError,
    QueueFullError,
    RequestError,
)

log = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
}
CLIENT_GONE = 499  # nginx's number; nobody is there to read it


class ApiError(Exception):
    """One sentence for the caller, with the HTTP status and OpenAI's param and code."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }

    def response(self) -> Response:
        # ASCII, because the sentence may quote half a surrogate pair
        return Response(
            json.dumps(self.body), self.status, self.headers, media_type="application/json"
        )


def as_api_error(error: Exception) -> ApiError:
    """What the caller is told about an exception; the unexpected go to the log only."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError | ConfigError):
        return ApiError(400, str(error))
    if isinstance(error, CapacityError):
        is_full = isinstance(error, QueueFullError)
        code = "queue_full" if is_full else "out_of_memory"
        headers = {"Retry-After": "1"}
        return ApiError(429 if is_full else 503, str(error), code=code, headers=headers)
    if isinstance(error, EngineError):
        return ApiError(503, str(error), code="engine_error")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, RequestValidationError):
        return ApiError(400, "The request's path or query has a value of the wrong kind.")
    log.error("API request failed", exc_info=error)
    return ApiError(500, "The server failed on this request; its log has the details.")


class ApiRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                return await handle(request)
            except ClientDisconnect:
                return Response(status_code=CLIENT_GONE)
            except Exception as error:  # noqa: BLE001 - logged where it is not meant for the caller
                return as_api_error(error).response()

        return guarded
