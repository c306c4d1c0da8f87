"""Sequences with pictures that lose their KV blocks: the pictures are placed again as they were."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image, ImageDraw

from engine import (
    ChatMessage,
    Engine,
    EngineConfig,
    ImagePart,
    Request,
    SamplingParams,
    TextDelta,
    TextPart,
)
from tests.e2e.test_engine import assert_idle, llava

COLOURS = ("red", "blue", "lime", "white", "black", "orange", "cyan", "brown")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llava(tmp_path_factory.mktemp("pictures") / "llava")


def load(folder, **options):
    options = {"device": "cpu", "cache_block_seq_len": 4, "cache_tokens": 2048} | options
    return Engine.load(EngineConfig(model=folder, **options))


def picture(index):
    image = Image.new("RGB", (40, 33), COLOURS[index % 8])
    ImageDraw.Draw(image).rectangle(
        (index, index, 20 + index, 15 + index), COLOURS[(index + 3) % 8]
    )
    return ImagePart(image)


def ask(index):
    """Talks of one or two pictures; those of even index begin with the same picture."""
    parts = [picture(0 if index % 2 == 0 else index), TextPart("what is " + "so " * index)]
    if index % 3 == 0:
        parts.append(picture(index + 1))
    params = SamplingParams(temperature=0, max_new_tokens=30, ignore_eos=True)
    return Request((ChatMessage("user", tuple(parts)),), params)


def tokens_of(engine, request):
    events = engine.stream(request)
    return [token for e in events if isinstance(e, TextDelta) for token in e.token_ids]


@pytest.mark.parametrize(
    "options", [{}, {"max_prefill_token_num": 9}, {"enable_prefix_caching": False}]
)
def test_preempted_sequences_with_pictures_resume_with_the_same_tokens(folder, options):
    requests = [ask(index) for index in range(8)]
    roomy = load(folder)
    alone = [tokens_of(roomy, request) for request in requests]
    roomy.close()
    assert len({tuple(tokens) for tokens in alone}) == len(alone)
    longest = max(len(roomy._prompts.build(request).token_ids) for request in requests) + 30
    tight = load(folder, cache_tokens=longest + 60, **options)
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda request: tokens_of(tight, request), requests))
    assert tight.stats().preemptions > 0
    assert_idle(tight)
    tight.close()
    assert together == alone
