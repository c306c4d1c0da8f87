"""From the fused qkv product to rotated queries and a written KV cache, in one launch.

Bias, QK norm, rotation, quantization and the scatter to slots happen on one read of qkv. It may come as
the fp32 partial sums of a split-K product, which are added on the way in. A program owns some rows of
one head; a row's partner half (i and i + D / 2 rotate together) is read a second time instead of shuffled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.fused import dependent_launch
from engine.kernels.kv_quant import CalibratedKV, KVQuant, OnlineKV


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
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """reference.rotate_and_store. Returns q [T, H, D].

    qkv is [T, (H + 2 K) D], or fp32 partial sums [S, T, (H + 2 K) D] to which bias is added before
    rounding to dtype.
    """
    partials = qkv if qkv.dim() == 3 else qkv[None]
    dtype = dtype or qkv.dtype
    num_splits, num_rows, width = partials.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    head_size = cos.shape[1]
    num_heads = width // head_size - 2 * num_kv_heads
    q = torch.empty(num_rows, num_heads, head_size, dtype=dtype, device=qkv.device)
    if num_rows == 0:
        return q
    form, bits = "plain", 16
    k_params = v_params = k_scale = k_zero = v_scale = v_zero = q
    param_strides = (0, 0, 0)
    if isinstance(quant, OnlineKV):
        form, bits = "online", quant.bits
        k_params, v_params = quant.k_params, quant.v_params
        param_strides = k_params.stride()[:3]
    elif isinstance(quant, CalibratedKV):
        form, bits = "calibrated", quant.bits
        k_scale, k_zero = quant.k_scale, quant.k_zero
        v_scale, v_zero = quant.v_scale, quant.v_zero
    block_t, num_warps = (1, 1) if num_rows <= 64 else (8, 4)
    grid = (triton.cdiv(num_rows, block_t), num_heads + 2 * num_kv_heads)
    rotate_and_store_kernel[grid](
        q,
        partials,
        q if bias is None else bias,
        cos,
        sin,
        q if q_norm is None else q_norm,
        q if k_norm is None else k_norm,
        k_cache,
        v_cache,
        k_params,
        v_params,
        k_scale,
        k_zero,
        v_scale,
        v_zero,
        slots,
        num_rows,
        eps,
        partials.stride(0),
        partials.stride(1),
        *k_cache.stride()[:3],
        *param_strides,
        SPLITS=num_splits,
        BIASED=bias is not None,
        NORMED=q_norm is not None,
        FORM=form,
        BITS=bits,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_SIZE=head_size,
        BLOCK_D=triton.next_power_of_2(head_size),
        BLOCK_SIZE=block_size,
        BLOCK_T=block_t,
        num_warps=num_warps,
        **dependent_launch(qkv),
    )
    return q


@triton.jit
def _read(
    qkv_ptr,
    bias_ptr,
    offset,
    bias_offset,
    mask,
    stride_split,
    DTYPE: tl.constexpr,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
):
    """The sum of the splits plus bias, rounded to DTYPE as the product itself would be; fp32."""
    x = tl.load(qkv_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        x += tl.load(qkv_ptr + offset + split * stride_split, mask=mask, other=0.0)
    if BIASED:
        x += tl.load(bias_ptr + bias_offset, mask=mask, other=0.0).to(tl.float32)
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _normed(x, scale, weight_ptr, column, column_ok, DTYPE: tl.constexpr):
    weight = tl.load(weight_ptr + column, mask=column_ok, other=0.0).to(tl.float32)
    return (x * scale[:, None] * weight[None, :]).to(DTYPE).to(tl.float32)


@triton.jit
def _steps(x, scale, zero, BITS: tl.constexpr):
    """kv_quant.quantize without the packing; int32."""
    q = tl.where(scale > 0, (x - zero) / tl.where(scale > 0, scale, 1.0), 0.0)
    return tl.minimum(tl.maximum(tl.floor(q + 0.5), 0.0), 2.0**BITS - 1).to(tl.int32)


@triton.jit
def _store(
    x,
    partner,
    cache_ptr,
    params_ptr,
    scale_ptr,
    zero_ptr,
    kv_head,
    block,
    offset,
    row_ok,
    column,
    column_ok,
    other_column,
    stride_block: tl.constexpr,
    stride_slot: tl.constexpr,
    stride_head: tl.constexpr,
    stride_param_block: tl.constexpr,
    stride_param_slot: tl.constexpr,
    stride_param_head: tl.constexpr,
    FORM: tl.constexpr,
    BITS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    """Rows x [BLOCK_T, BLOCK_D] to their slots; partner holds the channels half a head away."""
    address = cache_ptr + (block * stride_block + offset * stride_slot)[:, None] + column[None, :]
    address += kv_head * stride_head
    if FORM == "plain":
        mask = row_ok[:, None] & column_ok[None, :]
        tl.store(address, x.to(cache_ptr.dtype.element_ty), mask=mask)
    else:
        if FORM == "online":
            low = tl.min(tl.where(column_ok[None, :], x, float("inf")), 1)
            high = tl.max(tl.where(column_ok[None, :], x, float("-inf")), 1)
            half_scale = ((high - low) / (2.0**BITS - 1)).to(tl.float16)
            half_zero = low.to(tl.float16)
            param = params_ptr + block * stride_param_block + offset * stride_param_slot
            param += kv_head * stride_param_head
            tl.store(param, half_scale, mask=row_ok)
            tl.store(param + 1, half_zero, mask=row_ok)
            scale, zero = half_scale.to(tl.float32)[:, None], half_zero.to(tl.float32)[:, None]
            other_scale, other_zero = scale, zero
        else:
            table = kv_head * HEAD_SIZE
            scale = tl.load(scale_ptr + table + column, mask=column_ok, other=1.0)[None, :]
            zero = tl.load(zero_ptr + table + column, mask=column_ok, other=0.0)[None, :]
            other_scale = tl.load(scale_ptr + table + other_column, mask=column_ok, other=1.0)[
                None, :
            ]
            other_zero = tl.load(zero_ptr + table + other_column, mask=column_ok, other=0.0)[
                None, :
            ]
        q = _steps(x, scale, zero, BITS)
        WIDTH: tl.constexpr = HEAD_SIZE * BITS // 8
        if BITS == 4:
            q |= _steps(partner, other_scale, other_zero, BITS) << 4
        mask = row_ok[:, None] & (column < WIDTH)[None, :]
        tl.store(address, q.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=("num_rows",))
def rotate_and_store_kernel(
    q_ptr,
    qkv_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_params_ptr,
    v_params_ptr,
    k_scale_ptr,
    k_zero_ptr,
    v_scale_ptr,
    v_zero_ptr,
    slots_ptr,
    num_rows,
    eps,
    stride_split,
    stride_row,
    stride_block: tl.constexpr,
    stride_slot: tl.constexpr,
    stride_head: tl.constexpr,
    stride_param_block: tl.constexpr,
    stride_param_slot: tl.constexpr,
    stride_param_head: tl.constexpr,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    NORMED: tl.constexpr,
    FORM: tl.constexpr,
    BITS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (blocks of rows, H + 2 K): q heads, then k heads, then v heads, as they lie in qkv."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    head = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_ok = row < num_rows
    column = tl.arange(0, BLOCK_D)
    column_ok = column < HEAD_SIZE
    half: tl.constexpr = HEAD_SIZE // 2
    other_column = tl.where(column < half, column + half, column - half)
    mask = row_ok[:, None] & column_ok[None, :]
    start = (row * stride_row + head * HEAD_SIZE)[:, None]
    bias_start = (head * HEAD_SIZE + tl.zeros((BLOCK_T,), tl.int32))[:, None]
    x = _read(
        qkv_ptr, bias_ptr, start + column[None, :], bias_start + column[None, :], mask, stride_split,
        DTYPE, SPLITS, BIASED,
    )  # fmt: skip
    partner = _read(
        qkv_ptr, bias_ptr, start + other_column[None, :], bias_start + other_column[None, :], mask,
        stride_split, DTYPE, SPLITS, BIASED,
    )  # fmt: skip
    if head < NUM_HEADS + NUM_KV_HEADS:
        if NORMED:
            scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / HEAD_SIZE + eps)
            norm_ptr = q_norm_ptr
            if head >= NUM_HEADS:
                norm_ptr = k_norm_ptr
            x = _normed(x, scale, norm_ptr, column, column_ok, DTYPE)
            partner = _normed(partner, scale, norm_ptr, other_column, column_ok, DTYPE)
        angle = (row * HEAD_SIZE)[:, None]
        cos = tl.load(cos_ptr + angle + column[None, :], mask=mask, other=0.0)
        sin = tl.load(sin_ptr + angle + column[None, :], mask=mask, other=0.0)
        rotated = x * cos + partner * sin
        if BITS == 4:
            cos = tl.load(cos_ptr + angle + other_column[None, :], mask=mask, other=0.0)
            sin = tl.load(sin_ptr + angle + other_column[None, :], mask=mask, other=0.0)
            partner = (partner * cos + x * sin).to(DTYPE).to(tl.float32)
        x = rotated.to(DTYPE).to(tl.float32)
    if head < NUM_HEADS:
        address = q_ptr + ((row * NUM_HEADS + head) * HEAD_SIZE)[:, None] + column[None, :]
        tl.store(address, x.to(DTYPE), mask=mask)
        return
    slot = tl.load(slots_ptr + row, mask=row_ok, other=-1)
    row_ok = slot >= 0
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    kv_head = head - NUM_HEADS
    if kv_head < NUM_KV_HEADS:
        _store(
            x, partner, k_cache_ptr, k_params_ptr, k_scale_ptr, k_zero_ptr, kv_head, block, offset,
            row_ok, column, column_ok, other_column, stride_block, stride_slot, stride_head,
            stride_param_block, stride_param_slot, stride_param_head, FORM, BITS, HEAD_SIZE,
        )  # fmt: skip
    else:
        _store(
            x, partner, v_cache_ptr, v_params_ptr, v_scale_ptr, v_zero_ptr, kv_head - NUM_KV_HEADS,
            block, offset, row_ok, column, column_ok, other_column, stride_block, stride_slot,
            stride_head, stride_param_block, stride_param_slot, stride_param_head, FORM, BITS,
            HEAD_SIZE,
        )  # fmt: skip
