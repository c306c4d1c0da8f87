"""EngineConfig: every setting of a loaded model, with a working default, checked when it is made.

Names follow LMDeploy's where a tutorial uses them; the older `instance_num` is accepted by the command
line only. Units: tokens unless the name says bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import ConfigError

DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine.

    model: a folder with a Hugging Face checkpoint.
    cache_max_entry_count: share of the memory that is free after the weights, for KV blocks; None is
        0.8 on a GPU, and on a CPU at most two gibibytes.
    cache_bytes, cache_tokens: an absolute KV budget instead of the share; at most one of them.
    session_len: longest prompt plus answer of one request; None takes the model's own.
    max_prefill_token_num: most tokens of one step; longer prompts are read in chunks.
    cuda_graph_max_batch: decode steps of up to so many sequences run as CUDA graphs, captured at load;
        None is max_batch_size, 0 turns them off. The memory for them (0.4 GB for a 7B model at 64, engine/graphs.py)
        comes off what the KV cache may take.
    quant_policy: bits of the KV cache as in LMDeploy since 0.4: 0 as the model computes, 8 or 4 integers.
    """

    model: str | Path
    model_name: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    model_format: Literal["auto", "hf", "awq"] = "auto"
    chat_template: str | None = None
    session_len: int | None = None
    max_batch_size: int = 64
    max_waiting: int = 1024
    cache_max_entry_count: float | None = None
    cache_bytes: int | None = None
    cache_tokens: int | None = None
    cache_block_seq_len: int = 64
    enable_prefix_caching: bool = True
    max_prefill_token_num: int = 2048
    rope_scaling_factor: float = 0.0
    quant_policy: Literal[0, 8, 4] = 0
    cuda_graph_max_batch: int | None = None

    @property
    def largest_graph(self) -> int:
        """cuda_graph_max_batch with its default; a larger batch than max_batch_size never comes."""
        asked = self.cuda_graph_max_batch
        return self.max_batch_size if asked is None else min(asked, self.max_batch_size)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}.")
        positive = ("max_batch_size", "max_waiting", "cache_block_seq_len", "max_prefill_token_num")
        for name in positive:
            _at_least_one(name, getattr(self, name))
        for name in ("session_len", "cache_bytes", "cache_tokens"):
            if getattr(self, name) is not None:
                _at_least_one(name, getattr(self, name))
        if self.cuda_graph_max_batch not in (None, 0):
            _at_least_one("cuda_graph_max_batch", self.cuda_graph_max_batch)
        share = self.cache_max_entry_count
        if share is not None and not (math.isfinite(share) and 0 < share <= 1):
            raise ConfigError(
                f"cache_max_entry_count is {share}; expected a share of free memory in (0, 1]. "
                "For an absolute budget use cache_bytes or cache_tokens."
            )
        if self.cache_bytes is not None and self.cache_tokens is not None:
            raise ConfigError("cache_bytes and cache_tokens are both set; give one of them.")
        if not (self.rope_scaling_factor == 0 or 1 <= self.rope_scaling_factor < 1000):
            raise ConfigError(
                f"rope_scaling_factor is {self.rope_scaling_factor}; expected 0 (off) or a factor >= 1."
            )
        if self.quant_policy not in (0, 4, 8):
            raise ConfigError(
                f"quant_policy is {self.quant_policy}; expected 0 (unquantized KV), 8 (int8) or 4 (int4)."
            )


def _at_least_one(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} is {value!r}; expected a whole number of at least 1.")
