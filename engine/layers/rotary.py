"""Rotary position embedding: the scalings of transformers 5, and dynamic NTK in a batch.

Dynamic NTK (also LMDeploy's rope_scaling_factor) makes the base grow with the sequence. transformers
takes the longest position of a step; here each row has its own: rope_lens[t] is the longer of its
prompt and its position + 1. That is what transformers computes for one sequence that reads its prompt
in one step, whatever chunks, neighbours or preemptions there are. Without rope_lens (whole sequences,
no engine) it is the length of the row's sequence. Up to max_position nothing depends on this.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from engine.types import BatchInputs


class RopeLike(Protocol):
    """The fields of models.spec.RopeSpec."""

    base: float
    dim: int
    kind: str
    factor: float
    original_max_position: int
    low_freq_factor: float
    high_freq_factor: float
    beta_fast: float
    beta_slow: float
    attention_factor: float | None
    mscale: float
    mscale_all_dim: float
    truncate: bool


class Rotary:
    """cos and sin of a step's rows, computed once and used by all layers."""

    def __init__(self, rope: RopeLike) -> None:
        self.rope = rope
        self._inv_freq = inverse_frequencies(rope)
        self._magnitude = attention_factor(rope)

    def __call__(self, inputs: BatchInputs) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [T, dim] fp32; the first half of sin is negated (kernels.apply_rotary)."""
        device = inputs.positions.device
        if self._inv_freq.device != device:
            self._inv_freq = self._inv_freq.to(device)
        inv_freq = self._inv_freq
        if self.rope.kind == "dynamic":
            inv_freq = self._dynamic(inputs)
        angles = inputs.positions[:, None].float() * inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self._magnitude != 1.0:
            cos, sin = cos * self._magnitude, sin * self._magnitude
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def _dynamic(self, inputs: BatchInputs) -> Tensor:
        """Each row's frequencies [T, dim / 2]."""
        rope, limit = self.rope, self.rope.original_max_position
        lens = inputs.rope_lens
        if lens is None:
            if inputs.max_context_len <= limit:
                return self._inv_freq
            counts = inputs.cu_seqlens.diff().long()
            rows = inputs.positions.shape[0]
            lens = inputs.context_lens.repeat_interleave(counts, output_size=rows)
        lens = lens.clamp(min=limit).float()
        growth = rope.factor * lens / limit - (rope.factor - 1)
        base = rope.base * growth ** (rope.dim / (rope.dim - 2))  # [T]
        return 1.0 / (base[:, None] ** _exponents(rope.dim, lens.device))


def inverse_frequencies(rope: RopeLike) -> Tensor:
    """[dim / 2] fp32 on the CPU; for dynamic, those of a sequence within max_position."""
    inv_freq = 1.0 / (rope.base ** _exponents(rope.dim, "cpu"))
    if rope.kind == "linear":
        return inv_freq / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, inv_freq)
    if rope.kind == "yarn":
        return _yarn(rope, inv_freq)
    return inv_freq


def attention_factor(rope: RopeLike) -> float:
    """What cos and sin are multiplied with; only yarn differs from 1."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def _exponents(dim: int, device: torch.device | str) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim


def _llama3(rope: RopeLike, inv_freq: Tensor) -> Tensor:
    """Keep short wavelengths, divide long ones by factor, blend between (Llama 3.1)."""
    wavelen = 2 * math.pi / inv_freq
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = (rope.original_max_position / wavelen - low) / (high - low)
    blended = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    is_long = wavelen > rope.original_max_position / low
    is_short = wavelen < rope.original_max_position / high
    return torch.where(is_long, inv_freq / rope.factor, torch.where(is_short, inv_freq, blended))


def _yarn(rope: RopeLike, inv_freq: Tensor) -> Tensor:
    """YaRN (Peng et al. 2023): interpolate dimensions that turn less than beta_slow times."""

    def dimension(num_rotations: float) -> float:
        turns = rope.original_max_position / (num_rotations * 2 * math.pi)
        return rope.dim * math.log(turns) / (2 * math.log(rope.base))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = 0.001 if low == high else high - low
    steps = torch.arange(rope.dim // 2, dtype=torch.float32, device="cpu")
    ramp = ((steps - low) / width).clamp(0, 1)
    return inv_freq / rope.factor * ramp + inv_freq * (1 - ramp)
