"""W4A16 matmul in Triton: out[M, N] = x[M, K] @ dequant(w)[N, K]^T, for M from one to thousands.

The weight tile is the left operand (out^T = W x^T), so dequantized int4 feeds the tensor cores from
registers and never passes through shared memory; unpacking is one LOP3 per two weights on numbers
whose exponent is already in place (Kim et al. 2022, Marlin 2024). Weights lie tile by tile, so a
program reads one contiguous stretch. Three regimes (launch_config chooses):

split      M <= 64: the K axis is split over programs. w4a16_partials leaves their sums to the kernel
           that follows; w4a16_packed_matmul adds them in a small kernel of its own.
stream     M <= MAX_STREAM_ROWS: every program takes an equal run of K blocks over all tiles
           (stream-K, Osama et al. 2023), so no multiprocessor idles in a last wave.
workspace  beyond: dequantize some rows into a workspace that stays in L2, multiply by cuBLAS, go on.

There is no autotuning: launch_config is one function, and tests/bench/bench_kernels.py --sweep prints
what it should say. Nor is there a reduction by the last program to arrive (it waits for three trips to
L2 in a row, on few multiprocessors): the sum in a kernel of its own is faster at every M and needs no
locks.
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

MAX_SPLIT_ROWS = 64
MAX_STREAM_ROWS = 512
_WORKSPACE_BYTES = 36 << 20  # of the 60 MB of L2; the rest is for x and the output
_H200_MULTIPROCESSORS = 132
# H200, four layers, M = 1, 16, 64: 41, 51 and 93 us; with 128: 41, 54, 105; with 512: 42, 50, 89
_SUM_BLOCK = 256
_SUM_ROWS = 16  # M = 128, 256: 144, 235 us; 4: 146, 243; 32: 148, 247


@dataclass(frozen=True)
class LaunchConfig:
    """How one shape is launched. split_k counts the split regime's parts of K; programs the stream's runs."""

    regime: Literal["split", "stream", "workspace"]
    block_m: int = 16
    split_k: int = 1
    programs: int = 0


@cache
def launch_config(
    m: int, n: int, k: int, multiprocessors: int = _H200_MULTIPROCESSORS
) -> LaunchConfig:
    """The launch for out [m, n] with a weight [n, k].

    Measured on an H200 (torch 2.11, triton 3.6): CUDA-graph replays over 320 MB of weights, microseconds
    for the four Llama-2-7B layers. Four warps and three stages were best throughout; 2, 4 or 5 stages at
    M = 1 took 46, 39 and 41 where 3 took 38.
    Stream, block_m 64 against 128: 152 : 173 at M = 128, 200 : 240 at 192, 251 : 254 at 256, 359 : 336
    at 384; 128 won where tiles of 128 rows waste none and are enough for every program. Two programs a
    multiprocessor beat one and three. (These with the sum still inside; its own kernel took 1 to 6% off.)
    Workspace against stream: 320 : 237 at 256, 405 : 335 at 384, 444 : 418 at 512.
    """
    tiles, num_blocks = -(-n // TILE_N), -(-k // BLOCK_K)
    if m <= MAX_SPLIT_ROWS:
        block_m = max(8, triton.next_power_of_2(m))
        split_k = _split_k(block_m, tiles, num_blocks, multiprocessors)
        return LaunchConfig("split", block_m=block_m, split_k=split_k)
    if m <= MAX_STREAM_ROWS:
        programs = 2 * multiprocessors
        tiles_128 = -(-m // 128)
        wide = 2 * tiles_128 <= -(-m // 64) and tiles * tiles_128 >= programs
        block_m = 128 if wide else 64
        total = tiles * -(-m // block_m) * num_blocks
        return LaunchConfig("stream", block_m=block_m, programs=min(total, programs))
    return LaunchConfig("workspace")


def _split_k(block_m: int, tiles: int, num_blocks: int, multiprocessors: int) -> int:
    """Parts of at least four K blocks that take the least time, counted in K blocks.

    A wave takes as long as its K blocks and a start of two, and partial sums cost 2.6 for each program
    on a multiprocessor. Registers allow 4 programs (sm_90: 96 and 128 registers), 3 (158) or 2 (228).
    This yields what measured best of 2 to 17 parts for (qkv, o, gate_up, down): (4, 8, 3, 11) up to 16
    rows, (4, 8, 2, 11) at 32 and (2, 8, 3, 8) at 64.
    """
    resident = {8: 4, 16: 4, 32: 3, 64: 2}[block_m] * multiprocessors

    def cost(per: int) -> float:
        programs = tiles * -(-num_blocks // per)
        return -(-programs // resident) * (per + 2) + 2.6 * programs / multiprocessors

    per = min(range(num_blocks, min(4, num_blocks) - 1, -1), key=cost)
    return -(-num_blocks // per)


def w4a16_packed_matmul(
    x: Tensor, packed: PackedW4A16, bias: Tensor | None, config: LaunchConfig | None = None
) -> Tensor:
    """x [M, K] times a packed weight, plus bias [N]. Returns [M, N] of x's type; M may be 0."""
    x = _checked(x, packed, bias)
    m, n, k = x.shape[0], packed.out_features, packed.in_features
    if m == 0:
        return x.new_empty(0, n)
    if config is None:
        config = launch_config(m, n, k, _multiprocessors_of(x))
    if config.regime == "split":
        return _sum(_launch_split(x, packed, config, sum_follows=True), bias, x.new_empty(m, n))
    if config.regime == "stream":
        return _launch_stream(x, packed, bias, config)
    return _by_workspace(x, packed, bias)


