"""Runs the page and its routes: answers early, loads the model behind it, ends promptly.

The page answers before the model is there and says how far it is. When the first load fails, the
process ends with the reason, because a page without a model helps nobody.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import uvicorn
from fastapi import APIRouter, FastAPI

from engine import EngineConfig, EngineError, ModelError
from ui import layout
from ui.service import StudioService
from ui.text import text

if TYPE_CHECKING:
    from engine import ModelHost

LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
CLOSE_GRACE_S = 1
MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "tokenizer*"]


class StudioServer:
    """One process: page, routes, model. `run` returns the exit code."""

    def __init__(
        self,
        host: ModelHost,
        *,
        routers: Sequence[APIRouter],
        listener: socket.socket,
        server_name: str,
        share: bool = False,
    ) -> None:
        self._host = host
        self._listener = listener
        self._name = server_name
        self._share = share
        self._failure: EngineError | None = None
        self._service = StudioService(host)
        # No /docs: its page would fetch scripts from another host.
        app = FastAPI(title=text("app.title"), docs_url=None, redoc_url=None)
        for router in routers:
            app.include_router(router)
        only_here = server_name in LOOPBACK and not share
        settings = uvicorn.Config(
            layout.mount(app, self._service, LOOPBACK if only_here else None),
            log_level="critical",
            timeout_graceful_shutdown=CLOSE_GRACE_S,
        )
        self._uvicorn = _Announcing(settings, self._started, self._service.close)
        self._loader = threading.Thread(target=self._load, name="lmdeck-load", daemon=True)

    def run(self, hub_id: str | None, config: EngineConfig) -> int:
        self._hub_id, self._config = hub_id, config
        try:
            self._uvicorn.run(sockets=[self._listener])
        except KeyboardInterrupt:
            pass
        finally:
            if not self._loader.is_alive():  # a load cannot be interrupted; the process ends it
                self._host.close()
        if self._failure is not None:
            print(self._failure, file=sys.stderr)
            return 1
        return 0

    def _started(self) -> None:
        port = self._listener.getsockname()[1]
        name = "127.0.0.1" if self._name in ("0.0.0.0", "::") else self._name  # noqa: S104
        print(text("server.ready", url=f"http://{name}:{port}"), flush=True)
        self._loader.start()
        if self._share:
            threading.Thread(target=self._open_link, args=(port,), daemon=True).start()

    def _load(self) -> None:
        try:
            config = self._config
            if self._hub_id is not None:
                self._service.announce(text("state.downloading", name=self._hub_id))
                config = replace(config, model=download(self._hub_id))
            engine = self._service.load(config)
            print(text("server.loaded", name=engine.name, device=engine.device), flush=True)
        except EngineError as error:
            self._failure = error
            self._uvicorn.should_exit = True

    def _open_link(self, port: int) -> None:
        from gradio.networking import setup_tunnel

        try:
            link = setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)
        except Exception as error:  # noqa: BLE001  # the tunnel raises bare Exceptions
            print(text("server.no_link", reason=error), file=sys.stderr)
        else:
            print(text("server.link", url=link), flush=True)


class _Announcing(uvicorn.Server):
    """Tells when it answers, and when it begins to end, so that open streams end by themselves."""

    def __init__(self, config: uvicorn.Config, started: object, ending: object) -> None:
        super().__init__(config)
        self._tell_started, self._tell_ending = started, ending

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._tell_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._tell_ending()
        await super().shutdown(sockets)


def download(hub_id: str) -> str:
    """Fetch a model's weights, configuration and tokenizer from Hugging Face -> its local folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return snapshot_download(hub_id, allow_patterns=MODEL_FILES)
    except GatedRepoError as error:
        raise ModelError(text("hub.gated", name=hub_id)) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(text("hub.unknown", name=hub_id)) from error
    except LocalEntryNotFoundError as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        key = "hub.offline" if offline else "hub.unreachable"
        raise ModelError(text(key, name=hub_id)) from error
    except OSError as error:
        raise ModelError(text("hub.failed", name=hub_id, reason=error)) from error
