"""Attention over the paged KV cache in Triton: decode, and causal prefill in chunks over shared prefixes.

One kernel serves both. Its rows are the queries of one KV head: `BLOCK_Q` positions times the group of
query heads that share the head, so grouped heads read K and V once (vLLM's unified kernel packs alike).
A decode launch gives every sequence a fixed number of splits over its context (flash decoding, Dao et
al. 2023), so a captured graph fits any context up to its own; the last split to finish adds up the
partial sums in split order, so the result does not depend on timing and needs no second launch.

Quantized caches are read as 32-bit words. `0x6400 | byte` is the fp16 number 1024 + byte, so two
integer operations and one subtraction turn two bytes into two fp16 numbers (Kim et al. 2022, Marlin). A
tile's columns stay in the order that this unpacking leaves; q is read and the output is written
through `_channels`, so nothing is shuffled. Scales never touch the tile:
online: s_n = k_scale_n * (q . k_n) + k_zero_n * sum(q), and p_n * v_scale_n goes into the second product;
calibrated: k_scale multiplies q once, k_zero adds the same to every score and is dropped by the softmax,
v_scale and v_zero apply to the finished output, because the weights sum to one.

Left out: ALiBi, score caps, attention sinks; no supported model has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.fused import dependent_launch
from engine.kernels.kv_quant import KVQuant, OnlineKV

LOG2_E = math.log2(math.e)
MAX_SPLITS = 64
DECODE_ROWS = 64  # most query heads of one KV head that a decode launch packs


@dataclass(frozen=True)
class Launch:
    """Tile sizes of one launch: rows and keys of a tile, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int  # three are two tiles in flight


def decode_launch(group: int, head_size: int, cache: torch.dtype, compute: torch.dtype) -> Launch:
    """Tiles of a decode launch. TODO: revise once bench_attention --sweep has run on an H200."""
    block_m = max(16, triton.next_power_of_2(group))
    wide = triton.next_power_of_2(head_size) > 128
    if compute == torch.float32:
        return Launch(block_m, 16 if wide else 32, 8, 1)
    return Launch(block_m, 32 if wide and cache != torch.uint8 else 64, 4, 3)


def prefill_launch(group: int, head_size: int, compute: torch.dtype) -> Launch:
    """Tiles of a prefill launch; fp32 multiplies without tensor cores and needs small tiles."""
    rows = triton.next_power_of_2(group)
    wide = triton.next_power_of_2(head_size) > 128
    if compute == torch.float32:
        return Launch(max(16, rows), 16 if wide else 32, 8, 1)
    return Launch(max(128, rows), 32 if wide else 64, 8, 3)


