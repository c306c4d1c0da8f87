"""The decoder's public ops besides matmuls: Triton on CUDA where it is right, else the reference.

A CUDA call that ends in the reference says so once for its shape; it is correct and many times slower.
Triton is imported at the first CUDA call: it takes a while, and a CPU does without.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.kv_quant import KVQuant

log = logging.getLogger(__name__)

_HAS_TRITON = find_spec("triton") is not None
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_MAX_NORM_WIDTH = 32768
_reported: set[str] = set()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See reference.rms_norm."""
    if x.is_cuda and _norm_runs(x, weight):
        from engine.kernels import fused

        return fused.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See reference.add_rms_norm."""
    if x.is_cuda and _norm_runs(residual, weight):
        from engine.kernels import fused

        return fused.add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)


def add_rms_norm_partials(
    partials: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """add_rms_norm whose x is the sum of w4a16_partials [S, T, N] plus bias [N]."""
    if partials.is_cuda and _norm_runs(residual, weight):
        from engine.kernels import fused

        return fused.add_rms_norm_partials(partials, bias, residual, weight, eps)
    return reference.add_rms_norm_partials(partials, bias, residual, weight, eps)


def silu_and_mul(x: Tensor) -> Tensor:
    """See reference.silu_and_mul."""
    if x.is_cuda and _runs(x, "silu_and_mul", _why_not_silu(x, x.dtype)):
        from engine.kernels import fused

        return fused.silu_and_mul(x)
    return reference.silu_and_mul(x)


def silu_and_mul_partials(partials: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """silu_and_mul of the sum of w4a16_partials [S, T, 2 I] plus bias [2 I], in dtype."""
    if partials.is_cuda and _runs(partials, "silu_and_mul", _why_not_silu(partials[0], dtype)):
        from engine.kernels import fused

        return fused.silu_and_mul_partials(partials, bias, dtype)
    return reference.silu_and_mul_partials(partials, bias, dtype)


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    quant: KVQuant | None = None,
) -> Tensor:
    """See reference.rotate_and_store."""
    if qkv.is_cuda:
        reason = _why_no_store(qkv, qkv.dtype, cos, k_cache, v_cache, quant)
        if _runs(qkv, "rotate_and_store", reason):
            from engine.kernels import kv_store

            return kv_store.rotate_and_store(
                qkv, cos, sin, q_norm, k_norm, eps, k_cache, v_cache, slots, quant
            )
    return reference.rotate_and_store(
        qkv, cos, sin, q_norm, k_norm, eps, k_cache, v_cache, slots, quant
    )


def rotate_and_store_partials(
    partials: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    quant: KVQuant | None = None,
) -> Tensor:
    """rotate_and_store of the sum of w4a16_partials [S, T, (H + 2 K) D] plus bias, in dtype."""
    if partials.is_cuda:
        reason = _why_no_store(partials, dtype, cos, k_cache, v_cache, quant)
        if _runs(partials, "rotate_and_store", reason):
            from engine.kernels import kv_store

            return kv_store.rotate_and_store(
                partials, cos, sin, q_norm, k_norm, eps, k_cache, v_cache, slots, quant,
                bias=bias, dtype=dtype,
            )  # fmt: skip
    qkv = reference.add_partials(partials, bias, dtype)
    return reference.rotate_and_store(
        qkv, cos, sin, q_norm, k_norm, eps, k_cache, v_cache, slots, quant
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_lens: tuple[int, ...],
    max_context_len: int,
    num_decodes: int,
    scale: float,
    window: int | None,
    quant: KVQuant | None = None,
    cu_seqlens: Tensor | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """See reference.paged_attention. cu_seqlens [B + 1] int32: query_lens summed up, on the device.

    counters: int32 zeros [B * K] or more that concurrent callers do not share; made if missing.
    """
    if q.is_cuda and _runs(q, "paged_attention", _why_no_attention(q, k_cache, v_cache, quant)):
        from engine.kernels import attention

        if cu_seqlens is None:
            ends = torch.tensor((0, *query_lens)).cumsum(0, dtype=torch.int32)
            cu_seqlens = ends.to(q.device, non_blocking=True)
        return attention.paged_attention(
            q, k_cache, v_cache, block_tables, context_lens, cu_seqlens, query_lens,
            max_context_len, num_decodes, scale, window, quant, counters,
        )  # fmt: skip
    return reference.paged_attention(
        q, k_cache, v_cache, block_tables, context_lens, query_lens, max_context_len, num_decodes,
        scale, window, quant,
    )  # fmt: skip


def _why_no_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, quant: KVQuant | None
) -> str | None:
    if not _HAS_TRITON:
        return None  # _runs says so
    from engine.kernels import attention

    return attention.supports(q, k_cache, v_cache, quant)


def _why_no_store(
    qkv: Tensor,
    dtype: torch.dtype,
    cos: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    quant: KVQuant | None,
) -> str | None:
    """None if kv_store serves this call."""
    if dtype not in _FLOATS:
        return f"activations are {dtype}"
    if k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1 or qkv.stride(-1) != 1:
        return f"strides are {qkv.stride()}, {k_cache.stride()}, {v_cache.stride()}"
    if cos.dtype != torch.float32 or not cos.is_contiguous():
        return f"cos and sin are {cos.dtype} with strides {cos.stride()}"
    if quant is None and k_cache.dtype != dtype:
        return f"the cache holds {k_cache.dtype}"
    return None


def _norm_runs(x: Tensor, weight: Tensor) -> bool:
    reason = None
    if x.dtype not in _FLOATS:
        reason = f"activations are {x.dtype}"
    elif weight.shape[0] > _MAX_NORM_WIDTH:
        reason = f"the width is over {_MAX_NORM_WIDTH}"
    return _runs(x, "rms_norm", reason)


def _why_not_silu(x: Tensor, dtype: torch.dtype) -> str | None:
    if x.dim() != 2 or x.stride(-1) != 1:
        return f"strides are {x.stride()}"
    return None if dtype in _FLOATS else f"activations are {dtype}"


def _runs(x: Tensor, name: str, reason: str | None) -> bool:
    """Whether Triton serves this CUDA call; if not, say why, once for a shape."""
    if not _HAS_TRITON:
        reason = "Triton is not installed"
    if reason is None:
        return True
    shape = f"{name} {list(x.shape[1:])} {x.dtype}"
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        # Plain torch may wait for the device, which would break the capture; this only ends it.
        raise RuntimeError(f"{shape} runs in plain torch: {reason}.")
    if shape not in _reported:
        _reported.add(shape)
        log.warning("%s runs in plain torch: %s.", shape, reason)
    return False
