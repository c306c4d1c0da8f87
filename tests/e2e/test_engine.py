"""The whole engine on tiny random checkpoints: any schedule gives the tokens of a solo run."""

import asyncio
import threading
import time

import pytest
import torch
from PIL import Image

from engine import (
    CapacityError,
    ChatMessage,
    ConfigError,
    Engine,
    EngineConfig,
    EngineError,
    Finished,
    ImagePart,
    ModelError,
    ModelHost,
    QueueFullError,
    Request,
    RequestError,
    SamplingParams,
    TextDelta,
    TextPart,
)
from tests.tiny import VOCAB_SIZE, edit_config, make_checkpoint, reference_model, tiny_tokenizer

GREEDY = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny") / "llama")
    return tiny_tokenizer(folder)


@pytest.fixture(scope="module")
def engine(checkpoint):
    engine = load(checkpoint)
    yield engine
    engine.close()


def load(folder, **options):
    options = {"device": "cpu", "cache_block_seq_len": 4, "cache_tokens": 512} | options
    return Engine.load(EngineConfig(model=folder, **options))


def prompt(seed, length):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 256, (length,), generator=generator).tolist())


def tokens_of(events):
    return [token for event in events if isinstance(event, TextDelta) for token in event.token_ids]


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def generate(engine, token_ids, params=GREEDY):
    return tokens_of(engine.stream(Request(token_ids, params)))


def generate_together(engine, prompts, params=GREEDY):
    results = [None] * len(prompts)

    def read(index):
        results[index] = generate(engine, prompts[index], params)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def wait_until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.002)


def assert_idle(engine):
    wait_until(lambda: engine.stats().running == engine.stats().waiting == 0)
    stats = engine.stats()
    assert stats.free_blocks == stats.num_blocks


def test_greedy_tokens_are_those_of_transformers(engine, checkpoint):
    ids = prompt(0, 37)
    model = reference_model(checkpoint)
    model.generation_config.eos_token_id = None
    expected = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=64)
    params = SamplingParams(temperature=0, max_new_tokens=64, ignore_eos=True)
    assert generate(engine, ids, params) == expected[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_prefill_token_num": 7},
        {"cache_tokens": 100},
        {"cache_tokens": 100, "max_prefill_token_num": 5, "cache_block_seq_len": 3},
        {"enable_prefix_caching": False},
        {"max_batch_size": 2},
    ],
    ids=["batched", "chunked", "preempted", "preempted in chunks", "unshared", "two at a time"],
)
def test_any_schedule_gives_the_tokens_of_solo_generation(engine, checkpoint, options):
    start = prompt(1, 21)
    prompts = [start[: 5 + 2 * n] + prompt(n, 3 * n + 1) for n in range(8)]
    alone = [generate(engine, ids) for ids in prompts]
    other = load(checkpoint, **options)
    try:
        assert generate_together(other, prompts) == alone
        assert generate_together(other, prompts[::-1]) == alone[::-1]
        if options.get("cache_tokens") == 100:
            assert other.stats().preemptions > 0
        assert_idle(other)
    finally:
        other.close()


def test_a_shared_prefix_is_computed_once_and_changes_nothing(checkpoint):
    engine = load(checkpoint)
    ids = prompt(5, 30)
    *first, end = engine.stream(Request(ids, GREEDY))
    *second, again = engine.stream(Request(ids, GREEDY))
    engine.close()
    assert end.usage.cached_tokens == 0
    assert again.usage.cached_tokens == 28
    assert tokens_of(first) == tokens_of(second)


