"""A step's numbers in one buffer: written on the host, copied to the device once, read through views.

A captured graph keeps one such buffer on the device, with a row for every sequence of its batch size;
rows that a step does not need are padding, which computes something finite and stores nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from engine.scheduler import Work
from engine.types import BatchInputs

_ALIGNED_WORDS = 32  # Triton compiles again for a pointer that 16 does not divide


@dataclass(frozen=True)
class InputLayout:
    """Where each tensor of BatchInputs lies in a buffer of int32; width counts blocks of a table."""

    num_rows: int
    num_sequences: int
    width: int
    has_rope_lens: bool = False

    @property
    def num_words(self) -> int:
        return max(start + words for _, start, words, _, _ in self._places())

    def device_views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tensors inside an int32 buffer of num_words or more."""
        return {
            name: buffer[start : start + words].view(dtype).view(shape)
            for name, start, words, dtype, shape in self._places()
        }

    def host_views(self, buffer: Tensor) -> dict[str, np.ndarray]:
        """The same inside a buffer on the host, as NumPy: ten times faster to fill from lists."""
        array = buffer.numpy()
        return {
            name: array[start : start + words]
            .view(np.int64 if dtype == torch.int64 else np.int32)
            .reshape(shape)
            for name, start, words, dtype, shape in self._places()
        }

    def _places(self) -> Iterator[tuple[str, int, int, torch.dtype, tuple[int, ...]]]:
        """(name, first word, words, dtype, shape)."""
        rows, sequences = (self.num_rows,), (self.num_sequences,)
        fields = [
            ("input_ids", torch.int64, rows),
            ("positions", torch.int64, rows),
            ("slots", torch.int64, rows),
            ("cu_seqlens", torch.int32, (self.num_sequences + 1,)),
            ("context_lens", torch.int32, sequences),
            ("block_tables", torch.int32, (self.num_sequences, self.width)),
        ]
        if self.has_rope_lens:
            fields.append(("rope_lens", torch.int64, rows))
        start = 0
        for name, dtype, shape in fields:
            words = prod(shape) * dtype.itemsize // 4
            yield name, start, words, dtype, shape
            start += -(-words // _ALIGNED_WORDS) * _ALIGNED_WORDS


def first_position(item: Work, ahead: int) -> int:
    """Position of an item's first row; ahead 1: the step before it is not committed yet."""
    return item.sequence.num_computed + ahead


def write_inputs(
    layout: InputLayout, buffer: Tensor, work: Rows[Work], block_size: int, ahead: int = 0
) -> None:
    """Fill a host buffer with the step `work` and, past its rows, with padding.

    ahead 1: input_ids stay zero, because nobody on the host knows them yet.
    """
    buffer.zero_()
    views = layout.host_views(buffer)
    ids, positions, slots, contexts, ends, rope_lens = [], [], [], [], [], []
    for index, item in enumerate(work):
        sequence, table = item.sequence, item.sequence.block_table
        begin = first_position(item, ahead)
        end = begin + item.count
        if not ahead:
            ids += sequence.tokens[begin:end]
        if item.count == 1:
            positions.append(begin)
            slots.append(table[begin // block_size] * block_size + begin % block_size)
        else:
            positions += range(begin, end)
            slots += [
                table[p // block_size] * block_size + p % block_size for p in range(begin, end)
            ]
        if layout.has_rope_lens:
            rope_lens += [max(p + 1, sequence.num_prompt) for p in range(begin, end)]
        contexts.append(end)
        ends.append(len(positions))
        used = min(len(table), layout.width)
        views["block_tables"][index, :used] = table[:used]
    num_rows, num_padding = len(positions), layout.num_rows - len(positions)
    views["input_ids"][: len(ids)] = ids
    views["positions"][:num_rows] = positions
    views["slots"][:num_rows] = slots
    views["slots"][num_rows:] = -1
    views["context_lens"][: len(contexts)] = contexts
    views["cu_seqlens"][1 : len(ends) + 1] = ends
    views["cu_seqlens"][len(ends) + 1 :] = range(num_rows + 1, num_rows + num_padding + 1)
    if layout.has_rope_lens:
        views["rope_lens"][:num_rows] = rope_lens


def decode_inputs(layout: InputLayout, buffer: Tensor, max_context_len: int) -> BatchInputs:
    """Views of a device buffer as a step of single rows, padding included."""
    count = layout.num_sequences
    views = layout.device_views(buffer)
    return BatchInputs(
        **views, query_lens=(1,) * count, max_context_len=max_context_len, num_decodes=count
    )


def to_device(values: list | tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of host numbers, without waiting for the device: a copy from pageable memory would.

    torch gives pinned memory away again only when the copy out of it is done.
    """
    tensor = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)
