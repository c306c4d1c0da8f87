"""One request on its way through the engine: its tokens, its KV blocks, its place in time."""

from __future__ import annotations

import hashlib
import itertools
import random
import struct
import time
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.types import SamplingParams, Timing, Usage

if TYPE_CHECKING:
    from engine.prompt import ImageSpan
    from engine.tokenizer import StreamDecoder

_ids = itertools.count()


class Sequence:
    """Tokens of one request. `num_computed` of them have their keys and values in the cache."""

    def __init__(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        max_tokens: int,
        images: tuple[ImageSpan, ...] = (),
        decoder: StreamDecoder | None = None,
        sink: Callable[[object], None] = lambda event: None,
        num_shareable: int | None = None,
        arrived: float | None = None,
    ) -> None:
        self.id = next(_ids)
        self.tokens = list(prompt_ids)
        self.num_prompt = len(prompt_ids)
        self.params = params
        self.images = images
        self.max_tokens = max_tokens  # prompt and answer together
        self.decoder = decoder
        self.sink = sink
        self.num_shareable = num_shareable  # first tokens whose KV fits others too; None: all
        seed = params.seed
        self.rng = random.Random(None if seed is None else seed % 2**64)  # Random(-1) is Random(1)
        self.block_table: list[int] = []
        self.num_computed = 0
        self.num_shared: int | None = None  # prompt tokens found in the cache at first admission
        self.num_published = 0  # blocks of the table whose hash is known to the block manager
        self.is_finished = False
        self.is_aborted = False
        self._hashes: list[bytes] = []
        self._uniforms: list[float] = []  # one for each answer token
        # When the request was made, before its template and pictures were worked on.
        self._arrived = time.perf_counter() if arrived is None else arrived
        self._admitted: float | None = None
        self._first_token: float | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    def block_hashes(self, block_size: int, num_blocks: int) -> list[bytes]:
        """Hashes of the first num_blocks full blocks, chained, pictures included by content."""
        while len(self._hashes) < num_blocks:
            start = len(self._hashes) * block_size
            end = start + block_size
            digest = hashlib.blake2b(digest_size=16)
            digest.update(self._hashes[-1] if self._hashes else b"")
            digest.update(array("q", self.tokens[start:end]).tobytes())
            for span in self.images:
                if span.start < end and start < span.start + span.length:
                    digest.update(struct.pack("q", span.start - start) + span.digest)
            self._hashes.append(digest.digest())
        return self._hashes[:num_blocks]

    def uniform(self, ahead: int = 0) -> float:
        """The random number in [0, 1) for the next token, or the one `ahead` of it.

        A step that is tried again, or was computed in vain, finds the same number.
        """
        index = self.num_output + ahead
        while len(self._uniforms) <= index:
            self._uniforms.append(self.rng.random())
        return self._uniforms[index]

    def mark_admitted(self, num_shared: int) -> None:
        if self._admitted is None:
            self._admitted = time.perf_counter()
            self.num_shared = num_shared

    def mark_token(self) -> None:
        if self._first_token is None:
            self._first_token = time.perf_counter()

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.num_prompt,
            completion_tokens=self.num_output,
            cached_tokens=self.num_shared or 0,
            image_tokens=sum(span.length for span in self.images),
        )

    def timing(self) -> Timing:
        now = time.perf_counter()
        admitted = self._admitted or now
        first = self._first_token or now
        prefilled = self.num_prompt - (self.num_shared or 0)
        decoded = self.num_output - 1
        return Timing(
            queue_s=admitted - self._arrived,
            first_token_s=first - self._arrived,
            total_s=now - self._arrived,
            prefill_tps=prefilled / (first - admitted) if first > admitted else 0.0,
            decode_tps=decoded / (now - first) if decoded > 0 and now > first else 0.0,
        )
