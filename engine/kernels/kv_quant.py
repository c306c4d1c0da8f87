"""The two int8 and int4 forms of a KV cache, in plain torch: their tensors, and how they round.

Online (LMDeploy's quant_policy 8 and 4): every token and KV head has one scale and one zero for K and
one pair for V, fp16, found when the row is written; nothing has to be calibrated. Calibrated: static
fp32 tables per layer, KV head and channel, as in LMDeploy before 0.4; the attention loop then only
converts integers, because scales fold into q and the output (see kernels/attention.py).

x = q * scale + zero with q in 0..2^bits - 1; zero is the value that q = 0 stands for. Int4 puts channel
i in the low and channel i + D / 2 in the high half of byte i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KVBits = Literal[8, 4]


@dataclass(frozen=True)
class OnlineKV:
    """Each row's own scale and zero, in this order along the last dimension."""

    bits: KVBits
    k_params: Tensor  # [num_blocks, block_size, K, 2] fp16
    v_params: Tensor  # [num_blocks, block_size, K, 2] fp16


@dataclass(frozen=True)
class CalibratedKV:
    """One layer's static ranges, found by calibration."""

    bits: KVBits
    k_scale: Tensor  # [K, D] fp32
    k_zero: Tensor  # [K, D] fp32
    v_scale: Tensor  # [K, D] fp32
    v_zero: Tensor  # [K, D] fp32


KVQuant = OnlineKV | CalibratedKV


def quantize_rows(x: Tensor, bits: KVBits) -> tuple[Tensor, Tensor]:
    """x [T, K, D] -> (uint8 [T, K, D * bits / 8], its scale and zero as fp16 [T, K, 2])."""
    x = x.float()
    low, high = x.aminmax(dim=-1)
    params = torch.stack(((high - low) / (2**bits - 1), low), -1).half()
    scale, zero = params.float().unsqueeze(-2).unbind(-1)  # [T, K, 1]
    return quantize(x, scale, zero, bits), params


def quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: KVBits) -> Tensor:
    """Round x [..., D] to the nearest step, halves up; a scale of 0 (a constant row) stores 0."""
    steps = torch.where(scale > 0, (x.float() - zero) / scale, 0.0)
    q = (steps + 0.5).floor().clamp(0, 2**bits - 1).to(torch.uint8)
    if bits == 8:
        return q
    low, high = q.chunk(2, -1)
    return low | (high << 4)


def dequantize(packed: Tensor, scale: Tensor, zero: Tensor, bits: KVBits) -> Tensor:
    """uint8 [..., D * bits / 8] -> fp32 [..., D]; scale and zero broadcast over [..., D]."""
    q = packed if bits == 8 else torch.cat((packed & 15, packed >> 4), -1)
    return torch.addcmul(zero, q.float(), scale)
