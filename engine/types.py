"""Values that cross the engine's borders: what goes in (messages, sampling), what comes out (events).

Nothing here computes and nothing here imports another module of the project except errors, so every
layer may use it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from engine.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

FinishReason = Literal["stop", "length", "abort"]
Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class SamplingParams:
    """How to pick tokens. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.

    logprobs None returns none; n >= 0 returns the sampled token's and the n most likely ones',
    from the model's own distribution (before penalties and temperature).
    max_new_tokens None means: up to the end of the context.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_new_tokens: int | None = 512
    min_new_tokens: int = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        def check(name: str, low: float, high: float, *, open_low: bool = False) -> None:
            value = getattr(self, name)
            inside = (
                math.isfinite(value) and low <= value <= high and not (open_low and value == low)
            )
            if not inside:
                bracket = "(" if open_low else "["
                raise ConfigError(
                    f"{name} is {value}; expected a number in {bracket}{low:g}, {high:g}]."
                )

        check("temperature", 0, 100)
        check("top_p", 0, 1, open_low=True)
        check("top_k", 0, 2**31 - 1)
        check("min_p", 0, 1)
        check("repetition_penalty", 0.01, 100)
        check("presence_penalty", -100, 100)
        check("frequency_penalty", -100, 100)
        check("min_new_tokens", 0, 2**31 - 1)
        if self.max_new_tokens is not None:
            check("max_new_tokens", 1, 2**31 - 1)
        if self.logprobs is not None:
            check("logprobs", 0, 20)
        if self.seed is not None:
            check("seed", -(2**63), 2**64 - 1)
        if len(self.stop) > 16 or any(not s or len(s) > 1024 for s in self.stop):
            raise ConfigError("stop takes at most 16 strings of 1 to 1024 characters.")
        if len(self.logit_bias) > 1024:
            raise ConfigError(
                f"logit_bias has {len(self.logit_bias)} entries; expected at most 1024."
            )
        if len(self.stop_token_ids) > 1024 or any(token < 0 for token in self.stop_token_ids):
            raise ConfigError("stop_token_ids takes at most 1024 token ids of at least 0.")
        for token, bias in self.logit_bias.items():
            if token < 0 or not math.isfinite(bias) or abs(bias) > 100:
                raise ConfigError(
                    f"logit_bias has token {token}: {bias}; expected a token id >= 0 and a bias in [-100, 100]."
                )


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class ImagePart:
    """A decoded RGB picture; `engine.images` makes these from bytes, with its bounds checked."""

    image: Image


@dataclass(frozen=True)
class ChatMessage:
    """One turn; content is text, or text and pictures in the order in which the model sees them."""

    role: Role
    content: str | tuple[TextPart | ImagePart, ...]


@dataclass(frozen=True)
class Request:
    """What to generate from: chat messages (templated), a raw text prompt, or token ids.

    continue_last: the last message is an assistant's unfinished answer to go on with.
    """

    prompt: tuple[ChatMessage, ...] | str | tuple[int, ...]
    params: SamplingParams = SamplingParams()
    continue_last: bool = False


@dataclass(frozen=True)
class Logprob:
    """ln p of one token, with the token's own text and bytes (a token may be a part of a character)."""

    token_id: int
    text: str
    bytes: bytes
    logprob: float
    top: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Usage:
    """cached_tokens are the prompt tokens whose KV was shared; image_tokens are part of prompt_tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    image_tokens: int = 0


@dataclass(frozen=True)
class Timing:
    """Seconds as the engine saw them. decode_tps counts the tokens after the first one."""

    queue_s: float
    first_token_s: float
    total_s: float
    prefill_tps: float
    decode_tps: float


@dataclass(frozen=True)
class TextDelta:
    """New text (it may be empty while a character or a stop string is incomplete) and its tokens."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The last event of a stream. stop_match is the stop string or token id that ended it, if any."""

    reason: FinishReason
    usage: Usage
    timing: Timing
    stop_match: str | int | None = None


Event = TextDelta | Finished


@dataclass(frozen=True)
class BatchInputs:
    """One step's flat tensors. T tokens of B sequences, decoding sequences first.

    Sequence b owns rows cu_seqlens[b]:cu_seqlens[b+1]; context_lens[b] counts its tokens in the
    cache once this step has run. Row t's key and value go to slots[t] = block * block_size + offset;
    -1 writes nothing. The first num_decodes sequences have exactly one row each.
    """

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64
    cu_seqlens: Tensor  # [B + 1] int32
    context_lens: Tensor  # [B] int32
    block_tables: Tensor  # [B, max_blocks] int32
    query_lens: tuple[int, ...]  # [B], host copy of the differences of cu_seqlens
    max_context_len: int
    num_decodes: int = 0
    rope_lens: Tensor | None = None  # [T] int64, for dynamic NTK only: see layers/rotary.py
