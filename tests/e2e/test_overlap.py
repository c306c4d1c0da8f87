"""Decode steps that start before the one before is read: the same answers, endings and books.

GPUs do this by themselves; here the CPU is told to, so that every push tests it.
"""

import threading

import pytest
import torch

from engine import Engine, EngineConfig, EngineError, Request, SamplingParams
from tests.e2e.test_engine import (
    GREEDY,
    assert_idle,
    generate,
    generate_together,
    load,
    prompt,
    text_of,
    tokens_of,
)
from tests.tiny import make_checkpoint, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny") / "llama")
    return tiny_tokenizer(folder)


@pytest.fixture
def overlapped(monkeypatch):
    monkeypatch.setattr("engine.engine.OVERLAPPED", ("cpu", "cuda"))


@pytest.fixture(scope="module")
def plain(checkpoint):
    engine = load(checkpoint)
    yield engine
    engine.close()


def count_early_steps(engine, monkeypatch):
    """Each step's number of rows, for those that began early."""
    rows, forward = [], engine._runner.forward

    def counting(work, input_ids=None):
        if input_ids is not None:
            assert len(input_ids) == len(work)
            rows.append(len(work))
            return forward(work, input_ids)
        return forward(work)

    monkeypatch.setattr(engine._runner, "forward", counting)
    return rows


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_prefill_token_num": 7},
        {"cache_tokens": 100},
        {"cache_tokens": 100, "max_prefill_token_num": 5, "cache_block_seq_len": 3},
        {"max_batch_size": 2},
        {"quant_policy": 8},
    ],
    ids=["batched", "chunked", "preempted", "preempted in chunks", "two at a time", "int8"],
)
def test_any_schedule_gives_the_same_tokens(checkpoint, plain, overlapped, monkeypatch, options):
    start = prompt(1, 21)
    prompts = [start[: 5 + 2 * n] + prompt(n, 3 * n + 1) for n in range(8)]
    if "quant_policy" in options:
        plain = load(checkpoint, device="cpu", **options)
        plain._starts_early = False
    alone = [generate(plain, ids) for ids in prompts]
    engine = load(checkpoint, **options)
    early = count_early_steps(engine, monkeypatch)
    assert generate_together(engine, prompts) == alone
    assert generate_together(engine, prompts[::-1]) == alone[::-1]
    assert early
    assert_idle(engine)
    engine.close()


