"""Engine events to chat completions: one JSON object, or server-sent events.

The first event of every choice is awaited before anything is sent, so that a request which the engine
refuses gets a status of its own. What fails later is an error event: a bare end would look like success.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
import uuid
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from engine.api.errors import as_api_error
from engine.api.schema import ChatBody, to_requests
from engine.engine import Engine
from engine.errors import EngineError
from engine.types import Event, Finished, Logprob, Request, TextDelta, Usage

LOWEST_LOGPROB = -9999.0  # OpenAI's number for "never"; JSON has no -Infinity
BUILD_TIMEOUT_S = 10.0  # a prompt takes no longer, whatever its pictures
SEND_TIMEOUT_S = 120.0  # a reader that takes nothing for so long is cut off


@dataclass(frozen=True)
class Form:
    """What the caller wants to see of the answer."""

    num_choices: int
    logprobs: bool
    include_usage: bool


async def answer(engine: Engine, body: ChatBody, reading: asyncio.Semaphore) -> Response:
    """The whole answer, or its stream once every choice has begun. `reading` bounds the memory of
    pictures: see _submit."""
    is_stream = body.stream
    form = Form(body.n, body.logprobs, body.include_usage)
    async with contextlib.AsyncExitStack() as stack:
        sources = await _submit(engine, body, reading, stack)
        del body  # its pictures are large
        events = await _merged(sources, stack)
        if is_stream:
            return EventStream(_chunks(engine, form, events), stack.pop_all())
        return await _whole(engine, form, events)


class Choice:
    """One answer as it grows."""

    def __init__(self, index: int, with_logprobs: bool) -> None:
        self.index = index
        self.usage: Usage | None = None
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._gate = LogprobGate() if with_logprobs else None
        self._finish_reason: str | None = None

    def take(self, event: Event) -> tuple[str, list[dict[str, Any]], str | None]:
        """Add an event -> the new text, the log probabilities to show with it, the finish reason."""
        shown: list[Logprob] = []
        if isinstance(event, Finished):
            if event.reason == "abort":
                raise EngineError("The generation was aborted, because the model was unloaded.")
            self.usage, self._finish_reason = event.usage, event.reason
            if self._gate:
                shown = self._gate.close(event)
            text = ""
        else:
            text = event.text
            if self._gate:
                shown = self._gate.pass_through(event)
        entries = [_logprob(entry) for entry in shown]
        self._text.append(text)
        self._logprobs += entries
        return text, entries, self._finish_reason

    def as_message(self) -> dict[str, Any]:
        content = "".join(self._text)
        return {
            "index": self.index,
            "message": {"role": "assistant", "content": content, "refusal": None},
            "logprobs": None if self._gate is None else _logprobs(self._logprobs),
            "finish_reason": self._finish_reason,
        }


class LogprobGate:
    """Holds log probabilities back until their tokens' text is shown, so that the bytes join to it.

    The token that ended the answer, and those within a stop string, are not part of the text and are
    dropped. A sentencepiece model's first token has a space that the text lacks.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Logprob]] = deque()  # with where the token's bytes begin
        self._num_token_bytes = 0
        self._num_shown_bytes = 0
        self._first_is_checked = False

    def pass_through(self, event: TextDelta) -> list[Logprob]:
        for entry in event.logprobs:
            self._waiting.append((self._num_token_bytes, entry))
            self._num_token_bytes += len(entry.bytes)
        if event.text and not self._first_is_checked:
            self._first_is_checked = True
            first = next((entry.bytes for _, entry in self._waiting if entry.bytes), b"")
            if first.startswith(b" ") and not event.text.startswith(" "):
                self._num_shown_bytes = 1
        self._num_shown_bytes += len(event.text.encode())
        return self._release()

    def close(self, event: Finished) -> list[Logprob]:
        if isinstance(event.stop_match, str):
            return self._release()
        if isinstance(event.stop_match, int) and self._waiting:
            self._waiting.pop()
        return [entry for _, entry in self._waiting]

    def _release(self) -> list[Logprob]:
        released = []
        while self._waiting and self._waiting[0][0] < self._num_shown_bytes:
            released.append(self._waiting.popleft()[1])
        return released


