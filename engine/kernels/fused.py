"""RMSNorm, residual addition and SiLU x up in Triton, each also over a split-K product's partial sums.

A split-K matmul may leave fp32 sums [S, T, N]; adding them here saves a launch and a round trip. The
sum is rounded to the activations' type before anything else happens, as the matmul would have done, so
both ways agree bit for bit.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """reference.rms_norm: x [..., N] / rms(x) * weight [N]."""
    return _norm(x, None, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """reference.add_rms_norm: (rms_norm(x + residual), x + residual)."""
    return _norm(x, None, residual, weight, eps)


def add_rms_norm_partials(
    partials: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """add_rms_norm with x = the sum of partials [S, T, N] plus bias [N], in residual's type."""
    return _norm(partials, bias, residual, weight, eps)


def silu_and_mul(x: Tensor) -> Tensor:
    """reference.silu_and_mul: silu(gate) * up for x [T, 2 I], gate first. Returns [T, I]."""
    return _silu(x[None], None, x.dtype)


def silu_and_mul_partials(partials: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """silu_and_mul of the sum of partials [S, T, 2 I] plus bias [2 I], in dtype."""
    return _silu(partials, bias, dtype)


def dependent_launch(x: Tensor) -> dict[str, bool]:
    """A kernel's PDL constant, and the launch attribute that only CUDA from sm_90 on knows."""
    if not (x.is_cuda and _has_dependent_launch()):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@cache
def _has_dependent_launch() -> bool:
    return torch.cuda.get_device_capability() >= (9, 0)


def norm_launch(width: int) -> tuple[int, int]:
    """(BLOCK_N, warps): a row a program, at most 8 elements a thread up to 32 warps of 256."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 512))


def _norm(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x like residual, or partial sums of it: fp32 with one dimension more."""
    width = weight.shape[0]
    like = x if residual is None else residual
    normed = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    stream = normed if residual is None else torch.empty_like(normed)
    if normed.numel() == 0:
        return normed, stream
    rows = x.reshape(-1, normed.numel() // width, width)
    if residual is not None:
        residual = residual.reshape(-1, width)
    block, num_warps = norm_launch(width)
    add_rms_norm_kernel[(rows.shape[1],)](
        normed,
        stream,
        rows,
        normed if bias is None else bias,
        normed if residual is None else residual,
        weight,
        width,
        eps,
        rows.stride(0),
        rows.stride(1),
        0 if residual is None else residual.stride(0),
        SPLITS=rows.shape[0],
        BIASED=bias is not None,
        ADD=residual is not None,
        BLOCK_N=block,
        num_warps=num_warps,
        **dependent_launch(x),
    )
    return normed, stream


def _silu(partials: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    num_splits, num_rows, width = partials.shape
    out = torch.empty(num_rows, width // 2, dtype=dtype, device=partials.device)
    if out.numel() == 0:
        return out
    block = min(1024, triton.next_power_of_2(width // 2))
    silu_and_mul_kernel[(num_rows, triton.cdiv(width // 2, block))](
        out,
        partials,
        out if bias is None else bias,
        width // 2,
        partials.stride(0),
        partials.stride(1),
        SPLITS=num_splits,
        BIASED=bias is not None,
        BLOCK_N=block,
        num_warps=max(1, block // 256),
        **dependent_launch(partials),
    )
    return out


@triton.jit
def _read(
    x_ptr,
    bias_ptr,
    column,
    mask,
    stride_split,
    DTYPE: tl.constexpr,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
):
    """The sum of the splits in order, plus bias, rounded to DTYPE; fp32 [BLOCK_N]."""
    x = tl.load(x_ptr + column, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        x += tl.load(x_ptr + split * stride_split + column, mask=mask, other=0.0).to(tl.float32)
    if BIASED:
        x += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def add_rms_norm_kernel(
    normed_ptr,
    stream_ptr,
    x_ptr,
    bias_ptr,
    residual_ptr,
    weight_ptr,
    width,
    eps,
    stride_split,
    stride_x,
    stride_residual,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows): x [SPLITS, rows, width] (+ bias) (+ residual) -> stream; its norm -> normed."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    mask = column < width
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if PDL:  # weights are nobody's output: they may come before
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    DTYPE: tl.constexpr = normed_ptr.dtype.element_ty
    x = _read(x_ptr + row * stride_x, bias_ptr, column, mask, stride_split, DTYPE, SPLITS, BIASED)
    if ADD:
        x += tl.load(residual_ptr + row * stride_residual + column, mask=mask, other=0.0).to(
            tl.float32
        )
        x = x.to(DTYPE).to(tl.float32)
        tl.store(stream_ptr + row * width + column, x.to(DTYPE), mask=mask)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    tl.store(normed_ptr + row * width + column, (x * scale * weight).to(DTYPE), mask=mask)


@triton.jit
def silu_and_mul_kernel(
    out_ptr,
    x_ptr,
    bias_ptr,
    width,
    stride_split,
    stride_x,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows, blocks of columns): x [SPLITS, rows, 2 * width] (+ bias) -> out [rows, width]."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = column < width
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    x_ptr += row * stride_x
    gate = _read(x_ptr, bias_ptr, column, mask, stride_split, DTYPE, SPLITS, BIASED)
    up = _read(x_ptr + width, bias_ptr + width, column, mask, stride_split, DTYPE, SPLITS, BIASED)
    silu = (gate / (1.0 + tl.exp(-gate))).to(DTYPE).to(tl.float32)
    tl.store(out_ptr + row * width + column, (silu * up).to(DTYPE), mask=mask)
