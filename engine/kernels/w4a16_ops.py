"""The public W4A16 ops: Triton where it is right and fast, plain torch elsewhere, never a wrong answer.

A CUDA call that ends in plain torch says so once for its shape; it is correct and many times slower.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.w4a16_layout import PackedW4A16, dequantize_w4a16, is_packable

log = logging.getLogger(__name__)

_NO_GPU = "x is not on a GPU"
_HALVES = (torch.float16, torch.bfloat16)
_reported: set[str] = set()


def w4a16_matmul(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, bias: Tensor | None
) -> Tensor:
    """x [T, in] times an AWQ weight [in, out] as it lies on disk, plus bias [out]. Returns [T, out]."""
    if x.is_cuda:
        _report(x, qweight.shape[0], scales.shape[1], group_size, "AutoAWQ's layout has no kernel")
    return reference.w4a16_matmul(x, qweight, qzeros, scales, group_size, bias)


def w4a16_packed_matmul(x: Tensor, packed: PackedW4A16, bias: Tensor | None) -> Tensor:
    """x [T, in] times a weight in kernel layout, plus bias [out]. Returns [T, out]."""
    reason = why_no_kernel(x, packed)
    if reason is None:
        from engine.kernels import w4a16  # Triton takes a while to import and a CPU does without

        return w4a16.w4a16_packed_matmul(x, packed, bias)
    if reason != _NO_GPU:
        _report(x, packed.in_features, packed.out_features, packed.group_size, reason)
    return torch.nn.functional.linear(x, dequantize_w4a16(packed, x.dtype), bias)


def w4a16_partials(x: Tensor, packed: PackedW4A16) -> Tensor:
    """fp32 [S, T, out], whose sum over S is the product; T at most 64. See w4a16.w4a16_partials."""
    if why_no_kernel(x, packed) is None:
        from engine.kernels import w4a16

        return w4a16.w4a16_partials(x, packed)
    return torch.nn.functional.linear(x.float(), dequantize_w4a16(packed, torch.float32))[None]


def has_w4a16_kernel(
    device: torch.device, group_size: int, in_features: int, scales_dtype: torch.dtype
) -> bool:
    """Whether a weight like this should be packed at load."""
    has_triton = device.type == "cuda" and find_spec("triton") is not None
    return has_triton and is_packable(group_size, in_features, scales_dtype)


def why_no_kernel(x: Tensor, packed: PackedW4A16) -> str | None:
    """None if Triton serves this call."""
    if not x.is_cuda:
        return _NO_GPU
    if x.dtype not in _HALVES:
        return f"activations are {x.dtype}"
    if x.dtype != packed.dtype:
        return f"activations are {x.dtype} and scales {packed.dtype}"
    return None


def _report(x: Tensor, k: int, n: int, group_size: int, reason: str) -> None:
    shape = f"[{k}, {n}], group size {group_size}, {x.dtype}"
    if x.is_cuda and torch.cuda.is_current_stream_capturing():  # see decoder_ops._runs
        raise RuntimeError(f"W4A16 {shape} runs in plain torch: {reason}.")
    if shape not in _reported:
        _reported.add(shape)
        log.warning("W4A16 %s runs in plain torch: %s.", shape, reason)
