"""Drives a decoder over a paged pool without scheduler or runner: the smallest honest caller."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from engine.layers.kv_cache import allocate_kv
from engine.models.weights import Model
from engine.types import BatchInputs


class PagedRun:
    """Sequences by number, with scattered blocks; each step takes new tokens of some of them."""

    def __init__(self, model: Model, *, block_size: int = 5, num_blocks: int = 200) -> None:
        self.decoder, self.block_size = model.decoder, block_size
        weight = model.decoder.embed_weight
        self.device = weight.device
        self.kv = allocate_kv(model.spec, num_blocks, block_size, weight.dtype, weight.device)
        self._free = list(range(num_blocks))
        random.Random(0).shuffle(self._free)
        self._tables: dict[int, list[int]] = {}
        self._lens: dict[int, int] = {}

    def inputs(self, chunks: dict[int, list[int]]) -> BatchInputs:
        """New tokens per sequence; those with one token on top of a context decode, and come first."""
        order = sorted(chunks, key=lambda s: not (len(chunks[s]) == 1 and self._lens.get(s, 0) > 0))
        num_decodes = sum(len(chunks[s]) == 1 and self._lens.get(s, 0) > 0 for s in order)
        ids, positions, slots, lens = [], [], [], []
        for s in order:
            table, start = self._tables.setdefault(s, []), self._lens.get(s, 0)
            end = start + len(chunks[s])
            while len(table) * self.block_size < end:
                table.append(self._free.pop())
            ids += chunks[s]
            positions += range(start, end)
            slots += [table[p // self.block_size] * self.block_size + p % self.block_size
                      for p in range(start, end)]  # fmt: skip
            self._lens[s] = end
            lens.append(end)
        width = max(len(self._tables[s]) for s in order)
        tables = [self._tables[s] + [-1] * (width - len(self._tables[s])) for s in order]
        query_lens = tuple(len(chunks[s]) for s in order)
        self.order = order

        def tensor(values, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        return BatchInputs(
            input_ids=tensor(ids, torch.int64),
            positions=tensor(positions, torch.int64),
            slots=tensor(slots, torch.int64),
            cu_seqlens=tensor((0, *query_lens)).cumsum(0).int(),
            context_lens=tensor(lens),
            block_tables=tensor(tables),
            query_lens=query_lens,
            max_context_len=max(lens),
            num_decodes=num_decodes,
        )

    @torch.inference_mode()
    def step(self, chunks: dict[int, list[int]], hidden: Tensor | None = None) -> dict[int, Tensor]:
        """Logits [rows, V] of every row, by sequence; hidden replaces the embedding if given."""
        inputs = self.inputs(chunks)
        hidden = self.decoder.embed(inputs.input_ids) if hidden is None else hidden
        logits = self.decoder.logits(self.decoder(hidden, inputs, self.kv))
        return dict(zip(self.order, logits.split(inputs.query_lens), strict=True))


@torch.inference_mode()
def plain_logits(model: Model, *prompts: list[int]) -> list[Tensor]:
    """Logits [T, V] of whole prompts in one batch, without a cache."""
    query_lens = tuple(len(p) for p in prompts)
    lens = torch.tensor(query_lens, dtype=torch.int32)
    inputs = BatchInputs(
        input_ids=torch.tensor([token for p in prompts for token in p]),
        positions=torch.cat([torch.arange(n) for n in query_lens]),
        slots=torch.empty(0, dtype=torch.int64),
        cu_seqlens=torch.cat((torch.zeros(1, dtype=torch.int32), lens.cumsum(0).int())),
        context_lens=lens,
        block_tables=torch.empty(len(prompts), 0, dtype=torch.int32),
        query_lens=query_lens,
        max_context_len=max(query_lens),
    )
    decoder = model.decoder
    logits = decoder.logits(decoder(decoder.embed(inputs.input_ids), inputs, None))
    return list(logits.split(query_lens))
