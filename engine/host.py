"""The models that this process serves: load, find by name, replace, close.

A new model is loaded beside the old one, so that a load that fails leaves the old one answering.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineError, RequestError


class ModelHost:
    """Holds the loaded engine. `load` may be called from any thread; loads run one at a time."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._is_closed = False
        self._loading = threading.Lock()

    def load(
        self, config: EngineConfig, on_progress: Callable[[int, int], None] | None = None
    ) -> Engine:
        """Load, then swap: the previous model answers until the new one is ready, and on failure."""
        with self._loading:
            if self._is_closed:
                raise EngineError("LMDeck is ending; no model is loaded any more.")
            engine = Engine.load(config, on_progress)
            previous, self._engine = self._engine, engine
            if previous is not None:
                previous.close()
            return engine

    def get(self, name: str | None = None) -> Engine:
        """The engine of that name, or the only one for None. Raises RequestError."""
        engine = self._engine
        if engine is None:
            raise RequestError("No model is loaded yet. Wait for the load to end, or load one.")
        if name is not None and name != engine.name:
            raise RequestError(f"Model {name!r} is not loaded; loaded: {engine.name!r}.")
        return engine

    def names(self) -> list[str]:
        """Names of the loaded models, as the API lists them."""
        return [] if self._engine is None else [self._engine.name]

    def close(self) -> None:
        """Unload for good, once a load in progress has ended. Requests in flight end with an error."""
        self._is_closed = True
        with self._loading:
            engine, self._engine = self._engine, None
            if engine is not None:
                engine.close()
