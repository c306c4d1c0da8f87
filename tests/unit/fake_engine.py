"""A stand-in for the engine with the same interface: it writes a fixed text, one word per step."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import SimpleNamespace

from engine import Event, Finished, Request, RequestError, TextDelta
from engine.types import ImagePart, Timing, Usage

SENTENCE = "The quick brown fox jumps over the lazy dog. "


@dataclass
class FakeEngine:
    """Streams `words` words, `word_s` seconds apart, and counts what runs."""

    words: int = 60
    word_s: float = 0.03
    supports_images: bool = True
    name: str = "fake-model"
    max_context: int = 2048
    device: str = "cpu"
    dtype: str = "float32"
    running: int = 0
    gate: threading.Event | None = None
    requests: list[Request] | None = None

    async def astream(self, request: Request) -> AsyncIterator[Event]:
        if self.requests is not None:
            self.requests.append(request)
        self.running += 1
        try:
            last = request.prompt[-1].content
            if last == "fail":
                raise RequestError("Prompt has 9,120 tokens; this model accepts 8,192. Shorten it.")
            if last == "crash":
                raise ZeroDivisionError("a fault")
            pictures = 0 if isinstance(last, str) else sum(isinstance(p, ImagePart) for p in last)
            vocabulary = SENTENCE.split(" ")[:-1]
            for i in range(self.words):
                while self.gate is not None and not self.gate.is_set():
                    await asyncio.sleep(0.005)
                await asyncio.sleep(self.word_s)
                yield TextDelta(vocabulary[i % len(vocabulary)] + " ", (i,))
            usage = Usage(24 + 64 * pictures, self.words, image_tokens=64 * pictures)
            yield Finished("stop", usage, Timing(0.0, 0.12, 2.0, 300.0, 31.4))
        finally:
            self.running -= 1

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(running=self.running, waiting=0)


class FakeHost:
    def __init__(self, engine: FakeEngine, load_s: float = 0.0) -> None:
        self._ready, self._engine, self._load_s = None, engine, load_s

    def load(self, config: object, on_progress: object = None) -> FakeEngine:
        time.sleep(self._load_s)
        self._ready = self._engine
        return self._engine

    def get(self, name: str | None = None) -> FakeEngine:
        if self._ready is None:
            raise RequestError("No model is loaded.")
        return self._ready

    def names(self) -> list[str]:
        return [self._engine.name] if self._ready else []

    def close(self) -> None:
        self._ready = None
