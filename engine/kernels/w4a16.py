"""W4A16 matmul in Triton: out[M, N] = x[M, K] @ dequant(w)[N, K]^T, for M from one to thousands.

The weight tile is the left operand (out^T = W x^T), so dequantized int4 feeds the tensor cores from
registers and never passes through shared memory; unpacking is one LOP3 per two weights on numbers
whose exponent is already in place (Kim et al. 2022, Marlin 2024). Weights lie tile by tile, so a
program reads one contiguous stretch. Four regimes (launch_config chooses):

warps      M <= 4: a program's warps share out the K axis and add up on the multiprocessor.
split      M <= 32: the K axis is split over programs. The last program of a tile to arrive adds the
           partial sums in a fixed order, or w4a16_partials leaves them to the kernel that follows.
stream     M <= MAX_STREAM_ROWS: every program takes an equal run of K blocks over all tiles
           (stream-K, Osama et al. 2023), so no multiprocessor idles in a last wave.
workspace  beyond: dequantize some rows into a workspace that stays in L2, multiply by cuBLAS, go on.

There is no autotuning: launch_config is one function, and tests/bench/bench_kernels.py --sweep prints
what it should say.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.w4a16_layout import BLOCK_K, TILE_N, PackedW4A16

MAX_STREAM_ROWS = 768
_WORKSPACE_BYTES = 36 << 20  # of the 60 MB of L2; the rest is for x and the output
_H200_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class LaunchConfig:
    """How one shape is launched. programs counts the stream regime's runs; split_k the split regime's.

    scaled: scales multiply the weights (rounded to x's type) and not the partial products (fp32).
    prefetch_lines: lines of 128 bytes that a program asks L2 for while the kernel before drains.
    """

    regime: Literal["warps", "split", "stream", "workspace"]
    block_n: int = 128
    block_m: int = 16
    split_k: int = 1
    programs: int = 0
    num_warps: int = 4
    num_stages: int = 3
    scaled: bool = False
    prefetch_lines: int = 0
    max_registers: int | None = None
    pdl: bool = True


@cache
def launch_config(
    m: int, n: int, k: int, multiprocessors: int = _H200_MULTIPROCESSORS
) -> LaunchConfig:
    """The launch for out [m, n] with a weight [n, k].

    Compiled for sm_90 (triton 3.6): scales go into the weights where M tiles are so wide that scaled
    sums would not fit the registers. 128 x 128 with 4 warps takes 255 registers, two programs a
    multiprocessor; 128 x 256 with 8 warps the same, one.
    """
    tiles, num_blocks = -(-n // TILE_N), -(-k // BLOCK_K)
    if m <= 4:
        narrow = n < 32 * 5 * multiprocessors // 2
        return LaunchConfig(
            "warps",
            block_n=16 if narrow else 32,
            block_m=8,
            num_warps=8 if narrow else 4,
            num_stages=4 if narrow else 3,
            prefetch_lines=128,
        )
    if m <= 32:
        return split_config(m, n, k, multiprocessors)
    if m <= MAX_STREAM_ROWS:
        wide = m > 64 and -(-m // 256) * 2 <= -(-m // 128)  # no more than a tile of 128 would cover
        block_m = 64 if m <= 64 else 256 if wide else 128
        total = tiles * -(-m // block_m) * num_blocks
        return LaunchConfig(
            "stream",
            block_m=block_m,
            programs=min(total, multiprocessors * (1 if wide else 2)),
            num_warps=8 if wide else 4,
            scaled=True,
            prefetch_lines=128,
        )
    return LaunchConfig("workspace")


@cache
def split_config(
    m: int, n: int, k: int, multiprocessors: int = _H200_MULTIPROCESSORS
) -> LaunchConfig:
    """The split regime for M <= 64.

    Measured on an H200 (torch 2.11, triton 3.6), CUDA-graph replays over more than 300 MB of weights,
    Llama-2-7B shapes: BN 128, 4 warps and 3 stages, with SPLIT_K 4 (qkv), 8 (o), 3 (gate_up) and 11
    (down), were best at M = 1 to 32; BN 256, 8 warps and an L2 prefetch of the whole slice were slower.
    The rule yields these four: three programs a multiprocessor, of at least four K blocks. At M = 64
    registers leave room for two. 32 rows take 184 registers unless capped, which fits two, not three.
    Scaled weights here make ptxas run one wgmma at a time (C7515).
    """
    tiles, num_blocks = -(-n // TILE_N), -(-k // BLOCK_K)
    block_m = 8 if m <= 8 else max(16, triton.next_power_of_2(m))
    programs = (
        2 * multiprocessors // tiles if block_m == 64 else -(-29 * multiprocessors // (10 * tiles))
    )
    per = -(-num_blocks // max(1, min(programs, num_blocks // 4)))
    return LaunchConfig(
        "split",
        block_m=block_m,
        split_k=-(-num_blocks // per),
        prefetch_lines=128,
        max_registers=168 if block_m == 32 else None,
    )


def w4a16_packed_matmul(
    x: Tensor, packed: PackedW4A16, bias: Tensor | None, config: LaunchConfig | None = None
) -> Tensor:
    """x [M, K] times a packed weight, plus bias [N]. Returns [M, N] of x's type; M may be 0."""
    x = _checked(x, packed, bias)
    if x.shape[0] == 0:
        return x.new_empty(0, packed.out_features)
    if config is None:
        m, n, k = x.shape[0], packed.out_features, packed.in_features
        config = launch_config(m, n, k, _multiprocessors_of(x))
    if config.regime == "warps":
        return _launch_warps(x, packed, bias, config, x.dtype)
    if config.regime == "split":
        return _launch_split(x, packed, bias, config, reduce=True)
    if config.regime == "stream":
        return _launch_stream(x, packed, bias, config)
    return _by_workspace(x, packed, bias)


def w4a16_partials(x: Tensor, packed: PackedW4A16, config: LaunchConfig | None = None) -> Tensor:
    """fp32 [S, M, N] whose sum over S is x times the weight, for a next kernel that adds while it loads.

    M at most 64. S depends on the shape and M's power of two only, so a captured graph keeps it. The
    consumer adds the S planes in order, then the bias, and rounds to x's type: up to 32 rows that is bit
    for bit what w4a16_packed_matmul returns. Under programmatic dependent launch the consumer must wait
    (gdc_wait) before it reads.
    """
    x = _checked(x, packed, None)
    m, n, k = x.shape[0], packed.out_features, packed.in_features
    if not 0 < m <= 64:
        raise ValueError(f"x has {m} rows; partial sums exist for 1 to 64.")
    if config is None:
        choose = launch_config if m <= 4 else split_config
        config = choose(m, n, k, _multiprocessors_of(x))
    if config.regime == "warps":
        return _launch_warps(x, packed, None, config, torch.float32)[None]
    return _launch_split(x, packed, None, config, reduce=False)


def dequantize_rows(packed: PackedW4A16, first: int, out: Tensor) -> None:
    """Weight rows first ... first + out.shape[0] - 1 -> out [rows, K]; first is a multiple of 128."""
    rows, k = out.shape
    if first % TILE_N or k != packed.in_features or not out.is_contiguous():
        raise ValueError(
            f"out is {list(out.shape)} from row {first}; expected contiguous "
            f"[rows, {packed.in_features}] from a multiple of {TILE_N}."
        )
    grid = (packed.num_blocks, -(-rows // TILE_N))
    w4a16_dequantize_kernel[grid](
        packed.tiles, packed.scale_zeros, out, first // TILE_N, rows, k, packed.num_blocks,
        packed.scale_zeros.shape[1], packed.group_blocks,
        GROUP=_group_mode(packed), UNPACK=_unpack_mode(out), num_warps=4,
    )  # fmt: skip


def _launch_warps(
    x: Tensor,
    packed: PackedW4A16,
    bias: Tensor | None,
    config: LaunchConfig,
    out_dtype: torch.dtype,
) -> Tensor:
    m, n, k = x.shape[0], packed.out_features, packed.in_features
    out = x.new_empty(m, n, dtype=out_dtype)
    w4a16_warps_kernel[(-(-n // config.block_n),)](
        x, packed.tiles, packed.scale_zeros, bias, out,
        m, n, k, x.stride(0), packed.num_blocks, packed.scale_zeros.shape[1], packed.group_blocks,
        BN=config.block_n, BM=config.block_m, WARPS=config.num_warps, GROUP=_group_mode(packed),
        UNPACK=_unpack_mode(x), STAGES=config.num_stages, HAS_BIAS=bias is not None,
        PREFETCH_LINES=config.prefetch_lines, num_warps=config.num_warps, **_launch_options(x, config),
    )  # fmt: skip
    return out


def _launch_split(
    x: Tensor, packed: PackedW4A16, bias: Tensor | None, config: LaunchConfig, *, reduce: bool
) -> Tensor:
    m, n, k = x.shape[0], packed.out_features, packed.in_features
    out = x.new_empty(m, n) if reduce else None
    mode = ("whole" if config.split_k == 1 else "last") if reduce else "none"
    partial = None
    if mode != "whole":
        partial = x.new_empty(config.split_k, m, n, dtype=torch.float32)
    grid = (-(-n // config.block_n), config.split_k, -(-m // config.block_m))
    w4a16_split_kernel[grid](
        x, packed.tiles, packed.scale_zeros, bias, out, partial, packed.locks,
        m, n, k, x.stride(0), packed.num_blocks, packed.scale_zeros.shape[1],
        packed.group_blocks,
        BN=config.block_n, BM=config.block_m, GROUP=_group_mode(packed),
        EVEN_K=k % BLOCK_K == 0, SCALED=config.scaled, UNPACK=_unpack_mode(x),
        STAGES=config.num_stages, REDUCE=mode, HAS_BIAS=bias is not None,
        PREFETCH_LINES=config.prefetch_lines, num_warps=config.num_warps, **_launch_options(x, config),
    )  # fmt: skip
    return out if reduce else partial


def _launch_stream(
    x: Tensor, packed: PackedW4A16, bias: Tensor | None, config: LaunchConfig
) -> Tensor:
    m, n, k = x.shape[0], packed.out_features, packed.in_features
    tiles_m, block_n, block_m = -(-m // config.block_m), config.block_n, config.block_m
    num_tiles = -(-n // block_n) * tiles_m
    programs = max(1, min(config.programs, num_tiles * packed.num_blocks))
    out = x.new_empty(m, n)
    partial = x.new_empty(programs, 2, block_m, block_n, dtype=torch.float32)
    w4a16_stream_kernel[(programs,)](
        x, packed.tiles, packed.scale_zeros, bias, out, partial, packed.locks,
        m, n, k, x.stride(0), packed.num_blocks, packed.scale_zeros.shape[1],
        packed.group_blocks, num_tiles, tiles_m,
        BN=block_n, BM=block_m, GROUP=_group_mode(packed), EVEN_K=k % BLOCK_K == 0,
        SCALED=config.scaled, UNPACK=_unpack_mode(x), STAGES=config.num_stages,
        HAS_BIAS=bias is not None, PREFETCH_LINES=config.prefetch_lines,
        num_warps=config.num_warps, **_launch_options(x, config),
    )  # fmt: skip
    return out


def _by_workspace(x: Tensor, packed: PackedW4A16, bias: Tensor | None) -> Tensor:
    """Rows of the weight, as many as stay in L2, are dequantized and multiplied at once by cuBLAS."""
    n, k = packed.out_features, packed.in_features
    step = workspace_rows(n, k)
    out, workspace = x.new_empty(x.shape[0], n), x.new_empty(step, k)
    for first in range(0, n, step):
        weight = workspace[: min(step, n - first)]
        dequantize_rows(packed, first, weight)
        part = out[:, first : first + step]
        if bias is None:
            torch.mm(x, weight.T, out=part)
        else:
            torch.addmm(bias[first : first + step], x, weight.T, out=part)
    return out


def workspace_rows(n: int, k: int, workspace_bytes: int = _WORKSPACE_BYTES) -> int:
    """Even pieces of whole tiles, at least 2,048 rows so that cuBLAS fills the multiprocessors."""
    most = max(2048, workspace_bytes // (2 * k))
    pieces = -(-n // most)
    return -(-n // (pieces * TILE_N)) * TILE_N


def _checked(x: Tensor, packed: PackedW4A16, bias: Tensor | None) -> Tensor:
    if x.dim() != 2 or x.shape[1] != packed.in_features:
        raise ValueError(f"x has shape {list(x.shape)}; expected [M, {packed.in_features}].")
    if bias is not None and bias.shape != (packed.out_features,):
        raise ValueError(f"bias has shape {list(bias.shape)}; expected [{packed.out_features}].")
    return x if x.stride(1) == 1 else x.contiguous()


def _multiprocessors_of(x: Tensor) -> int:
    return _multiprocessors(x.device.index) if x.is_cuda else _H200_MULTIPROCESSORS


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _has_dependent_launch() -> bool:
    return torch.cuda.get_device_capability() >= (9, 0)


def _launch_options(x: Tensor, config: LaunchConfig) -> dict[str, object]:
    """The constant PDL, and what only CUDA knows."""
    if not x.is_cuda:
        return {"PDL": False}
    options: dict[str, object] = {"PDL": False}
    if config.pdl and _has_dependent_launch():
        options = {"PDL": True, "launch_pdl": True}
    if config.max_registers is not None:
        options["maxnreg"] = config.max_registers
    return options


def _group_mode(packed: PackedW4A16) -> int | str:
    """Groups a K block holds a whole number of, by size; "blocks" for those that span K blocks."""
    return packed.group_size if packed.group_size in (32, 64, BLOCK_K) else "blocks"


def _unpack_mode(x: Tensor) -> str:
    """Inline assembly is not interpreted."""
    return "asm" if x.is_cuda else "shifts"


# One packed word -> four pairs of values minus their zero points. Nibbles j of both halves form pair j.
# fp16: 0x6400 | q is 1024 + q; nibbles 1 and 3 stay in place and arrive times 16, divided by the fma.
# $9 to $12 are what to subtract (even pairs) or add (odd pairs); zero_constants makes them.
_UNPACK_FP16 = """
lop3.b32 q0, $8, 0x000f000f, 0x64006400, 0xEA;
lop3.b32 q1, $8, 0x00f000f0, 0x64006400, 0xEA;
shr.u32 t, $8, 8;
lop3.b32 q2, t, 0x000f000f, 0x64006400, 0xEA;
lop3.b32 q3, t, 0x00f000f0, 0x64006400, 0xEA;
mov.b32 u, 0x2c002c00;
sub.rn.f16x2 q0, q0, $9;
fma.rn.f16x2 q1, q1, u, $10;
sub.rn.f16x2 q2, q2, $11;
fma.rn.f16x2 q3, q3, u, $12;
"""
# bf16 has room for one nibble: 0x4300 | q is 128 + q.
_UNPACK_BF16 = """
lop3.b32 q0, $8, 0x000f000f, 0x43004300, 0xEA;
shr.u32 t, $8, 4;
lop3.b32 q1, t, 0x000f000f, 0x43004300, 0xEA;
shr.u32 t, $8, 8;
lop3.b32 q2, t, 0x000f000f, 0x43004300, 0xEA;
shr.u32 t, $8, 12;
lop3.b32 q3, t, 0x000f000f, 0x43004300, 0xEA;
sub.rn.bf16x2 q0, q0, $9;
sub.rn.bf16x2 q1, q1, $10;
sub.rn.bf16x2 q2, q2, $11;
sub.rn.bf16x2 q3, q3, $12;
"""
_SCALE = """
mul.rn.{t} q0, q0, $13;
mul.rn.{t} q1, q1, $14;
mul.rn.{t} q2, q2, $15;
mul.rn.{t} q3, q3, $16;
"""
_SPLIT_PAIRS = """
mov.b32 {$0, $1}, q0;
mov.b32 {$2, $3}, q1;
mov.b32 {$4, $5}, q2;
mov.b32 {$6, $7}, q3;
}"""
_ENTER = "{\n.reg .b32 t, q0, q1, q2, q3, u;"
ASM_FP16 = tl.constexpr(_ENTER + _UNPACK_FP16 + _SPLIT_PAIRS)
ASM_BF16 = tl.constexpr(_ENTER + _UNPACK_BF16 + _SPLIT_PAIRS)
ASM_FP16_SCALED = tl.constexpr(_ENTER + _UNPACK_FP16 + _SCALE.format(t="f16x2") + _SPLIT_PAIRS)
ASM_BF16_SCALED = tl.constexpr(_ENTER + _UNPACK_BF16 + _SCALE.format(t="bf16x2") + _SPLIT_PAIRS)
ASM_ARGS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r,r,r,r")
PREFETCH = tl.constexpr("{ prefetch.global.L2 [$1]; mov.b32 $0, 0; }")


@triton.jit
def zero_pair(sz, DTYPE: tl.constexpr, ODD: tl.constexpr):
    """What to take from a pair of unpacked values: the zero point twice, with the exponent of DTYPE."""
    zero = (sz >> 16) & 0xF
    pair = zero | (zero << 16)
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        return pair | 0x43004300  # 128 + zero
    elif ODD:
        return (pair << 4) | (-0x2BFF2C00)  # 0xD400D400: -(64 + zero)
    else:
        return pair | 0x64006400  # 1024 + zero


@triton.jit
def scale_of(sz, DTYPE: tl.constexpr):
    """The low half of a scale-and-zero word, as DTYPE."""
    return (sz & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def scale_pair(sz):
    """The low half twice."""
    low = sz & 0xFFFF
    return low | (low << 16)


@triton.jit
def unpack_by_shifts(
    w, sz, J: tl.constexpr, DTYPE: tl.constexpr, SCALE: tl.constexpr, SCALED: tl.constexpr
):
    """Pair j of each word as two tensors, in plain arithmetic."""
    zero = (sz >> 16) & 0xF
    low = (((w >> (4 * J)) & 0xF) - zero).to(tl.float32)
    high = (((w >> (4 * J + 16)) & 0xF) - zero).to(tl.float32)
    if SCALED:
        scale = scale_of(sz, SCALE).to(tl.float32)
        low, high = low * scale, high * scale
    return low.to(DTYPE), high.to(DTYPE)


@triton.jit
def dequantize_block(
    w, sz0, sz1, sz2, sz3,
    BN: tl.constexpr, DTYPE: tl.constexpr, SCALE: tl.constexpr,
    SCALED: tl.constexpr, UNPACK: tl.constexpr,
):  # fmt: skip
    """w int32 [BN, 16] -> four [BN, 32] of DTYPE, k = 32 j ... 32 j + 31, with one sz [BN] for each.

    SCALED False leaves (q - zero), which is exact; True multiplies it by the scale and rounds.
    """
    sz0, sz1, sz2, sz3 = sz0[:, None], sz1[:, None], sz2[:, None], sz3[:, None]
    if UNPACK == "asm":
        z0, z1 = zero_pair(sz0, DTYPE, False), zero_pair(sz1, DTYPE, True)
        z2, z3 = zero_pair(sz2, DTYPE, False), zero_pair(sz3, DTYPE, True)
        s0, s1, s2, s3 = scale_pair(sz0), scale_pair(sz1), scale_pair(sz2), scale_pair(sz3)
        if DTYPE == tl.bfloat16:  # noqa: SIM300
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                ASM_BF16_SCALED if SCALED else ASM_BF16,
                ASM_ARGS, [w, z0, z1, z2, z3, s0, s1, s2, s3],
                dtype=(tl.bfloat16,) * 8, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                ASM_FP16_SCALED if SCALED else ASM_FP16,
                ASM_ARGS, [w, z0, z1, z2, z3, s0, s1, s2, s3],
                dtype=(tl.float16,) * 8, is_pure=True, pack=1,
            )  # fmt: skip
    else:
        a, b = unpack_by_shifts(w, sz0, 0, DTYPE, SCALE, SCALED)
        c, d = unpack_by_shifts(w, sz1, 1, DTYPE, SCALE, SCALED)
        e, f = unpack_by_shifts(w, sz2, 2, DTYPE, SCALE, SCALED)
        g, h = unpack_by_shifts(w, sz3, 3, DTYPE, SCALE, SCALED)
    w0 = tl.join(a, b).reshape(BN, 32)
    w1 = tl.join(c, d).reshape(BN, 32)
    w2 = tl.join(e, f).reshape(BN, 32)
    w3 = tl.join(g, h).reshape(BN, 32)
    return w0, w1, w2, w3


@triton.jit
def load_scales(sz_ptr, rows, block, group_blocks, GROUP: tl.constexpr):
    """The four scale-and-zero words [BN] of a K block; GROUP "blocks" is group_blocks * 128."""
    if GROUP == "blocks":
        sz = tl.load(sz_ptr + (block // group_blocks) * 128 + rows)
        return sz, sz, sz, sz
    elif GROUP == 128:
        sz = tl.load(sz_ptr + block * 128 + rows)
        return sz, sz, sz, sz
    elif GROUP == 64:
        first = tl.load(sz_ptr + (2 * block) * 128 + rows)
        second = tl.load(sz_ptr + (2 * block + 1) * 128 + rows)
        return first, first, second, second
    else:
        sz0 = tl.load(sz_ptr + (4 * block) * 128 + rows)
        sz1 = tl.load(sz_ptr + (4 * block + 1) * 128 + rows)
        sz2 = tl.load(sz_ptr + (4 * block + 2) * 128 + rows)
        sz3 = tl.load(sz_ptr + (4 * block + 3) * 128 + rows)
        return sz0, sz1, sz2, sz3


@triton.jit
def load_x(x, k, K, row, EVEN_K: tl.constexpr):
    """32 columns of x, transposed: [32, BM]; k [32] are the columns."""
    if EVEN_K:
        return tl.load(x, mask=row, other=0.0)
    else:
        return tl.load(x, mask=row & (k < K)[:, None], other=0.0)


@triton.jit
def multiply(w, x, acc, WARPS: tl.constexpr, BN: tl.constexpr):
    """acc + w x: [BN, 32] by [32, BM], or that for each warp: [WARPS * BN, 32] by [WARPS, 32, BM]."""
    if WARPS > 1:
        return tl.dot(w.reshape(WARPS, BN, 32), x, acc, input_precision="ieee")
    else:
        return tl.dot(w, x, acc, input_precision="ieee")


@triton.jit
def scale_sums(p, sz, WARPS: tl.constexpr, BN: tl.constexpr, SCALE: tl.constexpr):
    """Products times their row's scale."""
    scale = scale_of(sz, SCALE).to(tl.float32)
    if WARPS > 1:
        return p * scale.reshape(WARPS, BN)[:, :, None]
    else:
        return p * scale[:, None]


@triton.jit
def multiply_block(
    acc, w0, w1, w2, w3, x0, x1, x2, x3, sz0, sz1, sz2, sz3,
    WARPS: tl.constexpr, BN: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """acc plus one K block; products are scaled group by group unless the weights already are."""
    if SCALED:
        acc = multiply(w0, x0, acc, WARPS, BN)
        acc = multiply(w1, x1, acc, WARPS, BN)
        acc = multiply(w2, x2, acc, WARPS, BN)
        return multiply(w3, x3, acc, WARPS, BN)
    else:
        zeros = tl.zeros_like(acc)
        p = multiply(w0, x0, zeros, WARPS, BN)
        if GROUP == 32:
            acc += scale_sums(p, sz0, WARPS, BN, SCALE)
            p = zeros
        p = multiply(w1, x1, p, WARPS, BN)
        if GROUP == 32 or GROUP == 64:
            acc += scale_sums(p, sz1, WARPS, BN, SCALE)
            p = zeros
        p = multiply(w2, x2, p, WARPS, BN)
        if GROUP == 32:
            acc += scale_sums(p, sz2, WARPS, BN, SCALE)
            p = zeros
        p = multiply(w3, x3, p, WARPS, BN)
        return acc + scale_sums(p, sz3, WARPS, BN, SCALE)


@triton.jit
def accumulate(
    acc, x_ptr, w_ptr, sz_ptr, tile_n, m0, n0, first, end,
    M, K, stride_x, num_blocks, num_groups, group_blocks,
    BN: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr,
    SCALED: tl.constexpr, UNPACK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """acc [BN, BM] plus W[:, K blocks first ... end - 1] times x^T; n0 is the first row inside the tile."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    scale: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float16
    rows = n0 + tl.arange(0, BN)
    k32 = tl.arange(0, 32)
    m = m0 + tl.arange(0, BM)
    row = m[None, :] < M
    w_tile = w_ptr + tile_n.to(tl.int64) * num_blocks * 2048  # 128 rows of 16 words
    w_tile += rows[:, None] * 16 + tl.arange(0, 16)[None, :]
    sz_tile = sz_ptr + tile_n.to(tl.int64) * num_groups * 128
    x_tile = x_ptr + m[None, :].to(tl.int64) * stride_x + k32[:, None]
    for block in tl.range(first, end, num_stages=STAGES):
        w = tl.load(w_tile + block * 2048, eviction_policy="evict_first")
        sz0, sz1, sz2, sz3 = load_scales(sz_tile, rows, block, group_blocks, GROUP)
        k = block * 128 + k32
        x = x_tile + block * 128
        x0 = load_x(x, k, K, row, EVEN_K)
        x1 = load_x(x + 32, k + 32, K, row, EVEN_K)
        x2 = load_x(x + 64, k + 64, K, row, EVEN_K)
        x3 = load_x(x + 96, k + 96, K, row, EVEN_K)
        w0, w1, w2, w3 = dequantize_block(w, sz0, sz1, sz2, sz3, BN, dtype, scale, SCALED, UNPACK)
        acc = multiply_block(
            acc, w0, w1, w2, w3, x0, x1, x2, x3, sz0, sz1, sz2, sz3,
            1, BN, scale, GROUP, SCALED,
        )  # fmt: skip
    return acc


@triton.jit
def store_out(acc, out_ptr, bias_ptr, n, m, M, N, HAS_BIAS: tl.constexpr):
    """acc [BN, BM] plus bias -> out[m, n]."""
    inside = (m[None, :] < M) & (n[:, None] < N)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = out_ptr + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def prefetch_weights(
    w_ptr, tile_n, n0, first, num_blocks, BN: tl.constexpr, LINES: tl.constexpr
):  # fmt: skip
    """Ask L2 for the first lines of a program's weights: they do not depend on the kernel before."""
    line = tl.arange(0, LINES)  # of 128 bytes: two rows of a block
    at = (tile_n.to(tl.int64) * num_blocks + first + line // (BN // 2)) * 2048
    at += n0 * 16 + (line % (BN // 2)) * 32
    last = (tile_n.to(tl.int64) + 1) * num_blocks * 2048 - 32
    address = (w_ptr + tl.minimum(at, last)).to(tl.int64)
    tl.inline_asm_elementwise(PREFETCH, "=r,l", [address], tl.int32, is_pure=False, pack=1)


@triton.jit(do_not_specialize=("M", "num_blocks", "num_groups", "group_blocks"))
def w4a16_warps_kernel(
    x_ptr, w_ptr, sz_ptr, bias_ptr, out_ptr,
    M, N, K, stride_x, num_blocks, num_groups, group_blocks,
    BN: tl.constexpr, BM: tl.constexpr, WARPS: tl.constexpr, GROUP: tl.constexpr,
    UNPACK: tl.constexpr, STAGES: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
):  # fmt: skip
    """Grid (N / BN,). Each warp multiplies every WARPS-th K block; the program adds its warps' sums.

    A batched dot gives warp i batch entry i, so nothing is exchanged before the last sum. Every
    program reads all of x, which is cheap for a few rows only.
    """
    pn = tl.program_id(0)
    tile_n, n0 = (pn * BN) // 128, (pn * BN) % 128
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    scale: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float16
    row = tl.arange(0, WARPS * BN)
    rows, row_warp = n0 + row % BN, row // BN
    warp = tl.arange(0, WARPS)[:, None, None]
    k32 = tl.arange(0, 32)[None, :, None]
    m = tl.arange(0, BM)[None, None, :]
    w_tile = w_ptr + tile_n.to(tl.int64) * num_blocks * 2048
    w_tile += rows[:, None] * 16 + tl.arange(0, 16)[None, :]
    sz_tile = sz_ptr + tile_n.to(tl.int64) * num_groups * 128
    x_tile = x_ptr + m.to(tl.int64) * stride_x
    if PDL:
        if PREFETCH_LINES > 0:
            prefetch_weights(w_ptr, tile_n, n0, 0, num_blocks, BN, PREFETCH_LINES)
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((WARPS, BN, BM), tl.float32)
    for first in tl.range(0, num_blocks, WARPS, num_stages=STAGES):
        block = tl.minimum(first + row_warp, num_blocks - 1)  # past the end x is 0
        w = tl.load(w_tile + block[:, None] * 2048, eviction_policy="evict_first")
        sz0, sz1, sz2, sz3 = load_scales(sz_tile, rows, block, group_blocks, GROUP)
        k = (first + warp) * 128 + k32
        x0 = tl.load(x_tile + k, mask=(m < M) & (k < K), other=0.0)
        x1 = tl.load(x_tile + k + 32, mask=(m < M) & (k + 32 < K), other=0.0)
        x2 = tl.load(x_tile + k + 64, mask=(m < M) & (k + 64 < K), other=0.0)
        x3 = tl.load(x_tile + k + 96, mask=(m < M) & (k + 96 < K), other=0.0)
        w0, w1, w2, w3 = dequantize_block(
            w, sz0, sz1, sz2, sz3, WARPS * BN, dtype, scale, False, UNPACK
        )
        acc = multiply_block(
            acc, w0, w1, w2, w3, x0, x1, x2, x3, sz0, sz1, sz2, sz3,
            WARPS, BN, scale, GROUP, False,
        )  # fmt: skip
    if PDL and PREFETCH_LINES == 0:
        tl.extra.cuda.gdc_launch_dependents()
    n = pn * BN + tl.arange(0, BN)
    store_out(tl.sum(acc, axis=0), out_ptr, bias_ptr, n, tl.arange(0, BM), M, N, HAS_BIAS)


@triton.jit(do_not_specialize=("M", "num_blocks", "num_groups", "group_blocks"))
def w4a16_split_kernel(
    x_ptr, w_ptr, sz_ptr, bias_ptr, out_ptr, partial_ptr, lock_ptr,
    M, N, K, stride_x, num_blocks, num_groups, group_blocks,
    BN: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr,
    SCALED: tl.constexpr, UNPACK: tl.constexpr, STAGES: tl.constexpr, REDUCE: tl.constexpr,
    HAS_BIAS: tl.constexpr, PDL: tl.constexpr, PREFETCH_LINES: tl.constexpr,
):  # fmt: skip
    """Grid (N / BN, splits of K, M / BM). partial fp32 [splits, M, N]; locks: zero before and after.

    REDUCE "none" leaves the partial sums. "last": the last of a tile's programs to arrive adds them,
    always from the first to the last, so the result does not depend on who was last. "whole": K is
    not split.
    """
    pn, pk, pm = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(1)
    tile_n, n0 = (pn * BN) // 128, (pn * BN) % 128
    per = (num_blocks + splits - 1) // splits
    first = pk * per
    end = tl.minimum(first + per, num_blocks)
    n, m = pn * BN + tl.arange(0, BN), pm * BM + tl.arange(0, BM)
    if PDL:
        if PREFETCH_LINES > 0:
            prefetch_weights(w_ptr, tile_n, n0, first, num_blocks, BN, PREFETCH_LINES)
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BN, BM), tl.float32)
    acc = accumulate(
        acc, x_ptr, w_ptr, sz_ptr, tile_n, pm * BM, n0, first, end,
        M, K, stride_x, num_blocks, num_groups, group_blocks,
        BN, BM, GROUP, EVEN_K, SCALED, UNPACK, STAGES,
    )  # fmt: skip
    if PDL and PREFETCH_LINES == 0:
        tl.extra.cuda.gdc_launch_dependents()
    if REDUCE == "whole":
        store_out(acc, out_ptr, bias_ptr, n, m, M, N, HAS_BIAS)
    else:
        inside = (m[None, :] < M) & (n[:, None] < N)
        plane = M.to(tl.int64) * N
        at = partial_ptr + m[None, :].to(tl.int64) * N + n[:, None]
        tl.store(at + pk * plane, acc, mask=inside)
        if REDUCE == "last":
            tl.debug_barrier()  # all threads have stored before one of them says so
            lock = lock_ptr + pm * tl.num_programs(0) + pn
            ticket = tl.atomic_add(lock, 1, sem="acq_rel")
            if ticket == splits - 1:
                total = tl.zeros((BN, BM), tl.float32)
                for part in range(splits):
                    at_part = at + part * plane
                    total += tl.load(at_part, mask=inside, other=0.0, cache_modifier=".cg")
                store_out(total, out_ptr, bias_ptr, n, m, M, N, HAS_BIAS)
                tl.store(lock, 0)


@triton.jit(
    do_not_specialize=("M", "num_blocks", "num_groups", "group_blocks", "num_tiles", "tiles_m")
)
def w4a16_stream_kernel(
    x_ptr, w_ptr, sz_ptr, bias_ptr, out_ptr, partial_ptr, lock_ptr,
    M, N, K, stride_x, num_blocks, num_groups, group_blocks, num_tiles, tiles_m,
    BN: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr,
    SCALED: tl.constexpr, UNPACK: tl.constexpr, STAGES: tl.constexpr, HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr, PREFETCH_LINES: tl.constexpr,
):  # fmt: skip
    """Program p of P takes K blocks p T / P ... (p + 1) T / P of all T, tile after tile (M fastest).

    A tile that one program covers is stored at once. Of a shared tile each program writes its part to
    partial fp32 [P, 2, BN, BM] (slot 0: its run starts in this tile, 1: before it) and the last to
    arrive adds the parts in order. Needs P >= tiles for a part to fit a slot; holds for any P.
    """
    p, num_programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    total_blocks = num_tiles.to(tl.int64) * num_blocks
    at, end = p * total_blocks // num_programs, (p + 1) * total_blocks // num_programs
    run_start = at
    rn, rm = tl.arange(0, BN), tl.arange(0, BM)
    slot_at = rn[:, None] + rm[None, :] * BN  # as the accumulator lies: n is contiguous
    if PDL:
        if PREFETCH_LINES > 0:
            tile = at // num_blocks
            n0 = ((tile // tiles_m) * BN).to(tl.int32)
            block = (at - tile * num_blocks).to(tl.int32)
            prefetch_weights(w_ptr, n0 // 128, n0 % 128, block, num_blocks, BN, PREFETCH_LINES)
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    while at < end:
        tile = at // num_blocks
        first = (at - tile * num_blocks).to(tl.int32)
        last = tl.minimum(end - tile * num_blocks, num_blocks).to(tl.int32)
        pn, pm = (tile // tiles_m).to(tl.int32), (tile % tiles_m).to(tl.int32)
        acc = tl.zeros((BN, BM), tl.float32)
        acc = accumulate(
            acc, x_ptr, w_ptr, sz_ptr, (pn * BN) // 128, pm * BM, (pn * BN) % 128, first, last,
            M, K, stride_x, num_blocks, num_groups, group_blocks,
            BN, BM, GROUP, EVEN_K, SCALED, UNPACK, STAGES,
        )  # fmt: skip
        n, m = pn * BN + rn, pm * BM + rm
        if last - first == num_blocks:
            store_out(acc, out_ptr, bias_ptr, n, m, M, N, HAS_BIAS)
        else:
            slot = 2 * p + tl.where(at == run_start, 0, 1)
            tl.store(partial_ptr + slot * (BN * BM) + slot_at, acc)
            tl.debug_barrier()
            ticket = tl.atomic_add(lock_ptr + tile, 1, sem="acq_rel")
            # the programs whose runs hold the first and the last block of this tile
            head = ((tile * num_blocks + 1) * num_programs - 1) // total_blocks
            tail = ((tile + 1) * num_blocks * num_programs - 1) // total_blocks
            if ticket == tail - head:
                total = tl.zeros((BN, BM), tl.float32)
                for part in range(head, tail + 1):
                    part_start = part * total_blocks // num_programs
                    part_slot = 2 * part + tl.where(part_start >= tile * num_blocks, 0, 1)
                    # the first program of the tile may have begun in an earlier one
                    total += tl.load(
                        partial_ptr + part_slot * (BN * BM) + slot_at, cache_modifier=".cg"
                    )
                store_out(total, out_ptr, bias_ptr, n, m, M, N, HAS_BIAS)
                tl.store(lock_ptr + tile, 0)
        at = tile * num_blocks + last


@triton.jit(do_not_specialize=("first_tile", "rows", "num_blocks", "num_groups", "group_blocks"))
def w4a16_dequantize_kernel(
    w_ptr, sz_ptr, out_ptr, first_tile, rows, K, num_blocks, num_groups, group_blocks,
    GROUP: tl.constexpr, UNPACK: tl.constexpr,
):  # fmt: skip
    """Grid (K blocks, tiles): one block of 128 x 128 weights -> out [rows, K]."""
    block, tile_out = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    scale: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float16
    tile = (first_tile + tile_out).to(tl.int64)
    n, k = tl.arange(0, 128), tl.arange(0, 32)
    w_block = w_ptr + (tile * num_blocks + block) * 2048
    w = tl.load(
        w_block + n[:, None] * 16 + tl.arange(0, 16)[None, :], eviction_policy="evict_first"
    )
    sz0, sz1, sz2, sz3 = load_scales(
        sz_ptr + tile * num_groups * 128, n, block, group_blocks, GROUP
    )
    w0, w1, w2, w3 = dequantize_block(w, sz0, sz1, sz2, sz3, 128, dtype, scale, True, UNPACK)
    row = tile_out * 128 + n
    col = block * 128 + k[None, :]
    out = out_ptr + row[:, None].to(tl.int64) * K + col
    inside = row[:, None] < rows
    tl.store(out, w0, mask=inside & (col < K))
    tl.store(out + 32, w1, mask=inside & (col + 32 < K))
    tl.store(out + 64, w2, mask=inside & (col + 64 < K))
    tl.store(out + 96, w3, mask=inside & (col + 96 < K))
