"""Every op of the decoder in plain torch: the definition that kernels are tested against, and the CPU path.

Dims: T tokens (rows) of B sequences, H query heads, K KV heads, G = H / K, D head size. Half types
accumulate norms, rotary and softmax in fp32; fp32 stays fp32 throughout. Nothing is quantized here
except AWQ weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Column j of every eight sits in nibble AWQ_ORDER.index(j) of its int32, lowest nibble first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_SHIFTS = tuple(4 * AWQ_ORDER.index(column) for column in range(8))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., N] / rms(x) * weight [N], over the last dimension."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); neither input is changed."""
    residual = x + residual
    return rms_norm(residual, weight, eps), residual


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


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write rows k, v [T, K, D] to slots [T] of k_cache, v_cache [blocks, block_size, K, D]; -1 skips."""
    kept = slots >= 0
    if not kept.all():
        k, v, slots = k[kept], v[kept], slots[kept]
    k_cache.flatten(0, 1).index_copy_(0, slots, k)
    v_cache.flatten(0, 1).index_copy_(0, slots, v)


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
) -> Tensor:
    """Causal attention of q [T, H, D] over keys already in the cache. Returns [T, H, D].

    The first num_decodes sequences own one row each and are read together; the others own
    query_lens[b] rows, the last ones of their context. Query i sees key j iff 0 <= i - j < window.
    Rows past the last sequence come back as zeros. context_lens [B], block_tables [B, max_blocks].
    """
    pieces = []
    if num_decodes:
        decoding = slice(0, num_decodes)
        pieces.append(
            _decode_attention(
                q[decoding],
                k_cache,
                v_cache,
                block_tables[decoding],
                context_lens[decoding],
                max_context_len if len(query_lens) > 1 else None,
                scale,
                window,
            )
        )
    row = num_decodes
    context_on_host = context_lens[num_decodes:].tolist()
    for b, context_len in enumerate(context_on_host, start=num_decodes):
        query_len = query_lens[b]
        if query_len:
            rows = q[row : row + query_len]
            first = 0 if window is None else max(0, context_len - query_len - window + 1)
            slots = _slots_of(block_tables[b], first, context_len, k_cache.shape[1])
            k = k_cache.flatten(0, 1).index_select(0, slots)
            v = v_cache.flatten(0, 1).index_select(0, slots)
            pieces.append(_attend(rows, k, v, scale, window))
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
    max_context_len: int | None,
    scale: float,
    window: int | None,
) -> Tensor:
    """One gather and one masked attention for n single-row queries; None: n is 1, length on the host."""
    n, num_heads, head_size = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    if max_context_len is None:
        context_len = max(1, int(context_lens[0]))
        first = 0 if window is None else max(0, context_len - window)
        slots = _slots_of(block_tables[0], first, context_len, block_size)
        visible = None
    else:
        span = max_context_len if window is None else min(window, max_context_len)
        lens = context_lens[:, None].long().clamp(min=1)
        positions = (lens - span).clamp(min=0) + torch.arange(span, device=q.device)  # [n, span]
        visible = (positions < lens)[:, None, None]
        # A masked position reads the last visible token, never a row that another request wrote:
        # softmax gives it weight 0, and 0 * NaN would still be NaN.
        positions = torch.minimum(positions, lens - 1)
        blocks = block_tables.long().gather(1, positions // block_size)
        slots = (blocks * block_size + positions % block_size).clamp(min=0).flatten()
    k = k_cache.flatten(0, 1).index_select(0, slots).view(n, -1, num_kv_heads, head_size)
    v = v_cache.flatten(0, 1).index_select(0, slots).view(n, -1, num_kv_heads, head_size)
    # The G query heads of one KV head stand where query rows would: no key is copied per head.
    grouped = q.reshape(n, num_kv_heads, num_heads // num_kv_heads, head_size)
    out = F.scaled_dot_product_attention(
        grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=visible, scale=scale
    )
    return out.reshape(n, num_heads, head_size)


def _slots_of(block_table: Tensor, first: int, end: int, block_size: int) -> Tensor:
    """Slots of the tokens first..end of one sequence, int64 [end - first]."""
    start_block = first // block_size
    blocks = block_table[start_block : -(-end // block_size)].long().clamp(min=0)
    offsets = torch.arange(block_size, device=block_table.device)
    slots = (blocks[:, None] * block_size + offsets).flatten()
    return slots[first - start_block * block_size : end - start_block * block_size]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """q [L, H, D] are the last L positions of k, v [S, K, D]. Returns [L, H, D]."""
    query_len, key_len = q.shape[0], k.shape[0]
    whole = window is None or key_len <= window
    mask = None
    if not whole or 1 < query_len < key_len:
        i = torch.arange(key_len - query_len, key_len, device=q.device)[:, None]
        j = torch.arange(key_len, device=q.device)
        mask = (j <= i) if whole else (j <= i) & (i - j < window)
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