def test_pictures_belong_to_their_own_request(tmp_path):
    folder = llava(tmp_path)
    engine = load(folder)
    red, blue = (picture(colour) for colour in ("red", "blue"))
    ask = [
        chat(red, "what"),
        chat(blue, "what"),
        chat("what"),
        chat(red, blue, "both"),
        chat(red, "what"),
    ]
    alone = [tokens_of(engine.stream(request)) for request in ask]
    fresh = load(folder, max_prefill_token_num=9)
    results = [None] * len(ask)
    threads = [
        threading.Thread(target=lambda n=n: results.__setitem__(n, tokens_of(fresh.stream(ask[n]))))
        for n in range(len(ask))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    fresh.close()
    assert alone == results
    assert alone[0] == alone[4]
    assert alone[0] != alone[1]


def llava(folder):
    make_checkpoint(folder, "llava")
    tiny_tokenizer(folder)
    from transformers import AutoTokenizer, CLIPImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(folder)
    while len(tokenizer) < VOCAB_SIZE - 1:
        tokenizer.add_tokens(f"<filler{len(tokenizer)}>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
        "{% else %}{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}"
        "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    size = {"height": 28, "width": 28}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)
    return folder


def picture(colour):
    return ImagePart(Image.new("RGB", (40, 33), colour))


def chat(*parts, params=GREEDY):
    content = tuple(TextPart(part) if isinstance(part, str) else part for part in parts)
    return Request((ChatMessage("user", content),), params)


def test_a_picture_for_a_text_model_is_refused(engine):
    with pytest.raises(RequestError, match="text only"):
        next(engine.stream(chat(picture("red"), "hello")))
    assert_idle(engine)


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(checkpoint):
    engine = load(checkpoint, session_len=100)
    with pytest.raises(RequestError, match=r"Prompt has 100 tokens; this model accepts 99"):
        next(engine.stream(Request(prompt(0, 100))))
    assert len(generate(engine, prompt(0, 99))) == 1
    engine.close()


def test_a_kv_cache_that_is_too_small_says_what_to_raise(checkpoint):
    with pytest.raises(CapacityError, match="room for 64 tokens; session_len asks for 500"):
        load(checkpoint, session_len=500, cache_tokens=64)
    with pytest.raises(
        CapacityError, match=r"KV cache takes [\d,]+ bytes, which cpu does not have"
    ):
        load(checkpoint, cache_tokens=10**13)
    engine = load(checkpoint, cache_tokens=64)
    with pytest.raises(RequestError, match="give the KV cache more room"):
        generate(engine, prompt(0, 64))
    engine.close()


def test_an_answer_ends_with_the_context(checkpoint):
    engine = load(checkpoint, session_len=50)
    params = SamplingParams(temperature=0, max_new_tokens=None, ignore_eos=True)
    *events, end = engine.stream(Request(prompt(0, 40), params))
    engine.close()
    assert len(tokens_of(events)) == 10
    assert end.reason == "length"


def test_stop_strings_never_leak_and_end_the_answer(engine):
    text = text_of(engine.stream(Request(prompt(3, 10), GREEDY)))
    stop = text[len(text) // 2 :][:4]
    params = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True, stop=(stop,))
    *events, end = engine.stream(Request(prompt(3, 10), params))
    assert text_of(events) == text[: text.index(stop)]
    assert (end.reason, end.stop_match) == ("stop", stop)


def test_stop_token_ids_and_min_new_tokens(engine):
    tokens = generate(engine, prompt(3, 10))
    params = SamplingParams(temperature=0, max_new_tokens=24, stop_token_ids=(tokens[4],))
    *events, end = engine.stream(Request(prompt(3, 10), params))
    assert tokens_of(events)[-1] == tokens[4]
    assert len(tokens_of(events)) == tokens.index(tokens[4]) + 1
    assert (end.reason, end.stop_match) == ("stop", tokens[4])
    held = SamplingParams(
        temperature=0, max_new_tokens=9, min_new_tokens=9, stop_token_ids=(tokens[4],)
    )
    *events, end = engine.stream(Request(prompt(3, 10), held))
    assert len(tokens_of(events)) == 9
    assert tokens[4] not in tokens_of(events)[:8]


def test_logprobs_come_with_every_token(engine):
    params = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True, logprobs=3)
    events = list(engine.stream(Request(prompt(4, 8), params)))
    details = [entry for event in events[:-1] for entry in event.logprobs]
    assert [entry.token_id for entry in details] == tokens_of(events)
    for entry in details:
        assert entry.logprob <= 0
        assert len(entry.top) == 3
        assert entry.top[0].token_id == entry.token_id


def test_a_seed_repeats_a_sampled_answer_whatever_runs_beside_it(engine):
    params = SamplingParams(seed=7, max_new_tokens=24, ignore_eos=True)
    alone = generate(engine, prompt(6, 12), params)
    crowd = [prompt(n, 9) for n in range(5)]
    together = generate_together(engine, [prompt(6, 12), *crowd], params)
    assert together[0] == alone


def test_closing_a_stream_stops_the_engine_and_frees_its_blocks(engine):
    stream = engine.stream(
        Request(prompt(8, 20), SamplingParams(max_new_tokens=400, ignore_eos=True))
    )
    next(stream)
    assert engine.stats().running == 1
    stream.close()
    assert_idle(engine)


def test_aborts_in_every_phase_leave_every_block_free(checkpoint):
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
    assert len(survivors) == 20
    for index, tokens in survivors:
        params = SamplingParams(temperature=0, max_new_tokens=20, ignore_eos=True)
        assert generate(engine, prompt(index % 7, 10 + index % 13), params) == tokens
    engine.close()


def test_a_request_that_fails_in_the_model_fails_alone(checkpoint, monkeypatch):
    engine = load(checkpoint)
    expected = generate(engine, prompt(9, 12))
    poison = prompt(10, 12)
    forward = engine._runner.forward

    def fragile(work):
        if any(item.sequence.tokens[:12] == list(poison) for item in work):
            raise RuntimeError("planted")
        return forward(work)

    monkeypatch.setattr(engine._runner, "forward", fragile)
    outcome = {}

    def client(name, ids):
        try:
            outcome[name] = generate(engine, ids)
        except EngineError as error:
            outcome[name] = error

    threads = [
        threading.Thread(target=client, args=(name, ids))
        for name, ids in [("good", prompt(9, 12)), ("bad", poison), ("late", prompt(9, 12))]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(outcome["bad"], EngineError)
    assert outcome["good"] == outcome["late"] == expected
    assert_idle(engine)
    engine.close()


def test_out_of_memory_in_a_prefill_fails_that_request_only(checkpoint, monkeypatch):
    engine = load(checkpoint)
    forward = engine._runner.forward

    def short(work):
        if any(item.count > 20 for item in work):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(work)

    monkeypatch.setattr(engine._runner, "forward", short)
    with pytest.raises(CapacityError, match="Out of memory while answering"):
        generate(engine, prompt(0, 30))
    assert len(generate(engine, prompt(0, 10))) == 24
    engine.close()


def test_a_full_queue_refuses_and_recovers(checkpoint):
    engine = load(checkpoint, max_waiting=1, max_batch_size=1)
    params = SamplingParams(max_new_tokens=200, ignore_eos=True)
    streams = [engine.stream(Request(prompt(n, 5), params)) for n in range(2)]
    for stream in streams[:1]:
        next(stream)
    second = threading.Thread(target=lambda: next(streams[1], None))
    second.start()
    wait_until(lambda: engine.stats().waiting == 1)
    with pytest.raises(QueueFullError, match="2 requests are in the queue"):
        next(engine.stream(Request(prompt(3, 5), params)))
    streams[0].close()
    second.join()
    streams[1].close()
    assert len(generate(engine, prompt(0, 5))) == 24
    engine.close()


def test_astream_yields_the_same_events_and_cancelling_it_aborts(engine):
    async def collect(request):
        return [event async for event in engine.astream(request)]

    events = asyncio.run(collect(Request(prompt(2, 9), GREEDY)))
    assert tokens_of(events) == generate(engine, prompt(2, 9))
    assert isinstance(events[-1], Finished)

    async def abandon():
        params = SamplingParams(max_new_tokens=400, ignore_eos=True)
        stream = engine.astream(Request(prompt(2, 9), params))
        await anext(stream)
        await stream.aclose()

    asyncio.run(abandon())
    assert_idle(engine)


def test_closing_the_engine_ends_open_streams_with_a_sentence(checkpoint):
    engine = load(checkpoint)
    stream = engine.stream(
        Request(prompt(2, 9), SamplingParams(max_new_tokens=400, ignore_eos=True))
    )
    next(stream)
    engine.close()
    with pytest.raises(EngineError, match="unloaded"):
        list(stream)
    with pytest.raises(EngineError, match="unloaded"):
        next(engine.stream(Request(prompt(2, 9))))
    assert not engine.healthy()
    engine.close()


def test_closing_ends_requests_that_are_still_on_their_way_in(checkpoint, monkeypatch):
    engine = load(checkpoint)
    building, may_build = threading.Event(), threading.Event()
    build = engine._prompts.build

    def slow(request):
        building.set()
        may_build.wait()
        return build(request)

    monkeypatch.setattr(engine._prompts, "build", slow)
    outcome = []

    def client():
        try:
            generate(engine, prompt(2, 9))
        except EngineError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=client)
    thread.start()
    building.wait()
    engine.close()
    may_build.set()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert "unloaded" in outcome[0]
    assert engine._num_open == 0


def test_a_request_put_in_during_the_last_step_is_told(checkpoint, monkeypatch):
    engine = load(checkpoint)
    stepping, may_step = threading.Event(), threading.Event()
    forward = engine._runner.forward

    def slow(work):
        stepping.set()
        may_step.wait()
        return forward(work)

    monkeypatch.setattr(engine._runner, "forward", slow)
    outcomes = []

    def client():
        try:
            generate(engine, prompt(2, 9))
        except EngineError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=client) for _ in range(2)]
    threads[0].start()
    stepping.wait()
    threads[1].start()
    wait_until(lambda: not engine._inbox.empty())
    closing = threading.Thread(target=engine.close)
    closing.start()
    wait_until(lambda: engine._is_closed)
    may_step.set()
    for thread in (*threads, closing):
        thread.join(timeout=20)
        assert not thread.is_alive()
    assert len(outcomes) == 2


