"""The OpenAI API over the real engine: the official client, a real server and the demo model on CPU."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI
from PIL import Image, ImageDraw

from engine import EngineConfig, ModelHost
from engine.api import create_router, routes, schema

MODEL = Path(__file__).resolve().parents[2] / "assets" / "demo_model"
CHAT = "/v1/chat/completions"
LARGE = 700  # a side of the pictures whose memory is watched


@pytest.fixture(scope="module")
def engine():
    host = ModelHost()
    yield host.load(EngineConfig(model=MODEL, device="cpu", model_name="demo")), host
    host.close()


@pytest.fixture(scope="module")
def url(engine):
    app = FastAPI()
    app.include_router(create_router(engine[1]))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def say(client, content="Hello!", **options):
    options = {"temperature": 0, "max_tokens": 24} | options
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="demo", messages=messages, **options)


def picture(colour, side=120):
    image = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(image).ellipse((side // 4, side // 4, side * 3 // 4, side * 3 // 4), colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def wait_until(condition, timeout_s=10.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


def wait_until_idle(engine):
    wait_until(lambda: engine.stats().running == engine.stats().waiting == 0)
    assert engine.stats().free_blocks == engine.stats().num_blocks


def test_stream_is_the_whole_answer_in_parts(client):
    whole = say(client)
    chunks = list(say(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    assert text == whole.choices[0].message.content != ""
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    assert whole.usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize("colour", ["red", "blue"])
def test_a_picture_is_seen(client, colour):
    answer = say(client, [picture(colour), {"type": "text", "text": "What colour is the circle?"}])
    assert colour in answer.choices[0].message.content.lower()
    assert answer.usage.prompt_tokens > 144


def test_two_choices_differ_by_seed_and_repeat(client):
    options = {"n": 2, "temperature": 1.2, "seed": 5, "max_tokens": 40}
    first, again = (
        [choice.message.content for choice in say(client, "Tell me a story.", **options).choices]
        for _ in range(2)
    )
    assert first == again
    assert first[0] != first[1]


def test_logprobs_are_those_of_the_greedy_tokens(client):
    choice = say(client, logprobs=True, top_logprobs=3).choices[0]
    entries = choice.logprobs.content
    shown = bytes(byte for entry in entries for byte in entry.bytes).decode()
    assert shown == choice.message.content
    for entry in entries:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token


def test_a_stop_string_ends_the_text_before_it(client):
    text = say(client).choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    choice = say(client, stop=stop).choices[0]
    assert choice.message.content == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_models_and_health_name_the_model(client, url):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "models": ["demo"]}
    with pytest.raises(openai.NotFoundError, match="loaded: demo"):
        client.models.retrieve("other")


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(client, engine, stream):
    with pytest.raises(openai.BadRequestError, match=r"Prompt has [\d,]+ tokens; .* 2,047"):
        say(client, "hello " * 3000, stream=stream)
    wait_until_idle(engine[0])


@pytest.mark.parametrize("n", [1, 2])
def test_hanging_up_frees_everything(client, engine, n):
    endless = {"ignore_eos": True, "max_tokens": 1500}
    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Hello!"}],
        stream=True,
        n=n,
        extra_body=endless,
    )
    next(iter(stream))
    assert engine[0].stats().running == n
    stream.close()
    wait_until_idle(engine[0])


class Watch:
    """Counts the large pictures that are in memory, and builds prompts slowly."""

    def __init__(self, monkeypatch, engine) -> None:
        self._born: list[weakref.ref] = []
        self.most = 0
        load, build = schema.load_data_url, engine._prompts.build

        def watched(url):
            image = load(url)
            if image.width == LARGE:
                self._born.append(weakref.ref(image))
                self.most = max(self.most, self.num_alive)
            return image

        def slow(request):
            time.sleep(0.1)
            return build(request)

        monkeypatch.setattr(schema, "load_data_url", watched)
        monkeypatch.setattr(engine._prompts, "build", slow)

    @property
    def num_born(self) -> int:
        return len(self._born)

    @property
    def num_alive(self) -> int:
        return sum(ref() is not None for ref in self._born)


@pytest.fixture
def watch(monkeypatch, engine):
    return Watch(monkeypatch, engine[0])


def post(url, content, timeout=60, **options):
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, **options}
    return httpx.post(url + CHAT, json=body, timeout=timeout)


@pytest.mark.parametrize("n", [1, 2])
def test_large_pictures_take_turns_and_are_gone_while_the_answers_run(url, watch, n):
    endless = {"ignore_eos": True, "max_tokens": 100, "n": n}
    content = [picture("red", LARGE), picture("blue", LARGE)]
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(post, url, content, **endless) for _ in range(6)]
        wait_until(lambda: watch.num_born == 12 and watch.num_alive == 0)
        assert not all(answer.done() for answer in answers)
    assert [answer.result().status_code for answer in answers] == [200] * 6
    # a thread may be about to free the pictures of one more request
    assert watch.most <= 2 * (routes.MAX_READING + 1)


def test_pictures_of_refused_requests_are_gone_with_the_refusal(url, watch):
    content = [picture("red", LARGE), {"type": "text", "text": "hello " * 3000}]
    assert post(url, content).status_code == 400
    wait_until(lambda: watch.num_alive == 0, timeout_s=1)
    assert watch.num_born == 1


def test_hanging_up_while_pictures_are_read_ends_the_turn(url, engine, watch):
    content, impatient = [picture("red", LARGE)], httpx.Timeout(5, read=0.06)
    for _ in range(2 * routes.MAX_READING):
        with pytest.raises(httpx.ReadTimeout):
            post(url, content, timeout=impatient, max_tokens=500)
    wait_until(lambda: watch.num_alive == 0)
    wait_until_idle(engine[0])
    assert post(url, content, max_tokens=3).status_code == 200


def test_text_does_not_wait_for_pictures(url, engine, monkeypatch):
    may_build = threading.Event()
    build = engine[0]._prompts.build

    def held(request):
        if not isinstance(request.prompt[0].content, str):
            may_build.wait(20)
        return build(request)

    monkeypatch.setattr(engine[0]._prompts, "build", held)
    with ThreadPoolExecutor(routes.MAX_READING + 1) as pool:
        content = [picture("red", LARGE)]
        pictures = [pool.submit(post, url, content, max_tokens=3) for _ in range(3)]
        try:
            assert post(url, "Hello!", max_tokens=3).status_code == 200
            assert not any(answer.done() for answer in pictures)
        finally:
            may_build.set()
    assert [answer.result().status_code for answer in pictures] == [200] * 3
