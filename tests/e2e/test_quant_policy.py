"""int8 and int4 KV through the whole engine on a tiny checkpoint: smaller, stable, and close to float."""

import pytest
import torch

from engine import Engine, EngineConfig, Request, SamplingParams, TextDelta
from engine.layers.kv_cache import allocate_kv
from engine.models.families import read_spec
from engine.models.weights import check_weights, load_model
from tests.paged import PagedRun, plain_logits
from tests.tiny import make_checkpoint, tiny_tokenizer

GREEDY = SamplingParams(temperature=0, max_new_tokens=16, ignore_eos=True)
PROMPTS = [tuple(range(n, n + length)) for n, length in ((3, 5), (50, 17), (90, 40))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny") / "llama")
    return tiny_tokenizer(folder)


def tokens_of(engine, prompt):
    events = engine.stream(Request(prompt, GREEDY))
    return [t for event in events if isinstance(event, TextDelta) for t in event.token_ids]


@pytest.mark.parametrize("policy", [8, 4])
def test_greedy_tokens_do_not_depend_on_the_schedule(checkpoint, policy):
    """Small chunks, prefix sharing and a second run read the same integers back."""
    answers = []
    for options in ({}, {"max_prefill_token_num": 7, "cache_block_seq_len": 3}):
        config = {"device": "cpu", "cache_tokens": 512, "quant_policy": policy} | options
        engine = Engine.load(EngineConfig(model=checkpoint, **config))
        answers += [[tokens_of(engine, prompt) for prompt in PROMPTS] for _ in range(2)]
        engine.close()
    assert all(len(tokens) == 16 for tokens in answers[0])
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("policy", [8, 4])
def test_the_cache_holds_more_tokens_in_the_same_bytes(checkpoint, policy):
    counts = []
    for chosen in (0, policy):
        config = {"device": "cpu", "cache_bytes": 2**20, "quant_policy": chosen}
        engine = Engine.load(EngineConfig(model=checkpoint, **config))
        stats = engine.stats()
        counts.append(stats.num_blocks)
        assert stats.kv_bytes <= 2**20
        engine.close()
    # fp32 rows of 12 channels: 48 bytes, against 12 or 6 and 4 for the scale and zero
    assert counts[1] / counts[0] == pytest.approx(48 / (12 * policy / 8 + 4), rel=0.1)


@pytest.mark.parametrize(("policy", "bound"), [(8, 0.02), (4, 0.35)])
def test_logits_stay_close_to_the_unquantized_cache(checkpoint, policy, bound):
    """Relative error of prefill and decode logits; int4 of random weights is as far as it gets."""
    model = load_model(
        check_weights(checkpoint, read_spec(checkpoint)), torch.device("cpu"), torch.float32
    )
    prompt = list(PROMPTS[2])
    expected = plain_logits(model, prompt)[0]
    run = PagedRun(model)
    run.kv = allocate_kv(model.spec, 200, run.block_size, torch.float32, "cpu", policy)
    prefill = run.step({0: prompt[:30]})[0]
    decoded = torch.cat([run.step({0: [token]})[0] for token in prompt[30:]])
    error = (torch.cat((prefill, decoded)) - expected).norm() / expected.norm()
    assert error < bound, f"relative error {error:.3f}"
    assert error > 0
