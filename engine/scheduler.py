"""Which sequences compute how many tokens in the next step: continuous batching over paged blocks.

Order of admission is order of service. Prompts are read in chunks that leave room for every decoding
sequence; when blocks run out, the newest running sequence gives its blocks back and is recomputed
later (preemption by recompute: no swap to host memory).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from engine.blocks import BlockManager
from engine.sequence import Sequence


@dataclass(frozen=True)
class Work:
    """Compute `count` tokens of a sequence, from its num_computed on."""

    sequence: Sequence
    count: int

    @property
    def samples(self) -> bool:
        """Whether this reaches the last known token, so that the next one is to be picked."""
        return self.sequence.num_computed + self.count == self.sequence.num_tokens


class Scheduler:
    """Waiting and running sequences. `check` holds after every call."""

    def __init__(
        self,
        blocks: BlockManager,
        block_size: int,
        *,
        max_batch_size: int,
        max_step_tokens: int,
        share_prefixes: bool = True,
        on_preempt: Callable[[Sequence], None] = lambda sequence: None,
    ) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.max_batch_size = max_batch_size
        self.max_step_tokens = max_step_tokens
        self.share_prefixes = share_prefixes
        self._on_preempt = on_preempt
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[Work]:
        """The next step, single-token rows first; empty when there is nothing to do."""
        preemptions = self.num_preemptions
        work, budget = self._continue_running()
        if self.num_preemptions == preemptions:
            work += self._admit(budget)
        return sorted(work, key=lambda item: item.count > 1)

    def look_ahead(self, work: list[Work]) -> list[Work]:
        """The decode step after `work`, before anyone knows which tokens `work` picks; [] if unclear.

        It holds each running sequence that max_tokens does not end with this token. A sequence that
        turns out to end otherwise is computed in vain. Clear means: everyone decoded in `work`, nobody
        could be admitted, and there are blocks without preemption. The step counts once it is committed;
        until then it may be forgotten, and `schedule` finds its blocks in place.
        """
        picking = {item.sequence for item in work if item.samples and item.count == 1}
        running = set(self.running)
        if not running <= picking or (self.waiting and len(running) < self.max_batch_size):
            return []
        going = [
            item.sequence
            for item in work
            if item.sequence in running and item.sequence.num_tokens + 1 < item.sequence.max_tokens
        ]
        missing = [self._missing(sequence, sequence.num_tokens + 1) for sequence in going]
        if sum(missing) > self.blocks.num_available:
            return []
        for sequence, count in zip(going, missing, strict=True):
            sequence.block_table += self.blocks.allocate(count)
        return [Work(sequence, 1) for sequence in going]

    def commit(self, work: Work, token: int | None) -> None:
        """Record that `work` is in the cache, and the token that was sampled after it."""
        sequence = work.sequence
        sequence.num_computed += work.count
        if token is not None:
            sequence.tokens.append(token)
        if self.share_prefixes:
            self._publish(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished, failed or aborted sequence and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._free(sequence)
        else:
            self.waiting.remove(sequence)

    def check(self) -> None:
        """Raise AssertionError if a block is lost, shared wrongly or too many for its tokens."""
        self.blocks.check(sequence.block_table for sequence in self.running)
        for sequence in self.running:
            needed = self._blocks_for(sequence.num_computed)
            # `look_ahead` may have taken a block for the token that comes next.
            if not needed <= len(sequence.block_table) <= self._blocks_for(sequence.num_tokens + 1):
                raise AssertionError(
                    f"sequence {sequence.id} holds {len(sequence.block_table)} blocks "
                    f"for {sequence.num_computed} of {sequence.num_tokens} tokens"
                )
        if any(sequence.block_table for sequence in self.waiting):
            raise AssertionError("a waiting sequence holds blocks")

    def _continue_running(self) -> tuple[list[Work], int]:
        work: list[Work] = []
        budget = self.max_step_tokens
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            # Each younger sequence keeps one token of the budget, so decoding never waits for a prompt.
            younger = len(self.running) - index - 1
            count = min(
                sequence.num_tokens - sequence.num_computed, max(budget - younger, min(budget, 1))
            )
            if count == 0:
                break
            if self._extend(sequence, count):
                work.append(Work(sequence, count))
                budget -= count
                index += 1
        return work, budget

    def _extend(self, sequence: Sequence, count: int) -> bool:
        """Blocks for `count` more tokens, preempting the newest; False if that was `sequence`."""
        missing = self._missing(sequence, sequence.num_computed + count)
        while missing > self.blocks.num_available:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table += self.blocks.allocate(missing)
        return True

    def _admit(self, budget: int) -> list[Work]:
        work = []
        while self.waiting and budget > 0 and len(self.running) < self.max_batch_size:
            sequence = self.waiting[0]
            shared = self._share(sequence)
            # The whole prompt must fit beside the prompts that are being read: half-read ones would
            # only push each other out.
            promised = sum(self._missing(other, other.num_tokens) for other in self.running)
            needed = self._missing(sequence, sequence.num_tokens)
            if promised + needed > self.blocks.num_available:
                self._free(sequence)
                break
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.mark_admitted(shared)
            count = min(sequence.num_tokens - sequence.num_computed, budget)
            missing = self._missing(sequence, sequence.num_computed + count)
            sequence.block_table += self.blocks.allocate(missing)
            work.append(Work(sequence, count))
            budget -= count
        return work

    def _share(self, sequence: Sequence) -> int:
        """Take over cached blocks; the last token is always computed, for its logits."""
        if self.share_prefixes:
            full = self._shareable(sequence, sequence.num_tokens - 1)
            hashes = sequence.block_hashes(self.block_size, full)
            sequence.block_table = self.blocks.share(hashes)
        sequence.num_published = len(sequence.block_table)
        sequence.num_computed = len(sequence.block_table) * self.block_size
        return sequence.num_computed

    def _publish(self, sequence: Sequence) -> None:
        full = self._shareable(sequence, sequence.num_computed)
        hashes = sequence.block_hashes(self.block_size, full)
        for index in range(sequence.num_published, full):
            self.blocks.publish(sequence.block_table[index], hashes[index])
        sequence.num_published = full

    def _shareable(self, sequence: Sequence, num_tokens: int) -> int:
        """Full blocks among the first num_tokens whose content other sequences can use."""
        limit = sequence.num_shareable
        return (num_tokens if limit is None else min(num_tokens, limit)) // self.block_size

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1
        self._on_preempt(sequence)

    def _free(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0
        sequence.num_published = 0

    def _missing(self, sequence: Sequence, num_tokens: int) -> int:
        return max(self._blocks_for(num_tokens) - len(sequence.block_table), 0)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
