"""Sampling against transformers' logits processors, and its promises about seeds and batches."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.sampler import INVALID_TOKEN, Sampler
from engine.sequence import Sequence
from engine.types import SamplingParams

VOCAB = 67
CPU = torch.device("cpu")


class EvenlySpread:
    """A stand-in for the uniform generator: row r of n draws (r + 0.5) / n."""

    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


def make(params=None, prompt=(1, 2, 3), output=(), uniform=None):
    sequence = Sequence(list(prompt), params or SamplingParams(), max_tokens=1000)
    sequence.tokens += output
    if uniform is not None:
        sequence.rng = EvenlySpread(uniform)
    return sequence


def sample(logits, sequences, banned=None, sampler=None):
    sampler = sampler or Sampler(logits.shape[-1], 4096, CPU)
    return sampler.sample(logits.clone(), sequences, banned or [()] * len(sequences)).collect()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 9},
        {"top_p": 0.55},
        {"top_p": 1e-6},
        {"min_p": 0.2},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.4},
        {"repetition_penalty": 0.7},
    ],
)
def test_tokens_follow_the_distribution_that_transformers_warps(options):
    torch.manual_seed(0)
    logits = torch.randn(1, VOCAB) * 2
    params = SamplingParams(**options)
    prompt, output = [5, 9, 9, 11], [3, 20]
    warpers = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(params.repetition_penalty)])
    warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    expected = warpers(torch.tensor([prompt + output]), logits.clone()).softmax(-1)[0]

    rows = 4000
    sequences = [make(params, prompt, output, (r + 0.5) / rows) for r in range(rows)]
    tokens, _ = sample(logits.repeat(rows, 1), sequences)
    found = torch.bincount(torch.tensor(tokens), minlength=VOCAB) / rows
    error = (found - expected).abs().max().item()
    assert error <= 1.01 / rows, f"max difference of probability {error}"


def test_a_tiny_temperature_takes_the_likeliest_token():
    torch.manual_seed(4)
    logits = torch.randn(3, VOCAB) * 50
    params = SamplingParams(temperature=1e-40)
    assert sample(logits, [make(params)] * 3)[0] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_marked_and_its_neighbours_are_not(bad, temperature):
    logits = torch.zeros(3, VOCAB)
    logits[:, 5] = 99.0
    logits[1, 7] = bad
    tokens, _ = sample(logits, [make(SamplingParams(temperature=temperature)) for _ in range(3)])
    assert tokens == [5, INVALID_TOKEN, 5]


def test_a_step_that_is_tried_again_draws_the_same_number():
    params = SamplingParams(seed=3)
    logits = torch.zeros(1, VOCAB)
    once, twice = make(params), make(params)
    sample(logits, [twice])
    assert sample(logits, [once])[0] == sample(logits, [twice])[0]


def test_a_negative_seed_is_a_seed_of_its_own():
    assert make(SamplingParams(seed=-1)).uniform() != make(SamplingParams(seed=1)).uniform()


def test_temperature_zero_is_greedy_beside_rows_that_sample():
    torch.manual_seed(1)
    logits = torch.randn(7, VOCAB)
    hot = SamplingParams(temperature=5.0, seed=3)
    sequences = [make(SamplingParams(temperature=0) if b % 2 else hot) for b in range(7)]
    tokens, _ = sample(logits, sequences)
    assert tokens[1::2] == logits.argmax(-1)[1::2].tolist()


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch():
    torch.manual_seed(2)
    steps = torch.randn(12, VOCAB)
    params = SamplingParams(seed=42, temperature=1.3, top_p=0.9)

    def run(others):
        target = make(params)
        crowd = [make(SamplingParams(seed=n)) for n in range(others)]
        picked = []
        for row in steps:
            logits = torch.cat([torch.randn(others, VOCAB), row[None]])
            picked.append(sample(logits, [*crowd, target])[0][-1])
        return picked

    assert run(0) == run(5)
    assert len(set(run(0))) > 3


def test_unseeded_sequences_differ():
    logits = torch.zeros(64, VOCAB)
    tokens, _ = sample(logits, [make() for _ in range(64)])
    assert len(set(tokens)) > 10


def test_presence_and_frequency_count_the_answer_only():
    logits = torch.zeros(1, VOCAB)
    params = SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    sequence = make(params, prompt=[4, 4, 4], output=[8, 8, 9])
    work = logits.clone()
    Sampler(VOCAB, 4, CPU).sample(work, [sequence], [()])
    assert work[0, [4, 8, 9]].tolist() == [0.0, -1.0, -0.75]


def test_penalties_follow_the_tokens_as_they_are_sampled():
    params = SamplingParams(temperature=0, frequency_penalty=1.0)
    sampler = Sampler(VOCAB, 4, CPU)
    sequence = make(params)
    logits = torch.zeros(1, VOCAB)
    logits[0, 10], logits[0, 11] = 1.5, 1.0
    picked = []
    for _ in range(4):
        tokens, _ = sample(logits, [sequence], sampler=sampler)
        sequence.tokens += tokens
        picked += tokens
    assert picked == [10, 11, 10, 0]


def test_a_preempted_sequence_keeps_its_penalties_and_rows_are_reused():
    params = SamplingParams(temperature=0, presence_penalty=5.0)
    sampler = Sampler(VOCAB, 1, CPU)
    logits = torch.zeros(1, VOCAB)
    logits[0, 10], logits[0, 11] = 2.0, 1.0
    first, second = make(params), make(params)
    first.tokens += sample(logits, [first], sampler=sampler)[0]
    sampler.release(first)
    assert sample(logits, [second], sampler=sampler)[0] == [10]
    sampler.release(second)
    assert sample(logits, [first], sampler=sampler)[0] == [11]


def test_bias_and_bans_apply_before_the_choice():
    logits = torch.zeros(2, VOCAB)
    logits[:, 7] = 3.0
    pushed = make(SamplingParams(temperature=0, logit_bias={12: 10.0}))
    held = make(SamplingParams(temperature=0))
    assert sample(logits, [pushed, held], [(), (7,)])[0] == [12, 0]


@pytest.mark.parametrize("wanted", [0, 1, 5])
def test_logprobs_are_those_of_the_model_before_any_change(wanted):
    torch.manual_seed(3)
    logits = torch.randn(3, VOCAB)
    params = SamplingParams(temperature=0, logprobs=wanted, repetition_penalty=2.0)
    sequences = [make(), make(params), make(replace(params, logit_bias={1: 99.0}))]
    tokens, logprobs = sample(logits, sequences)
    expected = logits.log_softmax(-1)
    assert logprobs[0] is None
    for row in (1, 2):
        assert logprobs[row].sampled == pytest.approx(expected[row, tokens[row]].item())
        best = expected[row].topk(wanted)
        assert [token for token, _ in logprobs[row].top] == best.indices.tolist()
    assert tokens[2] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 1e-42}, "repetition_penalty is 1e-42"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids takes"),
        ({"presence_penalty": float("inf")}, "presence_penalty is inf"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"stop": ("",)}, "stop takes at most 16"),
        ({"logit_bias": {-1: 1.0}}, "token -1"),
        ({"logit_bias": {1: float("nan")}}, "token 1: nan"),
    ],
)
def test_parameters_outside_their_range_are_named(options, words):
    from engine.errors import ConfigError

    with pytest.raises(ConfigError, match=words):
        SamplingParams(**options)
