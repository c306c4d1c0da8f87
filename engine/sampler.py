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

from engine.inputs import to_device
from engine.sequence import Sequence

INVALID_TOKEN = -1  # stands for a row whose logits are not finite
MIN_TEMPERATURE = 1e-6  # below it fp32 cannot tell the rest from zero: the likeliest token is sure


@dataclass(frozen=True)
class TokenLogprobs:
    """The model's own distribution at one position: the sampled token's and the top n's (ids, ln p)."""

    sampled: float
    top: tuple[tuple[int, float], ...]


class Sampled:
    """The tokens of one step. `tokens` [B] stay on the device, each a valid id: the next step may read them."""

    def __init__(self, tokens: Tensor, ids: Tensor, logprobs: _LogprobRows) -> None:
        self.tokens = tokens
        self._ids, self._logprobs = ids, logprobs
        self._copied: torch.cuda.Event | None = None
        if ids.is_cuda:
            self._ids = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
            self._ids.copy_(ids, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(ids.device))

    @torch.inference_mode()
    def collect(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Wait for the device: (ids, INVALID_TOKEN where there is none; logprobs where asked)."""
        if self._copied is not None:
            self._copied.synchronize()
        ids = self._ids.tolist()
        return ids, self._logprobs.collect(ids)


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
        self,
        logits: Tensor,
        sequences: Rows[Sequence],
        banned: Rows[tuple[int, ...]],
        ahead: int = 0,
    ) -> Sampled:
        """logits [B, V] float32, changed in place -> one token a row, on its way to the host.

        banned[b] are the token ids that row b must not pick now (ends before min_new_tokens).
        A row with NaN or Inf yields INVALID_TOKEN. ahead 1: each sequence's last token is not known yet.
        """
        low, high = logits.aminmax(dim=-1)  # NaN wins both
        is_finite = high - low < float("inf")
        logprobs = _LogprobRows(logits, sequences)
        self._ban_and_bias(logits, sequences, banned)
        self._penalize(logits, sequences)
        tokens = self._pick(logits, sequences, ahead)
        self._count(sequences, tokens)
        return Sampled(tokens, torch.where(is_finite, tokens, INVALID_TOKEN), logprobs)

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
        rows = [b for b, sequence in enumerate(sequences) if has_penalty(sequence)]
        if not rows:
            return
        slots = self._tensor([self._slot(sequences[b]) for b in rows])
        params = [sequences[b].params for b in rows]
        counts = self._output_counts[slots]
        seen = self._in_prompt[slots] | (counts > 0)
        repetition, frequency, presence = self._columns(
            [p.repetition_penalty for p in params],
            [p.frequency_penalty for p in params],
            [p.presence_penalty for p in params],
        )
        index = self._tensor(rows)
        chosen = logits[index]
        scaled = torch.where(chosen > 0, chosen / repetition, chosen * repetition)
        chosen = torch.where(seen, scaled, chosen)
        logits[index] = chosen - frequency * counts - presence * (counts > 0)

    def _pick(self, logits: Tensor, sequences: Rows[Sequence], ahead: int) -> Tensor:
        tokens = greedy = logits.argmax(dim=-1)
        sampled = [b for b, sequence in enumerate(sequences) if sequence.params.temperature > 0]
        # A row takes the way that its own settings ask for, so its tokens do not depend on the batch.
        filtered = [b for b in sampled if _has_filter(sequences[b])]
        plain = [b for b in sampled if not _has_filter(sequences[b])]
        for rows, pick in ((plain, self._pick_plain), (filtered, self._pick_filtered)):
            if not rows:
                continue
            chosen = [sequences[b] for b in rows]
            if len(rows) == len(sequences):
                return pick(logits, greedy, chosen, ahead)
            index = self._tensor(rows)
            tokens = tokens.index_copy(0, index, pick(logits[index], greedy[index], chosen, ahead))
        return tokens

    def _pick_plain(
        self, logits: Tensor, greedy: Tensor, sequences: Rows[Sequence], ahead: int
    ) -> Tensor:
        """Temperature alone: no sort. Rounding may land on a token of probability 0; greedy is sure."""
        uniform, temperature = self._columns(
            [s.uniform(ahead) for s in sequences],
            [max(s.params.temperature, MIN_TEMPERATURE) for s in sequences],
        )
        top = logits.gather(1, greedy[:, None])
        probs = ((logits - top) / temperature).softmax(dim=-1)
        cumulative = probs.cumsum(dim=-1)
        point = uniform * cumulative[:, -1:]
        picked = torch.searchsorted(cumulative, point, right=True)
        picked = picked.clamp(max=logits.shape[-1] - 1)
        is_possible = probs.gather(1, picked) > 0
        return torch.where(is_possible, picked, greedy[:, None]).squeeze(1)

    def _pick_filtered(
        self, logits: Tensor, greedy: Tensor, sequences: Rows[Sequence], ahead: int
    ) -> Tensor:
        params = [sequence.params for sequence in sequences]
        uniform, temperature, top_p, min_p = self._columns(
            [s.uniform(ahead) for s in sequences],
            [max(p.temperature, MIN_TEMPERATURE) for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
        )
        values, order = logits.sort(dim=-1, descending=True)
        values = (values - values[:, :1]) / temperature
        probs = values.softmax(dim=-1)
        ranks = torch.arange(probs.shape[-1], device=probs.device)
        limits = self._tensor([p.top_k or probs.shape[-1] for p in params]).unsqueeze(1)
        probs = probs.masked_fill(ranks >= limits, 0.0)
        probs /= probs.sum(dim=-1, keepdim=True)
        before = probs.cumsum(dim=-1) - probs  # mass above this rank; 0 for the first
        probs = probs.masked_fill(before >= top_p, 0.0)
        probs = probs.masked_fill(probs < probs[:, :1] * min_p, 0.0)
        cumulative = probs.cumsum(dim=-1)
        picked = (cumulative <= uniform * cumulative[:, -1:]).sum(dim=-1, keepdim=True)
        # Rounding can put the point past the last token that was kept.
        picked = torch.minimum(picked, (probs > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
        return order.gather(1, picked).squeeze(1)

    def _count(self, sequences: Rows[Sequence], tokens: Tensor) -> None:
        rows = [b for b, sequence in enumerate(sequences) if has_penalty(sequence)]
        if rows:
            slots = self._tensor([self._row_of[sequences[b].id] for b in rows])
            ones = torch.ones(len(rows), dtype=torch.int32, device=self._device)
            self._output_counts.index_put_(
                (slots, tokens[self._tensor(rows)]), ones, accumulate=True
            )

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
        return to_device(values, dtype, self._device)

    def _columns(self, *columns: list[float]) -> Tensor:
        """Each list as a column [n, 1] fp32; one copy to the device for all."""
        return self._tensor(columns, torch.float32).unsqueeze(2)


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


def has_penalty(sequence: Sequence) -> bool:
    params = sequence.params
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _has_filter(sequence: Sequence) -> bool:
    params = sequence.params
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0
