"""Where an AWQ weight lies for the W4A16 kernels: tile by tile, each tile in the order it is read.

Plain torch, so that a machine without Triton can pack, unpack and test it. A tile is 128 output rows;
along K it is cut into blocks of 128. Word w of a row's block holds k = 32 j + 2 w + {0, 1} for j = 0 to
3, in nibbles j and j + 4: unpacking pair j of sixteen neighbouring words yields 32 neighbouring k, and
x needs no reordering.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.reference import unpack_awq

TILE_N = 128
BLOCK_K = 128
_SLAB_N = 1024  # output columns repacked at a time, to bound the unpacked copy


@dataclass(frozen=True)
class PackedW4A16:
    """A weight [K, N] in kernel layout; rows past N and k past K are padding with scale 0.

    tiles int32 [N / 128, K / 128, 128, 16]; scale_zeros int32 [N / 128, groups, 128]: the scale's bits
    in the low half, the zero point above.
    """

    tiles: Tensor
    scale_zeros: Tensor
    in_features: int
    out_features: int
    group_size: int
    dtype: torch.dtype

    @property
    def num_blocks(self) -> int:
        """Blocks of 128 along K."""
        return self.tiles.shape[1]

    @property
    def group_blocks(self) -> int:
        """Blocks that share one scale; 1 for the small groups too."""
        return -(-self.group_size // BLOCK_K)


def is_packable(group_size: int, in_features: int, dtype: torch.dtype) -> bool:
    """Group sizes 32, 64, any multiple of 128, or one group for all; scales of a half type."""
    whole = group_size == in_features
    fits = group_size in (32, 64) or group_size % BLOCK_K == 0 or whole
    return fits and dtype in (torch.float16, torch.bfloat16)


def pack_w4a16(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> PackedW4A16:
    """AutoAWQ's layout (see layers/awq_format.py) -> kernel layout on the same device."""
    in_features, out_features = qweight.shape[0], scales.shape[1]
    if not is_packable(group_size, in_features, scales.dtype):
        raise ValueError(
            f"group size {group_size} of {in_features} rows with {scales.dtype} scales has no kernel "
            "layout; is_packable says which have."
        )
    num_tiles, num_blocks = -(-out_features // TILE_N), -(-in_features // BLOCK_K)
    tiles = qweight.new_empty(num_tiles, num_blocks, TILE_N, 16)
    for n0 in range(0, out_features, _SLAB_N):
        values = unpack_awq(qweight[:, n0 // 8 : (n0 + _SLAB_N) // 8])  # [K, n]
        first, count = n0 // TILE_N, -(-values.shape[1] // TILE_N)
        slab = values.new_zeros(count * TILE_N, num_blocks * BLOCK_K)
        slab[: values.shape[1], :in_features] = values.T
        nibbles = slab.view(count, TILE_N, num_blocks, 4, 16, 2)
        words = torch.zeros_like(nibbles[:, :, :, 0, :, 0])  # [tiles, 128, blocks, 16]
        for j in range(4):
            for half in range(2):
                words |= nibbles[:, :, :, j, :, half] << (4 * j + 16 * half)
        tiles[first : first + count] = words.transpose(1, 2)
    return PackedW4A16(
        tiles,
        _pack_scales(scales, unpack_awq(qzeros), num_tiles, group_size, num_blocks),
        in_features,
        out_features,
        group_size,
        scales.dtype,
    )


def dequantize_w4a16(packed: PackedW4A16, dtype: torch.dtype) -> Tensor:
    """(q - zero) * scale, computed in fp32, as [N, K] of dtype."""
    q = torch.stack([_nibbles(packed.tiles, j) for j in range(4)], dim=-3)  # [t, b, 128, 4, 16, 2]
    values = q.permute(0, 2, 1, 3, 4, 5).flatten(3).flatten(0, 1).flatten(1)  # [N', K']
    word = packed.scale_zeros.transpose(1, 2).flatten(0, 1)  # [N', groups]
    scales = word.to(torch.int16).view(packed.dtype).float()
    zeros = (word >> 16) & 15
    group = torch.arange(values.shape[1], device=values.device) // packed.group_size
    group = group.clamp(max=word.shape[1] - 1)
    weight = (values - zeros[:, group]) * scales[:, group]
    return weight[: packed.out_features, : packed.in_features].to(dtype)


def _pack_scales(
    scales: Tensor, zeros: Tensor, num_tiles: int, group_size: int, num_blocks: int
) -> Tensor:
    """scales, zeros [groups, N] -> int32 [tiles, groups, 128]; small groups are padded to whole blocks."""
    groups, out_features = scales.shape
    padded = num_blocks * BLOCK_K // group_size if group_size < BLOCK_K else groups
    words = torch.zeros(
        max(groups, padded), num_tiles * TILE_N, dtype=torch.int32, device=scales.device
    )
    low = scales.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    words[:groups, :out_features] = low | (zeros << 16)
    return words.view(-1, num_tiles, TILE_N).transpose(0, 1).contiguous()


def _nibbles(tiles: Tensor, j: int) -> Tensor:
    """Pair j of every word: [..., 16] -> [..., 16, 2]."""
    return torch.stack([(tiles >> (4 * j)) & 15, (tiles >> (4 * j + 16)) & 15], dim=-1)