def w4a16_partials(x: Tensor, packed: PackedW4A16, config: LaunchConfig | None = None) -> Tensor:
    """fp32 [S, M, N] whose sum over S is x times the weight, for a next kernel that adds while it loads.

    M at most 64. S depends on the shape and M's power of two only, so a captured graph keeps it. The
    consumer adds the S planes in order, then the bias, and rounds to x's type: bit for bit what
    w4a16_packed_matmul returns. Under programmatic dependent launch the consumer must wait (gdc_wait)
    before it reads.
    """
    x = _checked(x, packed, None)
    m = x.shape[0]
    if not 0 < m <= MAX_SPLIT_ROWS:
        raise ValueError(f"x has {m} rows; partial sums exist for 1 to {MAX_SPLIT_ROWS}.")
    if config is None:
        config = launch_config(m, packed.out_features, packed.in_features, _multiprocessors_of(x))
    return _launch_split(x, packed, config, sum_follows=False)


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


def _launch_split(
    x: Tensor, packed: PackedW4A16, config: LaunchConfig, *, sum_follows: bool
) -> Tensor:
    m, n, k = x.shape[0], packed.out_features, packed.in_features
    partial = x.new_empty(config.split_k, m, n, dtype=torch.float32)
    grid = (-(-n // TILE_N), config.split_k, -(-m // config.block_m))
    w4a16_split_kernel[grid](
        x, packed.tiles, packed.scale_zeros, partial,
        m, n, k, x.stride(0), packed.num_blocks, packed.scale_zeros.shape[1], packed.group_blocks,
        BM=config.block_m, GROUP=_group_mode(packed), EVEN_K=k % BLOCK_K == 0,
        UNPACK=_unpack_mode(x), SUM_FOLLOWS=sum_follows, num_warps=4, **_dependent_launch(x),
    )  # fmt: skip
    return partial


def _sum(partial: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """out [M, N] = the planes of partial in order, plus bias."""
    splits, m, n = partial.shape
    w4a16_sum_kernel[(-(-m * n // _SUM_BLOCK),)](
        partial, bias, out, m, n,
        SPLITS=splits, BLOCK=_SUM_BLOCK, HAS_BIAS=bias is not None, num_warps=4,
        **_dependent_launch(out),
    )  # fmt: skip
    return out


def _launch_stream(
    x: Tensor, packed: PackedW4A16, bias: Tensor | None, config: LaunchConfig
) -> Tensor:
    m, n, k = x.shape[0], packed.out_features, packed.in_features
    tiles_m, block_m = -(-m // config.block_m), config.block_m
    num_tiles = -(-n // TILE_N) * tiles_m
    programs = min(config.programs, num_tiles * packed.num_blocks)
    out = x.new_empty(m, n)
    partial = x.new_empty(programs, 2, block_m, TILE_N, dtype=torch.float32)
    w4a16_stream_kernel[(programs,)](
        x, packed.tiles, packed.scale_zeros, bias, out, partial,
        m, n, k, x.stride(0), packed.num_blocks, packed.scale_zeros.shape[1],
        packed.group_blocks, num_tiles, tiles_m,
        BM=block_m, GROUP=_group_mode(packed), EVEN_K=k % BLOCK_K == 0, UNPACK=_unpack_mode(x),
        HAS_BIAS=bias is not None, num_warps=4, **_dependent_launch(x),
    )  # fmt: skip
    rows = min(_SUM_ROWS, block_m)
    w4a16_stream_sum_kernel[(num_tiles, block_m // rows)](
        partial, bias, out, m, n, packed.num_blocks, num_tiles, tiles_m, programs,
        BM=block_m, ROWS=rows, HAS_BIAS=bias is not None, num_warps=4, **_dependent_launch(x),
    )  # fmt: skip
    return out


def _by_workspace(x: Tensor, packed: PackedW4A16, bias: Tensor | None) -> Tensor:
    """Rows of the weight, as many as stay in L2, are dequantized and multiplied at once by cuBLAS."""
    m, n, k = x.shape[0], packed.out_features, packed.in_features
    step = workspace_rows(m, n, k)
    out, workspace = x.new_empty(m, n), x.new_empty(step, k)
    for first in range(0, n, step):
        weight = workspace[: min(step, n - first)]
        dequantize_rows(packed, first, weight)
        part = out[:, first : first + step]
        if bias is None:
            torch.mm(x, weight.T, out=part)
        else:
            torch.addmm(bias[first : first + step], x, weight.T, out=part)
    return out


def workspace_rows(m: int, n: int, k: int) -> int:
    """Even pieces of whole tiles: no larger than fills the multiprocessors, or than stays in L2.

    Four layers, H200: at M = 2048 pieces of 2,048 rows took 1,258 and 1,303 us, 4,096 rows 1,386 and
    1,402; at M = 1024 725 and 730 against 708 and 731. At M = 256 small pieces leave multiprocessors idle.
    """
    most = max(2048, min(_WORKSPACE_BYTES // (2 * k), (1 << 22) // m))
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


def _dependent_launch(x: Tensor) -> dict[str, bool]:
    """Programmatic dependent launch: a kernel's programs start while the last of the one before run.

    It saves half a microsecond a kernel, if a matmul lets the next one start only as it ends: started
    earlier, that one's programs settle unevenly, and four layers take 47 us where 38 do (M = 1, H200).
    """
    if x.is_cuda and _has_dependent_launch():
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


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
BN = tl.constexpr(TILE_N)


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
def scale_sums(p, sz, SCALE: tl.constexpr):
    """Products [BN, BM] times their row's scale."""
    return p * scale_of(sz, SCALE).to(tl.float32)[:, None]


@triton.jit
def multiply_block(
    acc, w0, w1, w2, w3, x0, x1, x2, x3, sz0, sz1, sz2, sz3,
    SCALE: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """acc plus one K block; products are scaled group by group unless the weights already are."""
    if SCALED:
        acc = tl.dot(w0, x0, acc, input_precision="ieee")
        acc = tl.dot(w1, x1, acc, input_precision="ieee")
        acc = tl.dot(w2, x2, acc, input_precision="ieee")
        return tl.dot(w3, x3, acc, input_precision="ieee")
    else:
        zeros = tl.zeros_like(acc)
        p = tl.dot(w0, x0, zeros, input_precision="ieee")
        if GROUP == 32:
            acc += scale_sums(p, sz0, SCALE)
            p = zeros
        p = tl.dot(w1, x1, p, input_precision="ieee")
        if GROUP == 32 or GROUP == 64:
            acc += scale_sums(p, sz1, SCALE)
            p = zeros
        p = tl.dot(w2, x2, p, input_precision="ieee")
        if GROUP == 32:
            acc += scale_sums(p, sz2, SCALE)
            p = zeros
        p = tl.dot(w3, x3, p, input_precision="ieee")
        return acc + scale_sums(p, sz3, SCALE)


@triton.jit
def accumulate(
    x_ptr, w_ptr, sz_ptr, tile_n, m0, first, end,
    M, K, stride_x, num_blocks, num_groups, group_blocks,
    BM: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, SCALED: tl.constexpr,
    UNPACK: tl.constexpr,
):  # fmt: skip
    """[BN, BM]: W[:, K blocks first ... end - 1] times x^T.

    SCALED multiplies scales into the weights (rounded to x's type), not into the partial products
    (fp32): there the sums of a wide M tile would not fit the registers, here ptxas runs one wgmma at a
    time (C7515).
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    scale: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float16
    rows = tl.arange(0, BN)
    k32 = tl.arange(0, 32)
    m = m0 + tl.arange(0, BM)
    row = m[None, :] < M
    w_tile = w_ptr + tile_n.to(tl.int64) * num_blocks * 2048  # 128 rows of 16 words
    w_tile += rows[:, None] * 16 + tl.arange(0, 16)[None, :]
    sz_tile = sz_ptr + tile_n.to(tl.int64) * num_groups * 128
    x_tile = x_ptr + m[None, :].to(tl.int64) * stride_x + k32[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for block in tl.range(first, end, num_stages=3):
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
            acc, w0, w1, w2, w3, x0, x1, x2, x3, sz0, sz1, sz2, sz3, scale, GROUP, SCALED
        )
    return acc


@triton.jit
def store_out(acc, out_ptr, bias_ptr, n, m, M, N, HAS_BIAS: tl.constexpr):
    """acc [n, m] plus bias -> out[m, n]."""
    inside = (m[None, :] < M) & (n[:, None] < N)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = out_ptr + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("M", "num_blocks", "num_groups", "group_blocks"))
def w4a16_split_kernel(
    x_ptr, w_ptr, sz_ptr, partial_ptr,
    M, N, K, stride_x, num_blocks, num_groups, group_blocks,
    BM: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, UNPACK: tl.constexpr,
    SUM_FOLLOWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of N, splits of K, M / BM) -> partial fp32 [splits, M, N].

    SUM_FOLLOWS: the next kernel is w4a16_sum_kernel, whose few registers fit beside this one's, so it may
    start at once (with it 41 us instead of 45 at M = 1, 51 instead of 52 at 16; H200, four layers).
    """
    pn, pk, pm = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(1)
    per = (num_blocks + splits - 1) // splits
    first = pk * per
    end = tl.minimum(first + per, num_blocks)
    if PDL:
        if SUM_FOLLOWS:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = accumulate(
        x_ptr, w_ptr, sz_ptr, pn, pm * BM, first, end,
        M, K, stride_x, num_blocks, num_groups, group_blocks,
        BM, GROUP, EVEN_K, False, UNPACK,
    )  # fmt: skip
    if PDL and not SUM_FOLLOWS:
        tl.extra.cuda.gdc_launch_dependents()
    n, m = pn * BN + tl.arange(0, BN), pm * BM + tl.arange(0, BM)
    at = partial_ptr + pk * (M.to(tl.int64) * N) + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(at, acc, mask=(m[None, :] < M) & (n[:, None] < N))


@triton.jit(do_not_specialize=("M",))
def w4a16_sum_kernel(
    partial_ptr, bias_ptr, out_ptr, M, N,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (M * N / BLOCK): partial fp32 [SPLITS, M, N], first to last, plus bias -> out [M, N]."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    plane = M.to(tl.int64) * N
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < plane
    total = tl.load(partial_ptr + at, mask=inside, other=0.0)
    for part in tl.static_range(1, SPLITS):
        total += tl.load(partial_ptr + part * plane + at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=("M", "num_blocks", "num_groups", "group_blocks", "num_tiles", "tiles_m")
)
def w4a16_stream_kernel(
    x_ptr, w_ptr, sz_ptr, bias_ptr, out_ptr, partial_ptr,
    M, N, K, stride_x, num_blocks, num_groups, group_blocks, num_tiles, tiles_m,
    BM: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, UNPACK: tl.constexpr,
    HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program p of P takes K blocks p T / P ... (p + 1) T / P of all T, tile after tile (M fastest).

    A tile that one program covers is stored at once. Of a shared tile each program writes its part to
    partial fp32 [P, 2, BM, BN] (slot 0: its run starts in this tile, 1: before it).
    """
    p, num_programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    total_blocks = num_tiles.to(tl.int64) * num_blocks
    at, end = p * total_blocks // num_programs, (p + 1) * total_blocks // num_programs
    run_start = at
    rn, rm = tl.arange(0, BN), tl.arange(0, BM)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    while at < end:
        tile = at // num_blocks
        first = (at - tile * num_blocks).to(tl.int32)
        last = tl.minimum(end - tile * num_blocks, num_blocks).to(tl.int32)
        pn, pm = (tile // tiles_m).to(tl.int32), (tile % tiles_m).to(tl.int32)
        acc = accumulate(
            x_ptr, w_ptr, sz_ptr, pn, pm * BM, first, last,
            M, K, stride_x, num_blocks, num_groups, group_blocks,
            BM, GROUP, EVEN_K, True, UNPACK,
        )  # fmt: skip
        if last - first == num_blocks:
            store_out(acc, out_ptr, bias_ptr, pn * BN + rn, pm * BM + rm, M, N, HAS_BIAS)
        else:
            slot = 2 * p + tl.where(at == run_start, 0, 1)
            tl.store(partial_ptr + slot * (BM * BN) + rm[None, :] * BN + rn[:, None], acc)
        at = tile * num_blocks + last


@triton.jit(do_not_specialize=("M", "num_blocks", "num_tiles", "tiles_m", "num_programs"))
def w4a16_stream_sum_kernel(
    partial_ptr, bias_ptr, out_ptr, M, N, num_blocks, num_tiles, tiles_m, num_programs,
    BM: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, BM / ROWS): the parts of a shared tile, first to last, plus bias -> out."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0).to(tl.int64)
    total_blocks = num_tiles.to(tl.int64) * num_blocks
    # the programs whose runs hold the first and the last block of this tile
    head = ((tile * num_blocks + 1) * num_programs - 1) // total_blocks
    tail = ((tile + 1) * num_blocks * num_programs - 1) // total_blocks
    if head < tail:
        rn, rm = tl.arange(0, BN), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        slot_at = rm[None, :] * BN + rn[:, None]
        total = tl.zeros((BN, ROWS), tl.float32)
        for part in range(head, tail + 1):
            # the first program of the tile may have begun in an earlier one
            begun_before = part * total_blocks // num_programs < tile * num_blocks
            slot = 2 * part + tl.where(begun_before, 1, 0)
            total += tl.load(partial_ptr + slot * (BM * BN) + slot_at)
        n, m = (tile // tiles_m) * BN + rn, (tile % tiles_m) * BM + rm
        store_out(total, out_ptr, bias_ptr, n, m, M, N, HAS_BIAS)


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