def test_a_listener_whose_loop_is_gone_hurts_nobody(engine):
    async def start():
        stream = engine.astream(Request(prompt(2, 9), SamplingParams(max_new_tokens=300)))
        await anext(stream)
        abandoned.append(stream)

    abandoned = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(start())
    loop.close()
    assert len(generate(engine, prompt(3, 10))) == 24
    assert_idle(engine)


def test_a_host_that_was_closed_loads_nothing_more(checkpoint):
    host = ModelHost()
    host.close()
    with pytest.raises(EngineError, match="LMDeck is ending"):
        host.load(EngineConfig(model=checkpoint, device="cpu", cache_tokens=64))


def test_a_model_that_computes_nan_says_so_and_goes_on(checkpoint, monkeypatch):
    engine = load(checkpoint)
    forward = engine._runner.forward
    monkeypatch.setattr(
        engine._runner, "forward", lambda work: forward(work) + (0 if len(work) > 1 else torch.nan)
    )
    with pytest.raises(EngineError, match="NaN or Inf for this request in float32"):
        generate(engine, prompt(0, 9))
    monkeypatch.undo()
    assert len(generate(engine, prompt(0, 9))) == 24
    assert_idle(engine)
    engine.close()


def test_yarn_stretches_the_context_as_model_cards_say(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    folder = make_checkpoint(
        tmp_path / "yarn",
        max_position_embeddings=64,
        rope_parameters=rope | {"rope_theta": 10000.0},
    )
    tiny_tokenizer(folder)
    engine = load(folder, session_len=256)
    assert engine.max_context == 256
    engine.close()
    with pytest.raises(
        ConfigError, match=r"session_len is 257; this model has 256 positions. Lower"
    ):
        load(folder, session_len=257)


def test_a_load_that_fails_leaves_the_loaded_model_answering(checkpoint, tmp_path):
    host = ModelHost()
    with pytest.raises(RequestError, match="No model is loaded"):
        host.get()
    good = host.load(EngineConfig(model=checkpoint, device="cpu", cache_tokens=256))
    expected = generate(good, prompt(1, 5))
    broken = tiny_tokenizer(make_checkpoint(tmp_path / "broken"))
    edit_config(broken, model_type="no_such_model")
    with pytest.raises(ModelError, match="no_such_model"):
        host.load(EngineConfig(model=broken, device="cpu"))
    with pytest.raises(ModelError, match="is not a folder"):
        host.load(EngineConfig(model=tmp_path / "nowhere", device="cpu"))
    assert host.get() is good
    assert host.names() == ["llama"]
    assert generate(good, prompt(1, 5)) == expected
    with pytest.raises(RequestError, match="'other' is not loaded"):
        host.get("other")
    host.close()
    assert host.names() == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"dtype": "int8"}, "dtype is 'int8'; expected one of auto"),
        ({"session_len": 513}, "session_len is 513; this model has 512"),
        ({"model_format": "awq"}, "model_format is 'awq'"),
        ({"cache_tokens": None, "cache_max_entry_count": 0.0}, "cache_max_entry_count is 0.0"),
        ({"cache_bytes": 1000}, "cache_bytes and cache_tokens"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"quant_policy": 3}, "quant_policy is 3"),
        ({"rope_scaling_factor": 0.5}, "rope_scaling_factor is 0.5"),
    ],
)
def test_settings_that_cannot_be_honoured_are_named(checkpoint, options, words):
    with pytest.raises(ConfigError, match=words):
        load(checkpoint, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_asking_for_a_gpu_that_is_not_there_says_what_to_do(checkpoint):
    with pytest.raises(ConfigError, match="torch sees 0 CUDA devices"):
        load(checkpoint, device="cuda")


def test_dynamic_ntk_past_its_limit_answers_as_transformers_under_any_schedule(tmp_path):
    folder = tiny_tokenizer(make_checkpoint(tmp_path / "plain", max_position_embeddings=48))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    twin = make_checkpoint(tmp_path / "twin", max_position_embeddings=48, rope_parameters=rope)
    start = prompt(1, 40)
    prompts = [start + prompt(n, 3 + 9 * n) for n in range(4)]
    expected = []
    for ids in prompts:
        model = reference_model(twin)  # anew: it keeps the longest length that it has seen
        model.generation_config.eos_token_id = None
        tokens = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24)
        expected.append(tokens[0, len(ids) :].tolist())
    engine = load(
        folder,
        rope_scaling_factor=2.0,
        session_len=96,
        cache_tokens=200,
        max_prefill_token_num=11,
    )
    assert generate_together(engine, prompts) == expected
    assert generate_together(engine, prompts) == expected
    assert engine.stats().preemptions > 0
    engine.close()


def test_rope_scaling_factor_stretches_the_context(checkpoint):
    engine = load(checkpoint, rope_scaling_factor=2.0, session_len=1000, cache_tokens=2048)
    assert engine.max_context == 1000
    assert len(generate(engine, prompt(0, 700))) == 24
    engine.close()


@pytest.mark.parametrize("options", [{"logit_bias": {9999: 1.0}}, {"stop_token_ids": (9999,)}])
def test_a_token_beyond_the_vocabulary_is_refused(engine, options):
    with pytest.raises(RequestError, match=f"{next(iter(options))} names token 9999"):
        next(engine.stream(Request(prompt(0, 5), SamplingParams(**options))))
    assert_idle(engine)


def test_timing_and_usage_are_those_of_the_request(engine):
    *_, end = engine.stream(Request(prompt(11, 15), GREEDY))
    assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (15, 24)
    assert 0 <= end.timing.queue_s <= end.timing.first_token_s <= end.timing.total_s
    assert end.timing.decode_tps > 0