def test_answers_of_any_length_and_end_are_those_of_plain_steps(checkpoint, plain, overlapped):
    """Lengths, stop tokens, stop strings and seeds: what was computed in vain never shows."""
    ids = prompt(3, 10)
    text, tokens = text_of(plain.stream(Request(ids, GREEDY))), generate(plain, ids)
    asked = [
        *(SamplingParams(temperature=0, max_new_tokens=n, ignore_eos=True) for n in (1, 2, 3, 9)),
        SamplingParams(temperature=0, max_new_tokens=24, stop_token_ids=(tokens[5],)),
        SamplingParams(temperature=0, max_new_tokens=24, stop=(text[9:12],), ignore_eos=True),
        SamplingParams(
            temperature=0, max_new_tokens=9, min_new_tokens=7, stop_token_ids=(tokens[1],)
        ),
        SamplingParams(temperature=0.9, seed=5, max_new_tokens=20, ignore_eos=True),
        SamplingParams(temperature=1.3, top_k=20, top_p=0.9, seed=6, max_new_tokens=20),
        SamplingParams(temperature=0, frequency_penalty=1.0, max_new_tokens=20, ignore_eos=True),
        SamplingParams(temperature=0, logprobs=2, max_new_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0, logit_bias={65: 4.0}, max_new_tokens=12, ignore_eos=True),
    ]

    def run(engine, params):
        *events, end = engine.stream(Request(ids, params))
        return (
            tokens_of(events),
            text_of(events),
            end.reason,
            end.stop_match,
            end.usage.completion_tokens,
        )

    expected = [run(plain, params) for params in asked]
    engine = load(checkpoint, enable_prefix_caching=False)
    assert [run(engine, params) for params in asked] == expected
    found = [None] * len(asked)

    def client(index):
        found[index] = run(engine, asked[index])

    threads = [threading.Thread(target=client, args=(n,)) for n in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert_idle(engine)
    engine.close()


def test_aborts_in_every_phase_leave_every_block_free(checkpoint, plain, overlapped):
    engine = load(checkpoint, cache_tokens=200, max_batch_size=4, max_prefill_token_num=9)
    survivors = []

    def client(index):
        params = SamplingParams(temperature=0, max_new_tokens=20, ignore_eos=True)
        stream = engine.stream(Request(prompt(index % 7, 10 + index % 13), params))
        if index % 3 == 0:
            survivors.append((index, tokens_of(stream)))
            return
        for _, _ in zip(range(index % 9), stream, strict=False):
            pass
        stream.close()

    threads = [threading.Thread(target=client, args=(n,)) for n in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_idle(engine)
    params = SamplingParams(temperature=0, max_new_tokens=20, ignore_eos=True)
    for index, tokens in survivors:
        assert generate(plain, prompt(index % 7, 10 + index % 13), params) == tokens
    engine.close()


def test_a_step_that_cannot_start_early_is_computed_later(
    checkpoint, plain, overlapped, monkeypatch
):
    engine = load(checkpoint)
    forward = engine._runner.forward

    def refusing(work, input_ids=None):
        if input_ids is not None:
            raise RuntimeError("planted")
        return forward(work)

    monkeypatch.setattr(engine._runner, "forward", refusing)
    prompts = [prompt(n, 9) for n in range(3)]
    assert generate_together(engine, prompts) == [generate(plain, ids) for ids in prompts]
    assert_idle(engine)
    engine.close()


@pytest.mark.parametrize("victim", ["alone", "together"])
def test_a_step_whose_tokens_cannot_be_read_fails_its_own_request(
    checkpoint, plain, overlapped, monkeypatch, victim
):
    """The failure shows when the next step is already under way; the others go on as if nothing was."""
    engine = load(checkpoint)
    poison = prompt(10, 12)
    start = engine._start

    def failing(work, input_ids=None):
        flight = start(work, input_ids)
        bad = any(
            item.sequence.tokens[:12] == list(poison) and item.sequence.num_output > 3
            for item in work
        )
        if bad:
            monkeypatch.setattr(flight.sampled, "collect", lambda: 1 // 0)
        return flight

    monkeypatch.setattr(engine, "_start", failing)
    outcome = {}

    def client(name, ids):
        try:
            outcome[name] = generate(engine, ids)
        except EngineError as error:
            outcome[name] = error

    asked = [("bad", poison)]
    if victim == "together":
        asked += [("good", prompt(9, 12)), ("late", prompt(8, 5))]
    threads = [threading.Thread(target=client, args=pair) for pair in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(outcome.pop("bad"), EngineError)
    for name, ids in asked[1:]:
        assert outcome[name] == generate(plain, ids)
    assert_idle(engine)
    engine.close()


def test_a_row_of_nan_fails_alone_and_feeds_no_invalid_token(
    checkpoint, plain, overlapped, monkeypatch
):
    engine = load(checkpoint)
    forward = engine._runner.forward
    poison = prompt(10, 12)

    def damaged(work, *ahead):
        logits = forward(work, *ahead).clone()
        for row, item in enumerate(item for item in work if item.samples):
            if item.sequence.tokens[:12] == list(poison) and item.sequence.num_output > 2:
                logits[row] = torch.nan
        return logits

    monkeypatch.setattr(engine._runner, "forward", damaged)
    results = {}

    def client(name, ids):
        try:
            results[name] = generate(engine, ids)
        except EngineError as error:
            results[name] = str(error)

    pairs = [("bad", poison), ("good", prompt(9, 12))]
    threads = [threading.Thread(target=client, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "NaN or Inf" in results["bad"]
    assert results["good"] == generate(plain, prompt(9, 12))
    assert_idle(engine)
    engine.close()


def test_closing_while_a_step_is_ahead_ends_the_stream(checkpoint, overlapped):
    engine = Engine.load(EngineConfig(checkpoint, device="cpu", cache_tokens=512))
    stream = engine.stream(
        Request(prompt(2, 9), SamplingParams(max_new_tokens=400, ignore_eos=True))
    )
    next(stream)
    engine.close()
    with pytest.raises(EngineError, match="unloaded"):
        list(stream)