def count_splits(programs: int, max_context_len: int, num_multiprocessors: int) -> int:
    """Splits of a decode launch, from host numbers only: a captured graph must not look at the data.

    Few programs: one wave of two a multiprocessor. Many: several waves, so that the last is short.
    """
    wave = 2 * num_multiprocessors
    wanted = wave // programs if programs < wave else -(-16 * wave // programs)
    shortest = shortest_split(programs, num_multiprocessors)
    return max(1, min(wanted, -(-max_context_len // shortest), MAX_SPLITS))


def shortest_split(programs: int, num_multiprocessors: int) -> int:
    """Tokens that pay for a split: a sequence too short for all of its launch's splits uses fewer."""
    return 128 if programs < 2 * num_multiprocessors else 512


def supports(q: Tensor, k_cache: Tensor, v_cache: Tensor, quant: KVQuant | None) -> str | None:
    """None if paged_attention can run these tensors, else what it lacks."""
    head_size, group = q.shape[2], q.shape[1] // k_cache.shape[2]
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {q.dtype}"
    if not 16 <= head_size <= 256:
        return f"head size {head_size}"
    if group > DECODE_ROWS:
        return f"{group} query heads for one KV head"
    if k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1:
        return f"cache strides {k_cache.stride()} and {v_cache.stride()}"
    if quant is not None:
        if head_size % (32 // quant.bits):
            return f"head size {head_size} with int{quant.bits} KV"
        if any(stride % 4 for stride in k_cache.stride()[:3]):
            return f"cache strides {k_cache.stride()} with int{quant.bits} KV"
    elif k_cache.dtype != q.dtype:
        return f"{q.dtype} queries over a {k_cache.dtype} cache"
    return None


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens: Tensor,
    query_lens: tuple[int, ...],
    max_context_len: int,
    num_decodes: int,
    scale: float,
    window: int | None,
    quant: KVQuant | None = None,
    counters: Tensor | None = None,
    *,
    num_splits: int | None = None,
    decode: Launch | None = None,
    prefill: Launch | None = None,
    assembly: bool | None = None,
) -> Tensor:
    """reference.paged_attention, with cu_seqlens [B + 1] int32 on the device. Returns [T, H, D].

    A sequence of context_len 0 is padding and gets zeros. counters: int32 zeros, one for each sequence
    and KV head or more, left as zeros; launches that may overlap must not share them. num_splits,
    decode and prefill replace the launch functions' choices; assembly False unpacks in plain Triton, as
    the interpreter must.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    num_sequences = len(query_lens)
    num_rows = sum(query_lens)
    if num_rows < q.shape[0]:
        out[num_rows:].zero_()
    num_kv_heads = k_cache.shape[2]
    group, head_size = q.shape[1] // num_kv_heads, q.shape[2]
    compute = q.dtype
    if quant is not None:
        compute = torch.float32 if q.dtype == torch.float32 else torch.float16

    def run(
        launch: Launch, grid: tuple[int, int, int], first: int, splits: int, min_tiles: int = 1
    ) -> None:
        _launch(
            launch, grid, out, q, k_cache, v_cache, block_tables, context_lens, cu_seqlens, first,
            splits, min_tiles, scale, window, quant, counters, compute,
            q.is_cuda if assembly is None else assembly,
        )  # fmt: skip

    if num_decodes:
        launch = decode or decode_launch(group, head_size, k_cache.dtype, compute)
        programs = num_decodes * num_kv_heads
        span = max_context_len if window is None else min(max_context_len, window)
        min_tiles = 1
        if num_splits is None:
            multiprocessors = _num_multiprocessors(q.device)
            num_splits = count_splits(programs, span, multiprocessors)
            min_tiles = shortest_split(programs, multiprocessors) // launch.block_n
        run(launch, (num_splits, num_kv_heads, num_decodes), 0, num_splits, min_tiles)
    if num_decodes < num_sequences:
        launch = prefill or prefill_launch(group, head_size, compute)
        tiles = -(-max(query_lens[num_decodes:]) // (launch.block_m // group))
        run(launch, (tiles, num_kv_heads, num_sequences - num_decodes), num_decodes, 0)
    return out


def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(
    launch: Launch,
    grid: tuple[int, int, int],
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens: Tensor,
    first_sequence: int,
    num_splits: int,
    min_tiles: int,
    scale: float,
    window: int | None,
    quant: KVQuant | None,
    counters: Tensor | None,
    compute: torch.dtype,
    assembly: bool,
) -> None:
    """num_splits 0 is a prefill launch; min_tiles is the least that a split of a decode launch reads."""
    num_kv_heads, block_size = k_cache.shape[2], k_cache.shape[1]
    num_heads, head_size = q.shape[1:]
    group = num_heads // num_kv_heads
    padded = triton.next_power_of_2(head_size)
    partial = stats = out  # never touched without splits
    if num_splits > 1:
        rows = grid[2] * num_heads * num_splits
        partial = torch.empty(rows, padded, dtype=torch.float32, device=q.device)
        stats = torch.empty(rows, 2, dtype=torch.float32, device=q.device)
        if counters is None or counters.numel() < grid[1] * grid[2]:
            counters = torch.zeros(grid[1] * grid[2], dtype=torch.int32, device=q.device)
    form, bits = "plain", 16
    k_params = v_params = k_scale = v_scale = v_zero = q
    param_strides = (0, 0, 0)
    if quant is not None:
        bits = quant.bits
        k_cache, v_cache = k_cache.view(torch.int32), v_cache.view(torch.int32)
        if isinstance(quant, OnlineKV):
            form = "online"
            k_params, v_params = (p.view(torch.int32) for p in (quant.k_params, quant.v_params))
            param_strides = k_params.stride()[:3]
        else:
            form = "calibrated"
            k_scale, v_scale, v_zero = quant.k_scale, quant.v_scale, quant.v_zero
    paged_attention_kernel[grid](
        out,
        q,
        k_cache,
        v_cache,
        k_params,
        v_params,
        k_scale,
        v_scale,
        v_zero,
        block_tables,
        context_lens,
        cu_seqlens,
        partial,
        stats,
        context_lens if counters is None else counters,
        first_sequence,
        min_tiles,
        scale * LOG2_E,
        0 if window is None else window,
        q.stride(0),
        q.stride(1),
        block_tables.stride(0),
        *k_cache.stride()[:3],
        *param_strides,
        FORM=form,
        BITS=bits,
        ASSEMBLY=assembly,
        DECODE=num_splits > 0,
        SPLIT=num_splits > 1,
        WINDOWED=window is not None,
        HEAD_SIZE=head_size,
        BLOCK_D=padded,
        GROUP=group,
        BLOCK_SIZE=block_size,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        FULL_PRECISION=compute == torch.float32,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **dependent_launch(q),
    )


@triton.jit
def _channels(column, FORM: tl.constexpr, BITS: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """(channel of each column of an unpacked tile, whether there is one)."""
    byte = column % 4
    byte = (byte >> 1) | ((byte & 1) << 1)  # 0, 2, 1, 3: a word's even bytes come first
    if FORM == "plain":
        channel = column
        channel_ok = column < HEAD_SIZE
    elif BITS == 8:
        channel = column // 4 * 4 + byte
        channel_ok = channel < HEAD_SIZE
    else:
        byte += column // 8 * 4
        channel = byte + column % 8 // 4 * (HEAD_SIZE // 2)
        channel_ok = byte < HEAD_SIZE // 2
    return channel, channel_ok


@triton.jit
def _half(word):
    """The fp16 number whose bits are the low half of an int32."""
    return word.to(tl.int16).to(tl.float16, bitcast=True)


# Two fp16 numbers a register: PRMT puts 0x64 above each byte, then 1152 goes off both at once. In plain
# Triton the compiler takes the pairs apart again, which costs twice the instructions.
_UNPACK_INT8 = tl.constexpr("""{
.reg .b32 a, b, m;
mov.b32 m, 0x64646464;
prmt.b32 a, $4, m, 0x4240;
prmt.b32 b, $4, m, 0x4341;
mov.b32 m, 0x64806480;
sub.rn.f16x2 a, a, m;
sub.rn.f16x2 b, b, m;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
}""")
# The high nibbles arrive times 16: c * (1 / 16) - 72.
_UNPACK_INT4 = tl.constexpr("""{
.reg .b32 a, b, c, d, w, m, n;
shr.u32 w, $8, 8;
lop3.b32 a, $8, 0x000f000f, 0x64006400, 0xEA;
lop3.b32 b, w, 0x000f000f, 0x64006400, 0xEA;
lop3.b32 c, $8, 0x00f000f0, 0x64006400, 0xEA;
lop3.b32 d, w, 0x00f000f0, 0x64006400, 0xEA;
mov.b32 m, 0x64086408;
sub.rn.f16x2 a, a, m;
sub.rn.f16x2 b, b, m;
mov.b32 m, 0x2c002c00;
mov.b32 n, 0xd480d480;
fma.rn.f16x2 c, c, m, n;
fma.rn.f16x2 d, d, m, n;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
mov.b32 {$4, $5}, c;
mov.b32 {$6, $7}, d;
}""")


@triton.jit
def _unpack(
    word, BITS: tl.constexpr, ASSEMBLY: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """int32 [ROWS, BLOCK_D * BITS / 32] -> fp16 [ROWS, BLOCK_D] of q - 2^(BITS - 1), see _channels."""
    if BITS == 8:
        if ASSEMBLY:
            a0, a1, b0, b1 = tl.inline_asm_elementwise(
                _UNPACK_INT8, "=h,=h,=h,=h,r", [word], (tl.float16,) * 4, is_pure=True, pack=1
            )
        else:
            a0 = _half((word & 0xFF) | 0x6400) - 1152.0
            a1 = _half((word >> 16 & 0xFF) | 0x6400) - 1152.0
            b0 = _half((word >> 8 & 0xFF) | 0x6400) - 1152.0
            b1 = _half((word >> 24 & 0xFF) | 0x6400) - 1152.0
        low, high = tl.join(a0, b0), tl.join(a1, b1)
    else:
        if ASSEMBLY:
            a0, a1, b0, b1, c0, c1, d0, d1 = tl.inline_asm_elementwise(
                _UNPACK_INT4,
                "=h,=h,=h,=h,=h,=h,=h,=h,r",
                [word],
                (tl.float16,) * 8,
                is_pure=True,
                pack=1,
            )
        else:
            a0 = _half((word & 0xF) | 0x6400) - 1032.0
            a1 = _half((word >> 16 & 0xF) | 0x6400) - 1032.0
            b0 = _half((word >> 8 & 0xF) | 0x6400) - 1032.0
            b1 = _half((word >> 24 & 0xF) | 0x6400) - 1032.0
            c0 = _half((word >> 4 & 0xF) | 0x6400) - 1032.0
            c1 = _half((word >> 20 & 0xF) | 0x6400) - 1032.0
            d0 = _half((word >> 12 & 0xF) | 0x6400) - 1032.0
            d1 = _half((word >> 28 & 0xF) | 0x6400) - 1032.0
        low = tl.join(tl.join(a0, c0), tl.join(b0, d0))
        high = tl.join(tl.join(a1, c1), tl.join(b1, d1))
    return tl.join(low, high).reshape(ROWS, BLOCK_D)


@triton.jit
def _load_tile(
    ptr,
    row,
    row_ok,
    FORM: tl.constexpr,
    BITS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows of K or V as [BLOCK_N, BLOCK_D]; hidden rows and padded columns are no NaN."""
    UNITS: tl.constexpr = HEAD_SIZE if FORM == "plain" else HEAD_SIZE * BITS // 32
    WIDTH: tl.constexpr = BLOCK_D if FORM == "plain" else BLOCK_D * BITS // 32
    column = tl.arange(0, WIDTH)
    address = ptr + row[:, None] + column[None, :]
    if MASKED:
        x = tl.load(address, mask=row_ok[:, None] & (column < UNITS)[None, :], other=0)
    elif UNITS < WIDTH:
        x = tl.load(address, mask=(column < UNITS)[None, :], other=0)
    else:
        x = tl.load(address)
    if FORM != "plain":
        x = _unpack(x, BITS, ASSEMBLY, BLOCK_N, BLOCK_D)
    return x


@triton.jit
def _load_params(ptr, row, row_ok, BITS: tl.constexpr):
    """(scale, zero) of each row, fp32 [BLOCK_N]; zero is that of q - 2^(BITS - 1)."""
    word = tl.load(ptr + row, mask=row_ok, other=0)
    scale = _half(word).to(tl.float32)
    return scale, _half(word >> 16).to(tl.float32) + scale * (2 ** (BITS - 1))


@triton.jit
def _load_block(table_ptr, start, high, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The block of a tile, or of each of its keys where tiles may cross blocks; int64.

    Loaded one tile ahead, or the compiler would spend half of its pipeline on this load.
    """
    if BLOCK_SIZE % BLOCK_N == 0:
        block = tl.load(table_ptr + start // BLOCK_SIZE, mask=start < high, other=0)
    else:
        key = start + tl.arange(0, BLOCK_N)
        block = tl.load(table_ptr + key // BLOCK_SIZE, mask=key < high, other=0)
    return block.to(tl.int64)


@triton.jit
def _attend_tile(
    q,
    q_sum,
    acc,
    acc_zero,
    row_sum,
    row_max,
    k_ptr,
    v_ptr,
    k_params_ptr,
    v_params_ptr,
    block,
    start,
    low,
    high,
    position,
    window,
    scale_log2,
    stride_block,
    stride_slot,
    stride_param_block,
    stride_param_slot,
    FORM: tl.constexpr,
    BITS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    DECODE: tl.constexpr,
    WINDOWED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL_PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Keys start..start + BLOCK_N of one sequence, added to a running softmax."""
    key = start + tl.arange(0, BLOCK_N)
    key_ok = key < high
    if BLOCK_SIZE % BLOCK_N == 0:  # one block: a scalar base, and offsets that need no 64 bits
        slot = start % BLOCK_SIZE + tl.arange(0, BLOCK_N)
        k_ptr += block * stride_block
        v_ptr += block * stride_block
        k_params_ptr += block * stride_param_block
        v_params_ptr += block * stride_param_block
        row = slot * stride_slot
        param = slot * stride_param_slot
    else:
        slot = (key % BLOCK_SIZE).to(tl.int64)
        row = block * stride_block + slot * stride_slot
        param = block * stride_param_block + slot * stride_param_slot
    k = _load_tile(
        k_ptr, row, key_ok, FORM, BITS, ASSEMBLY, HEAD_SIZE, BLOCK_D, BLOCK_N, MASKED
    ).to(q.dtype)
    precision: tl.constexpr = "ieee" if FULL_PRECISION else "tf32"
    score = tl.dot(q, tl.trans(k), input_precision=precision)
    if FORM == "online":
        k_scale, k_zero = _load_params(k_params_ptr, param, key_ok, BITS)
        v_scale, v_zero = _load_params(v_params_ptr, param, key_ok, BITS)
        score = score * k_scale[None, :] + q_sum[:, None] * k_zero[None, :]
    if MASKED:
        if DECODE:
            keep = (key_ok & (key >= low))[None, :]
        else:
            keep = key[None, :] <= position[:, None]
            if WINDOWED:
                keep &= key[None, :] > position[:, None] - window
        score = tl.where(keep, score, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(score, 1) * scale_log2)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weight = tl.exp2(score * scale_log2 - shift[:, None])
    decay = tl.exp2(row_max - shift)
    row_sum = row_sum * decay + tl.sum(weight, 1)
    if FORM == "online":
        acc_zero = acc_zero * decay + tl.sum(weight * v_zero[None, :], 1)
        weight *= v_scale[None, :] * 256.0  # 2^8 keeps small scales clear of fp16's subnormals
    v = _load_tile(
        v_ptr, row, key_ok, FORM, BITS, ASSEMBLY, HEAD_SIZE, BLOCK_D, BLOCK_N, MASKED
    ).to(q.dtype)
    acc = tl.dot(weight.to(q.dtype), v, acc * decay[:, None], input_precision=precision)
    return acc, acc_zero, row_sum, new_max


@triton.jit
def _affine(x, v_scale_ptr, v_zero_ptr, channel, channel_ok, BITS: tl.constexpr):
    """Calibrated V back to its units: x [..., BLOCK_D] is a weighted mean of q - 2^(BITS - 1)."""
    scale = tl.load(v_scale_ptr + channel, mask=channel_ok, other=0.0)
    zero = tl.load(v_zero_ptr + channel, mask=channel_ok, other=0.0)
    return x * scale + (zero + scale * (2 ** (BITS - 1)))


@triton.jit(do_not_specialize=("first_sequence", "min_tiles", "window", "stride_table"))
def paged_attention_kernel(
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    k_params_ptr,
    v_params_ptr,
    k_scale_ptr,
    v_scale_ptr,
    v_zero_ptr,
    block_tables_ptr,
    context_lens_ptr,
    cu_seqlens_ptr,
    partial_ptr,
    stats_ptr,
    counter_ptr,
    first_sequence,
    min_tiles,
    scale_log2,
    window,
    stride_q_row,
    stride_q_head,
    stride_table,
    stride_block: tl.constexpr,
    stride_slot: tl.constexpr,
    stride_head: tl.constexpr,
    stride_param_block: tl.constexpr,
    stride_param_slot: tl.constexpr,
    stride_param_head: tl.constexpr,
    FORM: tl.constexpr,
    BITS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    DECODE: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOWED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL_PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (splits or query tiles, K, sequences). Strides count what the pointers point to.

    partial [sequences, K, splits, GROUP, BLOCK_D] and stats [..., 2] (maximum, sum) are written and
    read only if more than one split has keys; counter [sequences, K] ends as it began: zero.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    kv_head = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    sequence = first_sequence + tl.program_id(2)
    context_len = tl.load(context_lens_ptr + sequence)
    BLOCK_Q: tl.constexpr = 1 if DECODE else BLOCK_M // GROUP
    if DECODE:
        first_row, query_len, first_query = sequence, 1, 0
    else:
        first_row = tl.load(cu_seqlens_ptr + sequence)
        query_len = tl.load(cu_seqlens_ptr + sequence + 1) - first_row
        # The last tile has the most keys, so it starts first.
        first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
        if first_query >= query_len:
            return
    index = tl.arange(0, BLOCK_M)
    query = first_query + index // GROUP
    head = kv_head * GROUP + index % GROUP
    query_ok = (index < BLOCK_Q * GROUP) & (query < query_len)
    first_position = context_len - query_len + first_query
    position = first_position + index // GROUP
    high = tl.minimum(context_len, first_position + BLOCK_Q)
    low = tl.maximum(first_position - window + 1, 0) if WINDOWED else 0
    first_key = low // BLOCK_N * BLOCK_N
    num_tiles = tl.cdiv(tl.maximum(high - first_key, 0), BLOCK_N)
    begin, end, num_active = 0, num_tiles, 1
    if SPLIT:
        per_split = tl.maximum(tl.cdiv(num_tiles, tl.num_programs(0)), min_tiles)
        num_active = tl.maximum(tl.cdiv(num_tiles, per_split), 1)
        begin = tl.program_id(0) * per_split
        end = tl.minimum(begin + per_split, num_tiles)
        if tl.program_id(0) >= num_active:
            return

    column = tl.arange(0, BLOCK_D)
    channel, channel_ok = _channels(column, FORM, BITS, HEAD_SIZE)
    row = (first_row + query).to(tl.int64)
    q = tl.load(
        q_ptr + row[:, None] * stride_q_row + head[:, None] * stride_q_head + channel[None, :],
        mask=query_ok[:, None] & channel_ok[None, :],
        other=0.0,
    )
    q_sum = tl.zeros((BLOCK_M,), tl.float32)
    if FORM == "calibrated":
        k_scale = tl.load(k_scale_ptr + kv_head * HEAD_SIZE + channel, mask=channel_ok, other=0.0)
        q = q.to(tl.float32) * k_scale[None, :]
    if FORM != "plain":
        q = q.to(tl.float32) if FULL_PRECISION else q.to(tl.float16)
        q_sum = tl.sum(q.to(tl.float32), 1)

    k_ptr += kv_head.to(tl.int64) * stride_head
    v_ptr += kv_head.to(tl.int64) * stride_head
    k_params_ptr += kv_head.to(tl.int64) * stride_param_head
    v_params_ptr += kv_head.to(tl.int64) * stride_param_head
    table_ptr = block_tables_ptr + sequence.to(tl.int64) * stride_table
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    acc_zero = tl.zeros((BLOCK_M,), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    # Tiles that every query of a prefill tile sees whole need no mask; a decode program runs too few
    # tiles to pay for filling the pipeline twice.
    full_begin, full_end = begin, begin
    if not DECODE:
        if WINDOWED:
            last_low = first_position + BLOCK_Q - window
            full_begin = tl.minimum(tl.cdiv(tl.maximum(last_low - first_key, 0), BLOCK_N), end)
        full_end = tl.minimum((first_position + 1 - first_key) // BLOCK_N, end)
        full_end = tl.maximum(full_end, full_begin)
        block = _load_block(table_ptr, first_key + full_begin * BLOCK_N, high, BLOCK_SIZE, BLOCK_N)
        for tile in range(full_begin, full_end):
            start = first_key + tile * BLOCK_N
            next_block = _load_block(table_ptr, start + BLOCK_N, high, BLOCK_SIZE, BLOCK_N)
            acc, acc_zero, row_sum, row_max = _attend_tile(
                q, q_sum, acc, acc_zero, row_sum, row_max, k_ptr, v_ptr, k_params_ptr, v_params_ptr,
                block, start, low, high, position, window, scale_log2,
                stride_block, stride_slot, stride_param_block, stride_param_slot, FORM, BITS, ASSEMBLY, DECODE,
                WINDOWED, HEAD_SIZE, BLOCK_D, BLOCK_SIZE, BLOCK_N, FULL_PRECISION, False,
            )  # fmt: skip
            block = next_block
    num_full = full_end - full_begin
    start = first_key + tl.where(begin < full_begin, begin, begin + num_full) * BLOCK_N
    block = _load_block(table_ptr, start, high, BLOCK_SIZE, BLOCK_N)
    for edge in range(begin, end - num_full):
        start = first_key + tl.where(edge < full_begin, edge, edge + num_full) * BLOCK_N
        after = first_key + tl.where(edge + 1 < full_begin, edge + 1, edge + 1 + num_full) * BLOCK_N
        next_block = _load_block(table_ptr, after, high, BLOCK_SIZE, BLOCK_N)
        acc, acc_zero, row_sum, row_max = _attend_tile(
            q, q_sum, acc, acc_zero, row_sum, row_max, k_ptr, v_ptr, k_params_ptr, v_params_ptr,
            block, start, low, high, position, window, scale_log2,
            stride_block, stride_slot, stride_param_block, stride_param_slot, FORM, BITS, ASSEMBLY, DECODE,
            WINDOWED, HEAD_SIZE, BLOCK_D, BLOCK_SIZE, BLOCK_N, FULL_PRECISION, True,
        )  # fmt: skip
        block = next_block

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if FORM == "online":
        acc = acc * (1.0 / 256.0) + acc_zero[:, None]
    num_heads = num_kv_heads * GROUP
    if num_active == 1:
        mean = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
        if FORM == "calibrated":
            table_channel = (kv_head * HEAD_SIZE + channel)[None, :]
            mean = _affine(mean, v_scale_ptr, v_zero_ptr, table_channel, channel_ok[None, :], BITS)
            mean = tl.where((row_sum > 0)[:, None], mean, 0.0)
        tl.store(
            out_ptr + (row * num_heads + head)[:, None] * HEAD_SIZE + channel[None, :],
            mean.to(out_ptr.dtype.element_ty),
            mask=query_ok[:, None] & channel_ok[None, :],
        )
        return
    if SPLIT:
        num_splits = tl.num_programs(0)
        pair = (tl.program_id(2) * num_kv_heads + kv_head).to(tl.int64)
        base = pair * num_splits * GROUP
        own = base + tl.program_id(0) * GROUP + index
        own_ok = index < GROUP
        tl.store(partial_ptr + own[:, None] * BLOCK_D + column[None, :], acc, mask=own_ok[:, None])
        tl.store(stats_ptr + own * 2, row_max, mask=own_ok)
        tl.store(stats_ptr + own * 2 + 1, row_sum, mask=own_ok)
        tl.debug_barrier()
        finished = tl.atomic_add(counter_ptr + pair, 1, sem="acq_rel")
        if finished == num_active - 1:
            tl.store(counter_ptr + pair, 0)
            for g in range(GROUP):
                mean = _combine(partial_ptr, stats_ptr, base + g, num_active, GROUP, BLOCK_D)
                if FORM == "calibrated":
                    table_channel = kv_head * HEAD_SIZE + channel
                    mean = _affine(mean, v_scale_ptr, v_zero_ptr, table_channel, channel_ok, BITS)
                out_row = sequence.to(tl.int64) * num_heads + kv_head * GROUP + g
                tl.store(
                    out_ptr + out_row * HEAD_SIZE + channel,
                    mean.to(out_ptr.dtype.element_ty),
                    mask=channel_ok,
                )


@triton.jit
def _combine(partial_ptr, stats_ptr, base, num_active, GROUP: tl.constexpr, BLOCK_D: tl.constexpr):
    """Weighted mean [BLOCK_D] of one head's splits, always added in the same order.

    The loads skip L1: other multiprocessors wrote these lines.
    """
    CHUNK: tl.constexpr = 16
    column = tl.arange(0, BLOCK_D)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    mean = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, num_active, CHUNK):
        split = first + tl.arange(0, CHUNK)
        split_ok = split < num_active
        row = base + split * GROUP
        split_max = tl.load(
            stats_ptr + row * 2, mask=split_ok, other=float("-inf"), cache_modifier=".cg"
        )
        split_sum = tl.load(stats_ptr + row * 2 + 1, mask=split_ok, other=0.0, cache_modifier=".cg")
        partial = tl.load(
            partial_ptr + row[:, None] * BLOCK_D + column[None, :],
            mask=split_ok[:, None],
            other=0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(split_max, 0))
        decay = tl.exp2(top - new_top)
        weight = tl.exp2(split_max - new_top)
        total = total * decay + tl.sum(weight * split_sum, 0)
        mean = mean * decay + tl.sum(weight[:, None] * partial, 0)
        top = new_top
    return mean / total
