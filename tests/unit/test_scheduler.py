"""Block accounting and scheduling, against a brute-force picture of what the KV cache holds."""

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.blocks import BlockManager
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.types import SamplingParams

PARAMS = SamplingParams()


class ImageStandIn:
    """What the scheduler knows of a picture: where its placeholder tokens are, and its digest."""

    def __init__(self, start: int, length: int, digest: bytes) -> None:
        self.start, self.length, self.digest = start, length, digest


class SchedulerMachine(RuleBasedStateMachine):
    """Random adds, steps, aborts and finishes over a small pool.

    `content` plays the KV cache: for each slot, the whole history that a token's key depends on. A
    wrongly shared, lost or overwritten block shows as a history that is not the sequence's own.
    """

    @initialize(
        num_blocks=st.integers(2, 24),
        block_size=st.sampled_from([1, 3, 4, 16]),
        max_batch=st.integers(1, 5),
        max_step=st.integers(1, 40),
        share=st.booleans(),
    )
    def start(self, num_blocks, block_size, max_batch, max_step, share):
        self.capacity = num_blocks * block_size
        self.scheduler = Scheduler(
            BlockManager(num_blocks),
            block_size,
            max_batch_size=max_batch,
            max_step_tokens=max_step,
            share_prefixes=share,
        )
        self.max_step = max_step
        self.block_size = block_size
        self.content: dict[int, tuple] = {}
        self.alive: list[Sequence] = []
        self.tokens = itertools.count(100)

    @rule(
        seed=st.integers(0, 2),
        length=st.integers(1, 60),
        answer=st.integers(1, 30),
        image=st.sampled_from([None, b"cat", b"dog"]),
    )
    def add(self, seed, length, answer, image):
        """Prompts of the same seed share their beginning, so prefixes are hit often."""
        length = min(length, self.capacity - 1)
        if length < 1:
            return
        prompt = [seed * 7 + i % 5 for i in range(length)]
        images = (ImageStandIn(min(2, length - 1), 3, image),) if image else ()
        limit = min(length + answer, self.capacity)
        sequence = Sequence(prompt, PARAMS, max_tokens=limit, images=images)
        self.alive.append(sequence)
        self.scheduler.add(sequence)

    @rule(fork=st.booleans(), ahead=st.booleans(), ends=st.booleans())
    def step(self, fork, ahead, ends):
        """One step, or two of which the second begins before the first one's tokens are known."""
        work = self.scheduler.schedule()
        self.scheduler.check()
        assert sum(item.count for item in work) <= self.max_step
        assert work or not self.alive, "sequences wait, yet nothing is scheduled"
        counts = [item.count for item in work]
        assert counts == sorted(counts, key=lambda count: count > 1), "single-token rows come first"
        for item in work:
            self.write(item.sequence, item.count)
        following = self.scheduler.look_ahead(work) if ahead else []
        self.scheduler.check()
        for item in following:  # what the device computes, perhaps in vain
            assert item.sequence.num_tokens + 1 < item.sequence.max_tokens
            self.content[self.slot(item.sequence, item.sequence.num_computed + 1)] = ("unknown",)
        self.commit(work, fork)
        if ends and following:
            self.leave(following[0].sequence)
        self.scheduler.check()
        following = [item for item in following if item.sequence in self.alive]
        for item in following:
            self.write(item.sequence, 1)
        self.commit(following, fork)

    def commit(self, work, fork):
        for item in work:
            token = (5 if fork else next(self.tokens)) if item.samples else None
            self.scheduler.commit(item, token)
            if item.sequence.num_tokens >= item.sequence.max_tokens:
                self.leave(item.sequence)

    def leave(self, sequence):
        self.scheduler.remove(sequence)
        self.alive.remove(sequence)

    @rule(index=st.integers(0, 1000))
    def abort(self, index):
        if self.alive:
            sequence = self.alive.pop(index % len(self.alive))
            self.scheduler.remove(sequence)

    def history(self, sequence, position):
        seen = [
            (span.digest, position - span.start)
            for span in sequence.images
            if span.start <= position
        ]
        return (tuple(sequence.tokens[: position + 1]), tuple(seen))

    def slot(self, sequence, position):
        block = sequence.block_table[position // self.block_size]
        return block * self.block_size + position % self.block_size

    def write(self, sequence, count):
        for position in range(sequence.num_computed, sequence.num_computed + count):
            self.content[self.slot(sequence, position)] = self.history(sequence, position)

    @invariant()
    def books_balance(self):
        if hasattr(self, "scheduler"):
            blocks = self.scheduler.blocks
            self.scheduler.check()
            assert blocks.num_available + blocks.num_held == blocks.num_blocks

    @invariant()
    def every_running_sequence_reads_its_own_history(self):
        for sequence in self.scheduler.running if hasattr(self, "scheduler") else ():
            for position in range(sequence.num_computed):
                found = self.content[self.slot(sequence, position)]
                assert found == self.history(sequence, position)

    def teardown(self):
        for _ in range(10_000):
            if not getattr(self, "alive", None):
                break
            self.step(False, False, False)
        if hasattr(self, "scheduler"):
            assert not self.alive, "some sequences never finished"
            assert self.scheduler.blocks.num_available == self.scheduler.blocks.num_blocks


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def run_to_end(scheduler, sequences):
    for _ in range(10_000):
        work = scheduler.schedule()
        if not work:
            return
        for item in work:
            scheduler.commit(item, 1 if item.samples else None)
            if item.sequence.num_tokens >= item.sequence.max_tokens:
                scheduler.remove(item.sequence)
    raise AssertionError("no end in sight")


def make_scheduler(num_blocks=10, block_size=4, max_batch_size=8, max_step_tokens=64, **options):
    return Scheduler(
        BlockManager(num_blocks),
        block_size,
        max_batch_size=max_batch_size,
        max_step_tokens=max_step_tokens,
        **options,
    )


def test_two_prompts_of_60_percent_of_the_pool_both_finish_with_few_preemptions():
    scheduler = make_scheduler(max_step_tokens=8)
    first = Sequence(list(range(24)), PARAMS, max_tokens=36)
    second = Sequence(list(range(50, 74)), PARAMS, max_tokens=36)
    scheduler.add(first)
    scheduler.add(second)
    run_to_end(scheduler, [first, second])
    assert first.num_tokens == second.num_tokens == 36
    assert scheduler.num_preemptions <= 2


def test_a_prefix_that_finished_is_shared_by_the_next_sequence():
    scheduler = make_scheduler()
    first = Sequence(list(range(17)), PARAMS, max_tokens=18)
    scheduler.add(first)
    run_to_end(scheduler, [first])
    second = Sequence([*range(17), 99, 98], PARAMS, max_tokens=20)
    scheduler.add(second)
    (work,) = scheduler.schedule()
    assert second.num_shared == 16
    assert work.count == 3


def test_the_last_prompt_token_is_always_computed():
    scheduler = make_scheduler()
    for _ in range(2):
        sequence = Sequence(list(range(16)), PARAMS, max_tokens=17)
        scheduler.add(sequence)
        run_to_end(scheduler, [sequence])
    assert sequence.num_shared == 12


def test_a_different_picture_in_the_same_place_is_not_shared():
    scheduler = make_scheduler()
    shared = []
    for digest in (b"cat", b"dog", b"cat"):
        images = (ImageStandIn(5, 3, digest),)
        sequence = Sequence(list(range(17)), PARAMS, max_tokens=18, images=images)
        scheduler.add(sequence)
        run_to_end(scheduler, [sequence])
        shared.append(sequence.num_shared)
    assert shared == [0, 4, 16]


def test_decoding_goes_on_while_a_long_prompt_is_read_in_chunks():
    scheduler = make_scheduler(num_blocks=64, max_step_tokens=8)
    short = Sequence([1, 2], PARAMS, max_tokens=30)
    scheduler.add(short)
    scheduler.commit(scheduler.schedule()[0], 7)
    long = Sequence(list(range(100)), PARAMS, max_tokens=110)
    scheduler.add(long)
    for _ in range(5):
        work = scheduler.schedule()
        assert [item.sequence for item in work] == [short, long]
        assert [item.count for item in work] == [1, 7]
        for item in work:
            scheduler.commit(item, 7 if item.samples else None)


def test_the_newest_sequence_is_preempted_and_told():
    told = []
    scheduler = make_scheduler(num_blocks=4, on_preempt=told.append)
    old = Sequence(list(range(7)), PARAMS, max_tokens=16)
    new = Sequence(list(range(50, 57)), PARAMS, max_tokens=16)
    scheduler.add(old)
    scheduler.add(new)
    run_to_end(scheduler, [old, new])
    assert told
    assert set(told) == {new}


@pytest.mark.parametrize("count", [3, 5])
def test_asking_for_more_blocks_than_there_are_is_an_error(count):
    blocks = BlockManager(2)
    with pytest.raises(ValueError, match=f"{count} blocks asked for, 2 available"):
        blocks.allocate(count)


def test_check_finds_a_lost_block():
    blocks = BlockManager(3)
    table = blocks.allocate(2)
    blocks.check([table])
    with pytest.raises(AssertionError, match="reference counts"):
        blocks.check([table[:1]])
