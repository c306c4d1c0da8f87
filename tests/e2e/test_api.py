"""The OpenAI API over a real server: the official client, raw HTTP, and hostile bodies."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
import time

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.api import create_router, routes
from engine.api.completion import LogprobGate
from engine.api.errors import as_api_error
from engine.errors import CapacityError, QueueFullError
from engine.types import Finished, Logprob, TextDelta, Timing, Usage
from tests.fakes import FakeEngine, FakeHost

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return FakeEngine("tiny", tmp_path_factory.mktemp("api") / "model")


@pytest.fixture(scope="module")
def host(engine):
    return FakeHost(engine)


@pytest.fixture(scope="module")
def url(host):
    app = FastAPI()
    app.include_router(create_router(host))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def local(host):
    """The same routes without a socket: quick enough for hundreds of bodies."""
    app = FastAPI()
    app.include_router(create_router(host))
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as made:
        yield made


def say(client, text="hello 你好 🙂", **options):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="tiny", messages=messages, **options)


def wait_until(condition, timeout_s=5.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


def check_error(response, status=None):
    assert response.headers["content-type"] == "application/json", response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "0x" not in error["message"]
    if status is not None:
        assert response.status_code == status, response.text
    return error


# ---- what the official client sees


def test_answer_has_text_usage_and_finish_reason(client):
    answer = say(client)
    assert answer.choices[0].message.content == "echo: hello 你好 🙂"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.model == "tiny"


def test_stream_is_the_same_text_with_one_id_and_one_finish(client):
    chunks = list(say(client, stream=True))
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "echo: hello 你好 🙂"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_chunk_comes_last_and_equals_the_whole_answers(client):
    chunks = list(say(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.model_dump() == say(client).usage.model_dump()
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_stream_is_framed_as_server_sent_events(url):
    body = {"messages": [{"role": "user", "content": "a\r\nb\n\nc"}], "stream": True}
    response = httpx.post(url + CHAT, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") and "\n" not in event for event in events[:-1])


def test_length_is_the_finish_reason_at_max_tokens(client):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = say(client, **{name: 2})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["lo wo", ["xyz", "lo wo"]])
def test_stop_strings_never_show(client, stream, stop):
    answer = say(client, "hello world", stop=stop, stream=stream)
    if stream:
        text = "".join(c.choices[0].delta.content or "" for c in answer)
    else:
        text = answer.choices[0].message.content
    assert text == "echo: hel"


@pytest.mark.parametrize("options", [{}, {"stop": "wor"}, {"max_tokens": 5}])
def test_logprobs_bytes_join_to_the_text(client, options):
    text = "héllo 你好 🙂 world"
    whole = say(client, text, logprobs=True, top_logprobs=4, **options).choices[0]
    chunks = list(say(client, text, logprobs=True, top_logprobs=4, stream=True, **options))
    parts = [c.choices[0] for c in chunks if c.choices[0].logprobs]
    streamed = [entry for part in parts for entry in part.logprobs.content]
    assert streamed == whole.logprobs.content
    joined = bytes(byte for entry in streamed for byte in entry.bytes)
    shown = whole.message.content.encode()
    if options:  # the last token may reach past the cut, or stop inside a character
        assert joined.startswith(shown.rstrip("\ufffd".encode()))
    else:
        assert joined == shown
    for entry in streamed:
        assert [top.logprob for top in entry.top_logprobs] == [-0.5, -9999.0, -9999.0, -1.0]


def test_logprobs_without_top_are_the_sampled_tokens_alone(client):
    entries = say(client, logprobs=True).choices[0].logprobs.content
    assert entries
    assert all(entry.top_logprobs == [] for entry in entries)


def test_logprob_gate_knows_the_space_that_sentencepiece_adds():
    gate = LogprobGate()
    tokens = [Logprob(i, t, t.encode(), -1.0) for i, t in enumerate([" a", "b", "c"])]
    shown = [
        entry.text
        for text, entry in zip(["a", "b", ""], tokens, strict=True)
        for entry in gate.pass_through(TextDelta(text, (), (entry,)))
    ]
    assert shown == [" a", "b"]
    end = Finished("stop", Usage(1, 3), Timing(0, 0, 0, 0, 0), "c")
    assert gate.close(end) == []


@pytest.mark.parametrize("stream", [False, True])
def test_n_choices_have_their_own_index_and_one_prompt_count(client, engine, stream):
    before = len(engine.requests)
    if stream:
        texts, reasons = {}, {}
        options = {"stream": True, "stream_options": {"include_usage": True}}
        for chunk in say(client, "ab", n=3, seed=7, **options):
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
                reasons.setdefault(choice.index, []).append(choice.finish_reason)
            usage = chunk.usage
        assert [r for r in reasons[1] if r] == ["stop"]
    else:
        answer = say(client, "ab", n=3, seed=7)
        texts = {c.index: c.message.content for c in answer.choices}
        usage = answer.usage
    assert texts == {0: "echo: ab", 1: "echo: ab", 2: "echo: ab"}
    assert usage.prompt_tokens == 2
    assert [r.params.seed for r in engine.requests[before:]] == [7, 8, 9]


def picture_url(size=(6, 4), form="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def test_images_and_text_keep_their_order(client, engine):
    content = [
        {"type": "text", "text": "see "},
        {"type": "image_url", "image_url": {"url": picture_url(), "detail": "low"}},
        {"type": "text", "text": "this"},
    ]
    assert say(client, content).choices[0].message.content == "echo: 6x4 see this"
    kinds = [type(part).__name__ for part in engine.requests[-1].prompt[0].content]
    assert kinds == ["TextPart", "ImagePart", "TextPart"]


def test_image_url_may_be_a_plain_string(local):
    content = [{"type": "image_url", "image_url": picture_url()}]
    response = local.post(CHAT, json={"messages": [{"role": "user", "content": content}]})
    assert response.json()["choices"][0]["message"]["content"] == "echo: 6x4 "


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("REFUSE", openai.BadRequestError, "Shorten it"),
        ("FULL", openai.RateLimitError, "queue"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_have_their_status_before_any_event(client, text, kind, words, stream):
    with pytest.raises(kind, match=words):
        say(client, text, stream=stream)


@pytest.mark.parametrize(
    ("text", "words"), [("FAIL", "engine failed"), ("CRASH", "log has the details")]
)
@pytest.mark.parametrize("n", [1, 2])
def test_failure_in_mid_stream_reaches_the_client_as_an_error(client, text, words, n):
    with pytest.raises(openai.APIError, match=words) as caught:
        list(say(client, text, stream=True, n=n))
    assert "secret" not in str(caught.value)
    with pytest.raises(openai.InternalServerError, match=words):
        say(client, text, n=n)


def test_stream_that_failed_does_not_say_done(url):
    body = {"messages": [{"role": "user", "content": "FAIL"}], "stream": True}
    text = httpx.post(url + CHAT, json=body).text
    assert "[DONE]" not in text
    assert '"code":"engine_error"' in text


def test_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "lmdeck"


def test_async_client_streams_many_at_once(url, engine):
    async def talk():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

            async def one(i):
                stream = await say(client, f"number {i}", stream=True)
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*(one(i) for i in range(16)))

    assert asyncio.run(talk()) == [f"echo: number {i}" for i in range(16)]
    wait_until(lambda: engine.num_open == 0)


# ---- a caller that hangs up


@pytest.mark.parametrize("n", [1, 3])
def test_closing_a_stream_aborts_the_generation(client, engine, n):
    stream = say(client, "SLOW " * 200, stream=True, n=n)
    next(iter(stream))
    assert engine.num_open == n
    stream.close()
    wait_until(lambda: engine.num_open == 0)
    tokens = engine.num_tokens
    time.sleep(0.1)
    assert engine.num_tokens == tokens


@pytest.mark.parametrize(
    ("text", "stream"), [("SLOW " * 200, False), ("STUCK", True), ("STUCK", False)]
)
@pytest.mark.parametrize("n", [1, 2])
def test_hanging_up_before_the_answer_aborts_the_generation(url, engine, text, stream, n):
    body = {"messages": [{"role": "user", "content": text}], "stream": stream, "n": n}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url + CHAT, json=body, timeout=httpx.Timeout(5, read=0.3))
    wait_until(lambda: engine.num_open == 0)


# ---- bodies


def post(local, **fields):
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return local.post(CHAT, json=body)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1}, {"temperature": 3}, {"temperature": "1"}, {"temperature": True},
        {"top_p": 0}, {"top_p": 1.1}, {"top_k": -2}, {"top_k": 2**31}, {"top_k": 1.5}, {"min_p": 2},
        {"repetition_penalty": 0}, {"presence_penalty": 3}, {"frequency_penalty": -3},
        {"logit_bias": {"x": 1}}, {"logit_bias": {"1": 101}}, {"logit_bias": {"-1": 1}},
        {"logit_bias": {"9" * 30: 1}}, {"logit_bias": {"²": 1}},
        {"logit_bias": {str(i): 0 for i in range(1025)}},
        {"seed": 2**63}, {"seed": 1.5}, {"top_logprobs": 2}, {"logprobs": True, "top_logprobs": 21},
        {"logprobs": 1}, {"stop": ""}, {"stop": ["a"] * 17}, {"stop": [1]}, {"stop": "x" * 2000},
        {"stop_token_ids": [-1]}, {"max_tokens": 0}, {"max_tokens": 2**40}, {"max_completion_tokens": -1},
        {"max_tokens": 1, "max_completion_tokens": 2}, {"min_tokens": -1},
        {"max_tokens": 3, "min_tokens": 4}, {"n": 0}, {"n": 17}, {"n": 10**30},
        {"stream_options": {"include_usage": True}}, {"stream": "yes"}, {"model": 3},
        {"messages": []}, {"messages": "hi"}, {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": []}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
        {"continue_final_message": True, "add_generation_prompt": True},
        {"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_schema"}},
        {"tools": [{"type": "function"}]}, {"tool_choice": "required"}, {"modalities": ["audio"]},
        {"reasoning_effort": "high"}, {"chat_template": "x"}, {"best_of": 2}, {"best_of": True},
        {"guided_regex": "(a+)+b"},
    ],
)  # fmt: skip
def test_bad_values_are_400_and_name_the_field(local, fields):
    error = check_error(post(local, **fields), 400)
    named = set(fields) | {"messages", None}
    assert error["param"] in named or error["param"] is None


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}}, {"tools": []}, {"tool_choice": "none"}, {"n": 1},
        {"user": "me", "metadata": {"a": "b"}, "store": False, "made_up": [1]}, {"top_k": -1},
        {"temperature": None, "stop": None, "tools": None, "n": None, "response_format": None},
        {"stop": []}, {"logit_bias": {}}, {"logit_bias": {"5": -100}}, {"temperature": 0, "seed": -5},
        {"max_tokens": 4, "max_completion_tokens": 4}, {"logprobs": False},
        {"messages": [{"role": "developer", "content": "x"}, {"role": "user", "content": "x", "name": "n"}]},
        {"messages": [{"role": "assistant", "content": "It"}], "continue_final_message": True,
         "add_generation_prompt": False},
    ],
)  # fmt: skip
def test_harmless_and_null_fields_pass(local, fields):
    assert post(local, **fields).status_code == 200


def test_fields_reach_the_engine(local, engine):
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": 0.3, "logit_bias": {"5": 1.5}, "seed": 3,
        "stop": ["x"], "stop_token_ids": [9], "max_tokens": 8, "min_tokens": 2, "ignore_eos": True,
        "skip_special_tokens": False,
    }  # fmt: skip
    post(local, **fields)
    params = engine.requests[-1].params
    renamed = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
    for name, value in fields.items():
        found = getattr(params, renamed.get(name, name))
        expected = (
            {5: 1.5} if name == "logit_bias" else tuple(value) if isinstance(value, list) else value
        )
        assert found == expected, name


def test_defaults_are_openais(local, engine):
    post(local)
    params = engine.requests[-1].params
    assert (params.temperature, params.top_p, params.max_new_tokens) == (1.0, 1.0, None)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff", b"{} {}", b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "model": "\\udfff"}',
        b'{"messages": [{"role": "user", "content": "x"}], "\\ud800": 1}',
        b'{"messages": [{"role": "user", "content": "x"}], "n": 1, "n": 2}',
    ],
)  # fmt: skip
def test_bodies_that_are_no_request_are_400(local, body):
    headers = {"content-type": "application/json"}
    check_error(local.post(CHAT, content=body, headers=headers), 400)


def test_escaped_surrogate_pairs_are_characters(local):
    body = b'{"messages": [{"role": "user", "content": "\\ud83d\\ude42"}]}'
    response = local.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.json()["choices"][0]["message"]["content"] == "echo: 🙂"


@pytest.mark.parametrize(
    "image_url",
    ["http://127.0.0.1/x.png", "file:///etc/passwd", "/etc/passwd", "data:image/png;base64,AAAA",
     "data:image/gif;base64,R0lGODlhAQABAAAAACw=", "", {"url": "x", "detail": "tiny"}, {}, 3],
)  # fmt: skip
def test_bad_images_are_400(local, image_url):
    content = [{"type": "image_url", "image_url": image_url}]
    error = check_error(post(local, messages=[{"role": "user", "content": content}]), 400)
    assert error["param"] == "messages"


def test_images_are_bounded_in_number_pixels_and_role(local, engine):
    small = {"type": "image_url", "image_url": picture_url()}
    large = {"type": "image_url", "image_url": picture_url((7000, 7000))}
    for role, content in (("user", [small] * 17), ("user", [large] * 3), ("system", [small])):
        check_error(post(local, messages=[{"role": role, "content": content}]), 400)
    engine.supports_images = False
    try:
        error = check_error(post(local, messages=[{"role": "user", "content": [small]}]), 400)
        assert "text only" in error["message"]
    finally:
        engine.supports_images = True


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8) | st.sampled_from(["user", "text", "image_url", "\ud800", picture_url()]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
NAMES = st.sampled_from(
    ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "n", "seed",
     "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "stop", "stop_token_ids", "tools",
     "max_tokens", "max_completion_tokens", "min_tokens", "ignore_eos", "stream", "stream_options",
     "response_format", "tool_choice", "messages", "model", "continue_final_message", "user", "audio"]
)  # fmt: skip
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "file"])},
    optional={"text": JSON, "image_url": JSON},
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer", "x"])},
    optional={"content": st.text(max_size=9) | st.lists(PARTS, max_size=3) | JSON, "name": JSON},
)
BODIES = st.builds(
    lambda fields, messages: {"messages": messages, **fields},
    st.dictionaries(NAMES, JSON, max_size=4),
    st.lists(MESSAGES, max_size=3) | st.just([{"role": "user", "content": "hi"}]),
)


@settings(max_examples=400, deadline=None)
@given(body=BODIES | JSON)
def test_no_body_is_a_server_error(local, body):
    data = json.dumps(body).encode()
    response = local.post(CHAT, content=data, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        check_error(response)


# ---- who may call


def test_body_over_the_limit_is_refused_before_it_is_sent(url):
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as raw:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Content-Length: {49 * 2**20}\r\n\r\n".encode())
        answer = raw.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_body_of_unknown_length_is_cut_at_the_limit(local):
    def endless():
        for _ in range(49):
            yield b" " * 2**20

    headers = {"content-type": "application/json"}
    check_error(local.post(CHAT, content=endless(), headers=headers), 413)


def test_body_that_never_ends_is_given_up(url, monkeypatch):
    monkeypatch.setattr(routes, "BODY_TIMEOUT_S", 0.2)
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as raw:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Content-Length: 100\r\n\r\n".encode())
        assert raw.recv(65536).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"]
)
def test_simple_cross_site_posts_are_refused(local, kind):
    check_error(local.post(CHAT, content=b"{}", headers={"content-type": kind}), 415)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "127.0.0.1:7860"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "studio.localhost"}, 200),
        ({"host": socket.gethostname()}, 200),
        ({"host": "localhost:7860", "origin": "http://localhost:7860"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example", "origin": "http://evil.example"}, 403),
        ({"host": "localhost/?"}, 403),
        ({"host": "localhost@evil.example"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://[bad"}, 403),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_pages_of_other_sites_are_refused(local, headers, status, method):
    body = {"messages": [{"role": "user", "content": "x"}]}
    path, content = ("/v1/models", None) if method == "GET" else (CHAT, body)
    response = local.request(method, path, json=content, headers=headers)
    assert response.status_code == status, response.text
    if status != 200:
        check_error(response)


def every_route(router):
    paths = {route.path for route in router.routes if route.path.startswith("/v1")}
    return sorted(p.replace("{name:path}", "tiny").replace("{path:path}", "any") for p in paths)


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer wrong", "Basic good", "good", "Bearer good x"]
)
def test_every_route_needs_the_key(host, authorization):
    router = create_router(host, api_keys=("good", "other"))
    app = FastAPI()
    app.include_router(router)
    paths = every_route(router)
    assert CHAT in paths
    with TestClient(app, base_url="http://any.name") as http:
        headers = {} if authorization is None else {"authorization": authorization}
        for path in paths:
            for method in ("GET", "POST", "DELETE"):
                error = check_error(http.request(method, path, headers=headers), 401)
                assert error["code"] == "invalid_api_key"
        assert http.get("/health").status_code == 200
        for key in ("good", "other"):
            headers = {"authorization": f"Bearer {key}", "origin": "http://app.example"}
            assert http.get("/v1/models", headers=headers).status_code == 200


def test_no_preflight_is_answered(local):
    headers = {"origin": "http://localhost", "access-control-request-method": "POST"}
    response = local.options(CHAT, headers=headers)
    check_error(response, 405)
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", CHAT, 405), ("POST", "/v1/models", 405), ("GET", "/v1/nothing", 404), ("PUT", "/v1", 404),
     ("POST", "/v1/completions", 404), ("GET", "/v1/models/", 404)],
)  # fmt: skip
def test_unknown_paths_and_methods_have_error_bodies(local, method, path, status):
    check_error(local.request(method, path), status)


def test_other_routes_of_the_app_keep_their_own_errors(host):
    app = FastAPI()
    app.include_router(create_router(host))

    @app.get("/studio")
    def studio(number: int) -> int:
        return number

    with TestClient(app, base_url="http://localhost") as http:
        assert "detail" in http.get("/studio").json()
        assert "detail" in http.get("/nothing").json()


def test_health_tells_the_state(local, engine, host):
    assert local.get("/health").json() == {"status": "ok", "models": ["tiny"]}
    engine.is_healthy = False
    try:
        response = local.get("/health")
        assert (response.status_code, response.json()["status"]) == (503, "engine stalled")
    finally:
        engine.is_healthy = True


def test_without_a_model_the_api_says_so():
    app = FastAPI()
    app.include_router(create_router(FakeHost()))
    with TestClient(app, base_url="http://localhost") as http:
        assert http.get("/health").json() == {"status": "no model loaded", "models": []}
        assert http.get("/v1/models").json()["data"] == []
        error = check_error(post(http), 503)
        assert error["code"] == "model_not_loaded"


def test_one_hundred_simultaneous_answers_stay_apart(url):
    async def ask_all():
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(limits=limits, timeout=60) as http:

            async def one(i):
                body = {"messages": [{"role": "user", "content": f"canary-{i}"}]}
                return (await http.post(url + CHAT, json=body)).json()

            return await asyncio.gather(*(one(i) for i in range(100)))

    answers = asyncio.run(ask_all())
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert texts == [f"echo: canary-{i}" for i in range(100)]
    assert len({answer["id"] for answer in answers}) == 100


def test_a_full_queue_is_429_and_out_of_memory_is_503():
    full = as_api_error(QueueFullError("2 requests are in the queue."))
    memory = as_api_error(CapacityError("Out of memory while answering this request."))
    assert (full.status, full.code) == (429, "queue_full")
    assert (memory.status, memory.code) == (503, "out_of_memory")
    assert full.headers == memory.headers == {"Retry-After": "1"}
