"""The KV pool: for each layer, keys and values of all sequences in blocks of block_size tokens.

Which block belongs to whom is the scheduler's knowledge. Keys are stored after rotation. quant_policy 8
and 4 store integers, each row with its own scale and zero (kernels/kv_quant.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from engine.kernels.kv_quant import CalibratedKV, KVQuant, OnlineKV

QuantPolicy = Literal[0, 8, 4]
NUM_COUNTERS = 2**16


class KVShape(Protocol):
    """What a ModelSpec tells about its cache."""

    num_layers: int
    num_kv_heads: int
    head_size: int


@dataclass(frozen=True)
class KVCache:
    """One layer's pool. On a GPU the rows of one KV head of a block lie one after another."""

    k: Tensor  # [num_blocks, block_size, K, D]; quantized: uint8, D * bits / 8 wide
    v: Tensor  # as k
    quant: KVQuant | None = None
    counters: Tensor | None = None  # int32 zeros that all layers share: kernels.paged_attention


def allocate_kv(
    spec: KVShape,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    quant_policy: QuantPolicy = 0,
    calibration: list[CalibratedKV] | None = None,
) -> list[KVCache]:
    """One KVCache per layer, zeroed: a slot that nobody wrote must not hold NaN.

    calibration: static ranges per layer, in place of each row's own; its bits are quant_policy's.
    """
    is_cuda = torch.device(device).type == "cuda"
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device) if is_cuda else None
    width, stored = _row(spec, dtype, quant_policy)

    def pool(width: int, dtype: torch.dtype) -> Tensor:
        shape = (num_blocks, block_size, spec.num_kv_heads, width)
        return strided_zeros(shape, dtype, device, head_major=is_cuda)

    def quant(layer: int) -> KVQuant | None:
        if quant_policy == 0:
            return None
        if calibration is not None:
            return calibration[layer]
        return OnlineKV(quant_policy, pool(2, torch.float16), pool(2, torch.float16))

    return [
        KVCache(pool(width, stored), pool(width, stored), quant(layer), counters)
        for layer in range(spec.num_layers)
    ]


def kv_bytes_per_block(
    spec: KVShape,
    block_size: int,
    dtype: torch.dtype,
    quant_policy: QuantPolicy = 0,
    is_calibrated: bool = False,
) -> int:
    """Bytes of one block over all layers, keys and values."""
    width, stored = _row(spec, dtype, quant_policy)
    row = width * stored.itemsize
    if quant_policy != 0 and not is_calibrated:
        row += 2 * torch.float16.itemsize
    return 2 * spec.num_layers * block_size * spec.num_kv_heads * row


def strided_zeros(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device | str,
    head_major: bool,
) -> Tensor:
    """Zeros of shape [num_blocks, block_size, K, width]; head_major: a head's rows are contiguous."""
    blocks, block_size, heads, width = shape
    if not head_major:
        return torch.zeros(shape, dtype=dtype, device=device)
    stored = torch.zeros(blocks, heads, block_size, width, dtype=dtype, device=device)
    return stored.transpose(1, 2)


def _row(spec: KVShape, dtype: torch.dtype, quant_policy: QuantPolicy) -> tuple[int, torch.dtype]:
    """(elements, dtype) of one token's key of one head as it is stored."""
    if quant_policy == 0:
        return spec.head_size, dtype
    return spec.head_size * quant_policy // 8, torch.uint8
