"""The KV pool: for each layer, keys and values of all sequences in blocks of block_size tokens.

Which block belongs to whom is the scheduler's knowledge. Keys are stored after rotation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class KVShape(Protocol):
    """What a ModelSpec tells about its cache."""

    num_layers: int
    num_kv_heads: int
    head_size: int


@dataclass(frozen=True)
class KVCache:
    """One layer's pool."""

    k: Tensor  # [num_blocks, block_size, K, D]
    v: Tensor  # [num_blocks, block_size, K, D]


def allocate_kv(
    spec: KVShape,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> list[KVCache]:
    """One KVCache per layer, zeroed: a slot that nobody wrote must not hold NaN."""
    shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_size)
    return [
        KVCache(
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
        )
        for _ in range(spec.num_layers)
    ]


def kv_bytes_per_block(spec: KVShape, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    row = spec.num_kv_heads * spec.head_size * dtype.itemsize
    return 2 * spec.num_layers * block_size * row
