"""Batched sampling on the device: penalties, bans, temperature, top-k, top-p, min-p, one uniform a row.

A token is picked by inverting the cumulative distribution at a uniform number that the host draws from
the sequence's own generator: a seed gives the same tokens whatever else is in the batch, and there is
no device generator a row. Filters apply in transformers' order: top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.sequence import Sequence

INVALID_TOKEN = -1  # stands for a row whose logits are not finite
MIN_TEMPERATURE = 1e-6  # below it fp32 cannot tell the rest from zero: the likeliest token is sure


@dataclass(frozen=True)
class TokenLogprobs:
    """The model's own distribution at one position: the sampled token's and the top n's (ids, ln p)."""

    sampled: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Picks one token for each row of logits; keeps token counts for sequences with penalties."""

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._free_rows = list(range(max_rows))
        self._row_of: dict[int, int] = {}
        self._max_rows = max_rows
        self._output_counts: Tensor | None = None  # [max_rows, V] int32, made on first use
        self._in_prompt: Tensor | None = None  # [max_rows, V] bool

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, sequences: Rows[Sequence], banned: Rows[tuple[int, ...]]
    ) -> tuple[list[int], list[TokenLogprobs | None]]:
        """logits [B, V] float32, changed in place -> one token id a row, and logprobs where asked.

        banned[b] are the token ids that row b must not pick now (ends before min_new_tokens).
        A row with NaN or Inf yields INVALID_TOKEN.
        """
        is_finite = logits.isfinite().all(dim=-1)
        logprobs = _LogprobRows(logits, sequences)
        self._ban_and_bias(logits, sequences, banned)
        self._penalize(logits, sequences)
        tokens = self._pick(logits, sequences)
        self._count(sequences, tokens)
        ids = tokens.masked_fill(~is_finite, INVALID_TOKEN).tolist()
        return ids, logprobs.collect(ids)

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence's counts (finished, or preempted: they are rebuilt from its tokens)."""
        row = self._row_of.pop(sequence.id, None)
        if row is not None:
            self._free_rows.append(row)

    def free(self) -> None:
        """Let go of the counts; nothing is sampled after this."""
        self._output_counts = self._in_prompt = None

    def _ban_and_bias(
        self, logits: Tensor, sequences: Rows[Sequence], banned: Rows[tuple[int, ...]]
    ) -> None:
        rows, columns, values = [], [], []
        for row, (sequence, ids) in enumerate(zip(sequences, banned, strict=True)):
            bias = dict(sequence.params.logit_bias) | dict.fromkeys(ids, float("-inf"))
            rows += [row] * len(bias)
            columns += bias.keys()
            values += bias.values()
        if rows:
            at = (self._tensor(rows), self._tensor(columns))
            logits.index_put_(at, self._tensor(values, torch.float32), accumulate=True)

    def _penalize(self, logits: Tensor, sequences: Rows[Sequence]) -> None:
        rows = [b for b, sequence in enumerate(sequences) if _has_penalty(sequence)]
        if not rows:
            return
        slots = self._tensor([self._slot(sequences[b]) for b in rows])
        params = [sequences[b].params for b in rows]
        counts = self._output_counts[slots]
        seen = self._in_prompt[slots] | (counts > 0)
        repetition = self._column([p.repetition_penalty for p in params])
        frequency = self._column([p.frequency_penalty for p in params])
        presence = self._column([p.presence_penalty for p in params])
        index = self._tensor(rows)
        chosen = logits[index]
        scaled = torch.where(chosen > 0, chosen / repetition, chosen * repetition)
        chosen = torch.where(seen, scaled, chosen)
        logits[index] = chosen - frequency * counts - presence * (counts > 0)

    def _pick(self, logits: Tensor, sequences: Rows[Sequence]) -> Tensor:
        greedy = logits.argmax(dim=-1)
        rows = [b for b, sequence in enumerate(sequences) if sequence.params.temperature > 0]
        if not rows:
            return greedy
        params = [sequences[b].params for b in rows]
        uniform = self._column([sequences[b].uniform() for b in rows])
        index = self._tensor(rows)
        temperature = self._column([max(p.temperature, MIN_TEMPERATURE) for p in params])
        values, order = logits[index].sort(dim=-1, descending=True)
        values = (values - values[:, :1]) / temperature
        probs = values.softmax(dim=-1)
        ranks = torch.arange(probs.shape[-1], device=probs.device)
        limits = self._tensor([p.top_k or probs.shape[-1] for p in params]).unsqueeze(1)
        probs = probs.masked_fill(ranks >= limits, 0.0)
        probs /= probs.sum(dim=-1, keepdim=True)
        before = probs.cumsum(dim=-1) - probs  # mass above this rank; 0 for the first
        probs = probs.masked_fill(before >= self._column([p.top_p for p in params]), 0.0)
        floor = probs[:, :1] * self._column([p.min_p for p in params])
        probs = probs.masked_fill(probs < floor, 0.0)
        cumulative = probs.cumsum(dim=-1)
        picked = (cumulative <= uniform * cumulative[:, -1:]).sum(dim=-1, keepdim=True)
        # Rounding can put the point past the last token that was kept.
        picked = torch.minimum(picked, (probs > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
        return greedy.index_copy(0, index, order.gather(1, picked).squeeze(1))

    def _count(self, sequences: Rows[Sequence], tokens: Tensor) -> None:
        rows = [b for b, sequence in enumerate(sequences) if _has_penalty(sequence)]
        if rows:
            slots = self._tensor([self._row_of[sequences[b].id] for b in rows])
            ones = torch.ones(len(rows), dtype=torch.int32, device=self._device)
            self._output_counts.index_put_((slots, tokens[rows]), ones, accumulate=True)

    def _slot(self, sequence: Sequence) -> int:
        row = self._row_of.get(sequence.id)
        if row is not None:
            return row
        if self._output_counts is None:
            shape = (self._max_rows, self._vocab_size)
            self._output_counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self._device)
        row = self._row_of[sequence.id] = self._free_rows.pop()
        prompt = self._tensor(sequence.tokens[: sequence.num_prompt])
        output = self._tensor(sequence.tokens[sequence.num_prompt :])
        self._in_prompt[row] = False
        self._in_prompt[row, prompt] = True
        self._output_counts[row] = torch.bincount(output, minlength=self._vocab_size)
        return row

    def _tensor(self, values: list, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)

    def _column(self, values: list[float]) -> Tensor:
        return self._tensor(values, torch.float32).unsqueeze(1)


class _LogprobRows:
    """ln p of the untouched logits, for the rows that ask; taken before anything changes them."""

    def __init__(self, logits: Tensor, sequences: Rows[Sequence]) -> None:
        wanted = [s.params.logprobs for s in sequences]
        self._wanted = wanted
        self._rows = [b for b, n in enumerate(wanted) if n is not None]
        self._logprobs = logits[self._rows].log_softmax(dim=-1) if self._rows else None

    def collect(self, tokens: list[int]) -> list[TokenLogprobs | None]:
        result: list[TokenLogprobs | None] = [None] * len(tokens)
        for row, b in enumerate(self._rows):
            line = self._logprobs[row]
            values, ids = line.topk(self._wanted[b])
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
            result[b] = TokenLogprobs(sampled=line[tokens[b]].item(), top=top)
        return result


def _has_penalty(sequence: Sequence) -> bool:
    params = sequence.params
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )
