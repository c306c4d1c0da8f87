"""Who may call: API keys, and no page of another site through a user's browser.

Three things keep foreign pages out. POST takes application/json only, which a browser does not send
across sites without a preflight, and no preflight is ever answered (CORS is off). An Origin that is not
the Host is refused. And because a rebinding attack makes the two equal (evil.example resolves to
127.0.0.1), the Host must be an IP address, localhost, this machine's name or one of allowed_hosts.
A valid API key lifts the last two: a foreign page does not have it.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from fastapi import Request

from engine.api.errors import ApiError


class Guard:
    def __init__(self, api_keys: Sequence[str] = (), allowed_hosts: Sequence[str] = ()) -> None:
        self._keys = [hashlib.sha256(key.encode()).digest() for key in api_keys]
        machine = socket.gethostname().lower()
        self._hosts = {"localhost", machine, machine.partition(".")[0], f"{machine}.local"}
        self._hosts |= {name.lower() for name in allowed_hosts}

    def check(self, request: Request) -> None:
        """Raises ApiError 401 or 403."""
        if self._keys:
            self._check_key(request)
            return
        host = request.headers.get("host", "")
        if not self._is_known(host):
            raise ApiError(
                403,
                f"The API does not answer to the host name {host[:100]!r}. Call it by IP address or as "
                "localhost, or start the server with an API key.",
                code="host_not_allowed",
            )
        origin = request.headers.get("origin")
        if origin is not None and urlsplit_or_empty(origin).netloc.lower() != host.lower():
            raise ApiError(
                403,
                f"The API does not answer to pages of {origin[:100]!r}. Start the server with an API "
                "key and send it.",
                code="origin_not_allowed",
            )

    def _check_key(self, request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogatepass")).digest()
        # every key is compared, whole, so that time tells nothing
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        if scheme.lower() == "bearer" and any(matches):
            return
        raise ApiError(
            401,
            "The API key is missing or wrong. Send it as: Authorization: Bearer KEY.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _is_known(self, host: str) -> bool:
        if not host or any(char in host for char in "/?#@\\ "):
            return False
        name = urlsplit_or_empty(f"//{host}").hostname or ""
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._hosts or name.endswith(".localhost")
        return True


def urlsplit_or_empty(url: str):
    try:
        return urlsplit(url)
    except ValueError:  # such as an unclosed [ of an IPv6 address
        return urlsplit("")