class EventStream(StreamingResponse):
    """Server-sent events that end with the caller: when it hangs up or stops reading, the generation
    is aborted (Starlette alone closes neither the iterator nor, by version, notices in time)."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[str], stack: contextlib.AsyncExitStack) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(chunks, headers=headers)
        self._chunks = chunks
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(send))
        watching = asyncio.ensure_future(_hung_up(receive))
        try:
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, watching):
                task.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)
            await self._chunks.aclose()
            await self._stack.aclose()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for chunk in self._chunks:
            part = {"type": "http.response.body", "body": chunk.encode(), "more_body": True}
            async with asyncio.timeout(SEND_TIMEOUT_S):  # wait_for loses a cancel (Python 3.11)
                await send(part)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def _whole(
    engine: Engine, form: Form, events: AsyncIterator[tuple[int, Event]]
) -> JSONResponse:
    choices = [Choice(index, form.logprobs) for index in range(form.num_choices)]
    async for index, event in events:
        choices[index].take(event)
    return JSONResponse(
        {
            **_head(engine, "chat.completion"),
            "choices": [choice.as_message() for choice in choices],
            "usage": _usage([choice.usage for choice in choices]),
        }
    )


async def _chunks(
    engine: Engine, form: Form, events: AsyncIterator[tuple[int, Event]]
) -> AsyncIterator[str]:
    head = _head(engine, "chat.completion.chunk")
    if form.include_usage:
        head["usage"] = None
    choices = [Choice(index, form.logprobs) for index in range(form.num_choices)]

    def chunk(choice: Choice, delta: dict[str, str], entries: list, reason: str | None) -> str:
        part = {
            "index": choice.index,
            "delta": delta,
            "logprobs": _logprobs(entries) if entries else None,
            "finish_reason": reason,
        }
        return _event({**head, "choices": [part]})

    for choice in choices:
        yield chunk(choice, {"role": "assistant", "content": ""}, [], None)
    try:
        async for index, event in events:
            text, entries, reason = choices[index].take(event)
            if text or entries:
                yield chunk(choices[index], {"content": text}, entries, None)
            if reason:
                yield chunk(choices[index], {}, [], reason)
    except Exception as error:  # noqa: BLE001 - logged where it is not meant for the caller
        yield _event(as_api_error(error).body)
        return
    if form.include_usage:
        usage = _usage([choice.usage for choice in choices])
        yield _event({**head, "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


class _Source:
    """One choice's events from the engine, which begins at once.

    `is_queued` once the engine has let go of the request, whose pictures it needs to build the prompt
    only; at the latest with the first event.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self.is_queued = asyncio.Event()
        self.events = engine.astream(request)
        self.first: asyncio.Task[Event] = asyncio.ensure_future(anext(self.events))
        self.first.add_done_callback(lambda _: self.is_queued.set())
        loop = asyncio.get_running_loop()
        let_go = weakref.finalize(request, _call_soon, loop, self.is_queued.set)
        let_go.atexit = False

    async def aclose(self) -> None:
        self.first.cancel()
        await asyncio.gather(self.first, return_exceptions=True)
        await self.events.aclose()


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(callback)


async def _submit(
    engine: Engine, body: ChatBody, reading: asyncio.Semaphore, stack: contextlib.AsyncExitStack
) -> list[_Source]:
    """Hand every choice to the engine; closing the stack aborts them.

    Pictures are large from their decoding until all prompts that show them are built: requests with
    pictures take turns, and their choices go one by one.
    """
    sources: list[_Source] = []
    async with reading if body.num_images else contextlib.nullcontext():
        requests = await run_in_threadpool(
            to_requests, body, supports_images=engine.supports_images
        )
        while requests:
            source = _Source(engine, requests.pop(0))
            stack.push_async_callback(source.aclose)
            sources.append(source)
            if body.num_images:
                await _queued(source)
    return sources


async def _queued(source: _Source) -> None:
    try:
        await source.is_queued.wait()
    except asyncio.CancelledError:
        # the prompt is built to its end all the same, and its pictures count until then
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BUILD_TIMEOUT_S):
                await source.is_queued.wait()
        raise


async def _merged(
    sources: Sequence[_Source], stack: contextlib.AsyncExitStack
) -> AsyncIterator[tuple[int, Event]]:
    """The events of all choices as they come, with the choice's index.

    Returns once every choice has its first event; an error before that is raised here.
    """
    first_events = await asyncio.gather(*(source.first for source in sources))
    if len(sources) == 1:
        return _chain(first_events[0], sources[0].events)
    ready: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()
    pumps = [
        asyncio.ensure_future(_pump(index, first, source.events, ready))
        for index, (first, source) in enumerate(zip(first_events, sources, strict=True))
    ]

    async def stop_pumps() -> None:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

    stack.push_async_callback(stop_pumps)
    return _drain(ready, len(sources))


async def _chain(first: Event, rest: AsyncIterator[Event]) -> AsyncIterator[tuple[int, Event]]:
    yield 0, first
    async for event in rest:
        yield 0, event


async def _pump(index: int, first: Event, rest: AsyncIterator[Event], ready: asyncio.Queue) -> None:
    await ready.put((index, first))
    try:
        async for event in rest:
            await ready.put((index, event))
    except Exception as error:  # noqa: BLE001 - raised again where the events are read
        await ready.put((index, error))
    else:
        await ready.put((index, None))


async def _drain(ready: asyncio.Queue, num_open: int) -> AsyncIterator[tuple[int, Event]]:
    while num_open:
        index, event = await ready.get()
        if event is None:
            num_open -= 1
        elif isinstance(event, Exception):
            raise event
        else:
            yield index, event


def _head(engine: Engine, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": engine.name,
        "system_fingerprint": None,
    }


def _usage(usages: Sequence[Usage | None]) -> dict[str, Any]:
    """Of n choices of one prompt: the prompt counts once."""
    known = [usage for usage in usages if usage is not None]
    prompt = max((usage.prompt_tokens for usage in known), default=0)
    completion = sum(usage.completion_tokens for usage in known)
    cached = min((usage.cached_tokens for usage in known), default=0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _logprobs(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {"content": entries, "refusal": None}


def _logprob(entry: Logprob) -> dict[str, Any]:
    top = [_token(other) for other in entry.top]
    return {**_token(entry), "top_logprobs": top}


def _token(entry: Logprob) -> dict[str, Any]:
    finite = math.isfinite(entry.logprob)
    value = max(entry.logprob, LOWEST_LOGPROB) if finite else LOWEST_LOGPROB
    return {"token": entry.text, "logprob": value, "bytes": list(entry.bytes)}


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False, separators=(',', ':'))}\n\n"
