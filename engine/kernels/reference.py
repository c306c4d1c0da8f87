"""Every op of the decoder in plain torch: the definition that kernels are tested against, and the CPU path.

Dims: T tokens (rows) of B sequences, H query heads, K KV heads, G = H / K, D head size. Half types
accumulate norms, rotary and softmax in fp32; fp32 stays fp32 throughout. How a quantized KV cache
rounds is kv_quant.py's knowledge.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.kv_quant import KVQuant, OnlineKV, dequantize, quantize, quantize_rows

# Column j of every eight sits in nibble AWQ_ORDER.index(j) of its int32, lowest nibble first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_SHIFTS = tuple(4 * AWQ_ORDER.index(column) for column in range(8))
_scratch = threading.local()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., N] / rms(x) * weight [N], over the last dimension."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); neither input is changed."""
    residual = x + residual
    return rms_norm(residual, weight, eps), residual


def add_partials(partials: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product [T, N] that split-K sums [S, T, N] fp32 and a bias [N] stand for."""
    total = partials.sum(0)
    return (total if bias is None else total + bias).to(dtype)


def add_rms_norm_partials(
    partials: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """add_rms_norm with x = add_partials(partials, bias), in residual's type."""
    return add_rms_norm(add_partials(partials, bias, residual.dtype), residual, weight, eps)


def silu_and_mul_partials(partials: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """silu_and_mul of add_partials(partials [S, T, 2 I], bias, dtype)."""
    return silu_and_mul(add_partials(partials, bias, dtype))


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, N, D] by cos, sin [T, D] fp32; dimension i pairs with i + D/2 (neox pairing).

    sin carries the pair's sign: its first half is negated (see layers/rotary.py).
    """
    rolled = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos[:, None], rolled, sin[:, None]).to(x.dtype)


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up for x [T, 2 * I], gate first. Returns [T, I]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def store_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    quant: KVQuant | None = None,
) -> None:
    """Write rows k, v [T, K, D] to slots [T] of k_cache, v_cache [blocks, block_size, K, D]; -1 skips.

    quant: the caches are uint8 [blocks, block_size, K, D * bits / 8], and rows are quantized first.
    """
    kept = slots >= 0
    if not kept.all():
        k, v, slots = k[kept], v[kept], slots[kept]
    if isinstance(quant, OnlineKV):
        k, k_params = quantize_rows(k, quant.bits)
        v, v_params = quantize_rows(v, quant.bits)
        _write_rows(quant.k_params, slots, k_params)
        _write_rows(quant.v_params, slots, v_params)
    elif quant is not None:
        k = quantize(k, quant.k_scale, quant.k_zero, quant.bits)
        v = quantize(v, quant.v_scale, quant.v_zero, quant.bits)
    _write_rows(k_cache, slots, k)
    _write_rows(v_cache, slots, v)


def project_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, (H + 2 K) D] -> q [T, H, D] and k [T, K, D], normed if there are weights and rotated; v.

    q_norm, k_norm: RMSNorm weights [D] over each head; both or neither.
    """
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
    turning = num_heads + num_kv_heads
    if q_norm is None:
        qk = apply_rotary(heads[:, :turning], cos, sin)
        q, k = qk[:, :num_heads], qk[:, num_heads:]
    else:
        q = apply_rotary(rms_norm(heads[:, :num_heads], q_norm, eps), cos, sin)
        k = apply_rotary(rms_norm(heads[:, num_heads:turning], k_norm, eps), cos, sin)
    return q, k, heads[:, turning:]


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
    """project_qkv, then store_kv. Returns q [T, H, D]."""
    num_kv_heads = k_cache.shape[2]
    num_heads = qkv.shape[1] // cos.shape[1] - 2 * num_kv_heads
    q, k, v = project_qkv(qkv, cos, sin, num_heads, num_kv_heads, q_norm, k_norm, eps)
    store_kv(k, v, k_cache, v_cache, slots, quant)
    return q


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
) -> Tensor:
    """Causal attention of q [T, H, D] over keys already in the cache. Returns [T, H, D].

    The first num_decodes sequences own one row each and are read together if there are several; the
    others own query_lens[b] rows, the last ones of their context. Query i sees key j iff 0 <= i - j < window.
    Rows past the last sequence come back as zeros. context_lens [B], block_tables [B, max_blocks].
    """
    pieces = []
    batched = num_decodes if num_decodes > 1 else 0
    if batched:
        piece = _decode_attention(
            q[:batched],
            k_cache,
            v_cache,
            block_tables[:batched],
            context_lens[:batched],
            max_context_len,
            scale,
            window,
            quant,
        )
        pieces.append(piece)
    row = batched
    context_on_host = context_lens[batched:].clamp(min=1).tolist()  # padding reads one token
    for b, context_len in enumerate(context_on_host, start=batched):
        query_len = query_lens[b]
        first = 0 if window is None else max(0, context_len - query_len - window + 1)
        k = _gather(k_cache, "k", block_tables[b], first, context_len, quant, q.dtype)
        v = _gather(v_cache, "v", block_tables[b], first, context_len, quant, q.dtype)
        pieces.append(_attend(q[row : row + query_len], k, v, scale, window))
        row += query_len
    if row < q.shape[0]:
        pieces.append(torch.zeros_like(q[row:]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_lens: tuple[int, ...],
    scale: float,
    window: int | None,
) -> Tensor:
    """Causal attention without a cache: sequences of query_lens rows lie one after another.

    q [T, H, D], k and v [T, K, D]. Returns [T, H, D].
    """
    parts = zip(q.split(query_lens), k.split(query_lens), v.split(query_lens), strict=True)
    pieces = [_attend(qs, ks, vs, scale, window) for qs, ks, vs in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def unpack_awq(packed: Tensor) -> Tensor:
    """int32 [R, N / 8] in AWQ's nibble order -> int32 [R, N] of 0..15 in column order."""
    shifts = torch.tensor(_AWQ_SHIFTS, dtype=torch.int32, device=packed.device)
    return ((packed[:, :, None] >> shifts) & 15).flatten(1)


def dequantize_awq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype
) -> Tensor:
    """(q - zero) * scale, computed in fp32, as [in, out] of dtype.

    qweight [in, out / 8], qzeros [in / group_size, out / 8], scales [in / group_size, out].
    """
    in_features, groups = qweight.shape[0], scales.shape[0]
    centred = unpack_awq(qweight).view(groups, group_size, -1) - unpack_awq(qzeros)[:, None]
    return (centred * scales.float()[:, None]).view(in_features, -1).to(dtype)


def w4a16_matmul(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, bias: Tensor | None
) -> Tensor:
    """x [T, in] times a dequantized AWQ weight [in, out], plus bias [out]. Returns [T, out]."""
    weight = dequantize_awq(qweight, qzeros, scales, group_size, x.dtype)
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def _decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    max_context_len: int,
    scale: float,
    window: int | None,
    quant: KVQuant | None,
) -> Tensor:
    """One gather of whole blocks and one masked attention for n single-row queries."""
    n, num_heads, head_size = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    lens = context_lens[:, None].long().clamp(min=1)  # padding rows read one token
    num_blocks = max(1, -(-max_context_len // block_size))
    offsets = torch.arange(num_blocks * block_size, device=q.device)
    if window is None or window >= max_context_len:
        positions = offsets.expand(n, -1)
        hidden = positions >= lens  # [n, S]
        blocks = block_tables[:, :num_blocks]
    else:
        num_blocks = min(num_blocks, -(-window // block_size) + 1)
        first_block = (lens - window).clamp(min=0) // block_size
        positions = first_block * block_size + offsets[: num_blocks * block_size]
        hidden = (positions >= lens) | (positions < lens - window)
        columns = first_block + torch.arange(num_blocks, device=q.device)
        blocks = block_tables.gather(1, columns.clamp(max=block_tables.shape[1] - 1))
    blocks = blocks.clamp(min=0).flatten()
    k, v = _select_blocks(k_cache, blocks, "k"), _select_blocks(v_cache, blocks, "v")
    if quant is not None:
        k = _to_floats(k, "k", blocks, quant, q.dtype)
        v = _to_floats(v, "v", blocks, quant, q.dtype)
    k = k.view(n, -1, num_kv_heads, head_size)
    v = v.view(n, -1, num_kv_heads, head_size)
    # A hidden row may hold what an earlier request left, NaN included, and 0 * NaN is NaN.
    rows = hidden.flatten().nonzero().squeeze(1)
    k.flatten(0, 1).index_fill_(0, rows, 0)
    v.flatten(0, 1).index_fill_(0, rows, 0)
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
    mask.masked_fill_(hidden, float("-inf"))
    # The H / K query heads of one KV head stand where query rows would: no key is copied per head.
    out = F.scaled_dot_product_attention(
        q.reshape(n, num_kv_heads, num_heads // num_kv_heads, head_size),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask[:, None, None],  # a float mask is three times faster here than a bool one
        scale=scale,
    )
    return out.reshape(n, num_heads, head_size)


def _select_blocks(cache: Tensor, blocks: Tensor, name: str) -> Tensor:
    """cache[blocks], on the CPU into memory that this thread keeps for the tensor called name.

    Fresh pages cost more than the copy: 16 sequences of 1,000 tokens (K 2, D 64, fp32, one core of a
    Xeon) gather in 0.5 ms here and in 5.7 ms into a new tensor.
    """
    if cache.device.type != "cpu":
        return cache.index_select(0, blocks)
    needed = blocks.shape[0] * cache[0].numel()
    buffer = getattr(_scratch, name, None)
    if buffer is None or buffer.dtype != cache.dtype or buffer.numel() < needed:
        with torch.inference_mode(False):
            buffer = torch.empty(needed, dtype=cache.dtype)
        setattr(_scratch, name, buffer)
    out = buffer[:needed].view(-1, *cache.shape[1:])
    return torch.index_select(cache, 0, blocks, out=out)


def _write_rows(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """cache [blocks, block_size, ...] at slots [T] = rows [T, ...]."""
    if cache.is_contiguous():
        cache.flatten(0, 1).index_copy_(0, slots, rows)
    else:  # a block may hold its heads one after another: flattening would write into a copy
        block_size = cache.shape[1]
        cache[slots // block_size, slots % block_size] = rows


def _gather(
    cache: Tensor,
    name: str,
    block_table: Tensor,
    first: int,
    end: int,
    quant: KVQuant | None,
    dtype: torch.dtype,
) -> Tensor:
    """Tokens first..end of one sequence from cache [blocks, block_size, K, D]: [end - first, K, D]."""
    block_size = cache.shape[1]
    start = first // block_size
    blocks = block_table[start : -(-end // block_size)].clamp(min=0)
    rows = cache.index_select(0, blocks)
    if quant is not None:
        rows = _to_floats(rows, name, blocks, quant, dtype)
    return rows.flatten(0, 1)[first - start * block_size : end - start * block_size]


def _to_floats(
    packed: Tensor, name: str, blocks: Tensor, quant: KVQuant, dtype: torch.dtype
) -> Tensor:
    """The quantized `blocks` of the cache called name, uint8 [n, block_size, K, ...], as dtype."""
    if isinstance(quant, OnlineKV):
        params = quant.k_params if name == "k" else quant.v_params
        scale, zero = params.index_select(0, blocks).float().unsqueeze(-2).unbind(-1)
    elif name == "k":
        scale, zero = quant.k_scale, quant.k_zero
    else:
        scale, zero = quant.v_scale, quant.v_zero
    return dequantize(packed, scale, zero, quant.bits).to(dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """q [L, H, D] are the last L positions of k, v [S, K, D]. Returns [L, H, D]."""
    query_len, key_len = q.shape[0], k.shape[0]
    whole = window is None or key_len <= window
    mask = None
    if not whole or 1 < query_len < key_len:
        i = torch.arange(key_len - query_len, key_len, device=q.device)[:, None]
        j = torch.arange(key_len, device=q.device)
        mask = (j <= i) if whole else (j <= i) & (i - j < window)
    if mask is not None and q.is_cuda:
        # Fused CUDA attention takes a mask or grouped heads, not both; unfused holds [H, L, S].
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None and query_len > 1,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)
