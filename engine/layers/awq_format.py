"""AutoAWQ's "GEMM" layout of a 4-bit weight, as it lies on disk and in memory.

qweight int32 [in, out / 8], qzeros int32 [in / g, out / 8], scales [in / g, out]; eight neighbouring
output columns share an int32 in the nibble order 0, 2, 4, 6, 1, 3, 5, 7 (lowest first).
W[i, o] = (q[i, o] - zero[i / g, o]) * scale[i / g, o]; the zero point is stored as it is (GPTQ stores
it minus one). Choosing scales and zeros is quantization's business, not this file's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels import AWQ_ORDER, dequantize_awq, unpack_awq

__all__ = ["dequantize_awq", "pack_awq", "quantize_to_awq", "unpack_awq"]


def pack_awq(values: Tensor) -> Tensor:
    """Integers 0..15 [R, N], N a multiple of 8, in column order -> int32 [R, N / 8]."""
    eights = values.to(torch.int32).unflatten(1, (-1, 8))
    packed = torch.zeros_like(eights[..., 0])
    for nibble, column in enumerate(AWQ_ORDER):
        packed |= eights[..., column] << (4 * nibble)
    return packed


def quantize_to_awq(
    weight: Tensor, scales: Tensor, zeros: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """Round weight [in, out] with scales, zeros [in / g, out]; returns (qweight, qzeros), packed."""
    groups = weight.float().unflatten(0, (-1, group_size))
    q = (groups / scales.float()[:, None]).round() + zeros[:, None]
    return pack_awq(q.clamp(0, 15).flatten(0, 1)), pack_awq(zeros)
