"""A scattered KV pool for kernel tests: what no sequence owns is NaN, and so are outputs before a launch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.kv_quant import CalibratedKV, KVQuant, OnlineKV
from engine.layers.kv_cache import strided_zeros

FORMS = {
    "plain": None,
    "online int8": ("online", 8),
    "online int4": ("online", 4),
    "calibrated int8": ("calibrated", 8),
    "calibrated int4": ("calibrated", 4),
}


def random(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """NaN counts as infinite."""
    actual, expected = actual.double(), expected.double()
    error = ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


@dataclass
class Pool:
    """Caches, tables and the rows that were written; q [T, H, D] asks them."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    quant: KVQuant | None
    tables: Tensor
    context_lens: Tensor
    cu_seqlens: Tensor
    query_lens: tuple[int, ...]
    num_decodes: int

    def expected(self, scale: float, window: int | None) -> Tensor:
        """The reference on the CPU in fp32, over what the caches hold; empty sequences get zeros."""
        k_cache, v_cache = self.k_cache.cpu(), self.v_cache.cpu()
        quant = self.quant
        if quant is None:
            k_cache, v_cache = k_cache.float(), v_cache.float()
        else:
            quant = replace(
                quant, **{k: v.cpu() for k, v in vars(quant).items() if isinstance(v, Tensor)}
            )
        out = reference.paged_attention(
            self.q.float().cpu(),
            k_cache,
            v_cache,
            self.tables.cpu(),
            self.context_lens.cpu(),
            self.query_lens,
            int(self.context_lens.max()),
            self.num_decodes,
            scale,
            window,
            quant,
        )
        for b, context in enumerate(self.context_lens.tolist()):
            if context == 0:
                out[self.cu_seqlens[b] : self.cu_seqlens[b + 1]] = 0
        return out.to(self.q.device)


def empty_caches(
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    form: str,
    *,
    head_major: bool = False,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, KVQuant | None]:
    """NaN everywhere; calibrated ranges are those of normal rows, different for each channel."""

    def pool(width: int, of: torch.dtype) -> Tensor:
        cache = strided_zeros((num_blocks, block_size, num_kv_heads, width), of, device, head_major)
        return cache.fill_(255 if of == torch.uint8 else float("nan"))

    if FORMS[form] is None:
        return pool(head_size, dtype), pool(head_size, dtype), None
    kind, bits = FORMS[form]
    width = head_size * bits // 8
    k_cache, v_cache = pool(width, torch.uint8), pool(width, torch.uint8)
    if kind == "online":
        return k_cache, v_cache, OnlineKV(bits, pool(2, torch.float16), pool(2, torch.float16))
    ranges = []
    for seed in (11, 12):
        low = -3 + 0.3 * random(num_kv_heads, head_size, seed=seed, device=device)
        high = 3 + 0.3 * random(num_kv_heads, head_size, seed=seed + 2, device=device)
        ranges += [(high - low) / (2**bits - 1), low]
    return k_cache, v_cache, CalibratedKV(bits, *ranges)


def make_pool(
    contexts: tuple[int, ...],
    query_lens: tuple[int, ...],
    num_decodes: int,
    *,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    head_size: int = 16,
    block_size: int = 5,
    dtype: torch.dtype = torch.float32,
    form: str = "plain",
    head_major: bool = False,
    device: str = "cpu",
) -> Pool:
    """Sequences of random rows in shuffled blocks; the tables' unused ends are -1."""
    counts = [-(-context // block_size) for context in contexts]
    num_blocks = sum(counts) + 2
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3))
    tables = torch.full((len(contexts), max(counts) + 1), -1, dtype=torch.int32)
    k_cache, v_cache, quant = empty_caches(
        num_blocks, block_size, num_kv_heads, head_size, dtype, form,
        head_major=head_major, device=device,
    )  # fmt: skip
    used = 0
    for b, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        blocks = order[used : used + count]
        used += count
        tables[b, :count] = blocks
        positions = torch.arange(context)
        slots = (blocks[positions // block_size] * block_size + positions % block_size).to(device)
        k = random(context, num_kv_heads, head_size, seed=b, device=device).to(dtype)
        v = random(context, num_kv_heads, head_size, seed=b + 99, device=device).to(dtype)
        reference.store_kv(k, v + 0.5, k_cache, v_cache, slots, quant)
    return Pool(
        q=random(sum(query_lens), num_heads, head_size, seed=7, device=device).to(dtype),
        k_cache=k_cache,
        v_cache=v_cache,
        quant=quant,
        tables=tables.to(device),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        cu_seqlens=torch.tensor((0, *query_lens), device=device).cumsum(0).int(),
        query_lens=query_lens,
        num_decodes=num_decodes,
    )
