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
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from engine.api.errors import as_api_error
from engine.api.schema import ChatBody
from engine.engine import Engine
from engine.errors import EngineError
from engine.types import Event, Finished, Logprob, Request, TextDelta, Usage

LOWEST_LOGPROB = -9999.0  # OpenAI's number for "never"; JSON has no -Infinity
SEND_TIMEOUT_S = 120.0  # a reader that takes nothing for so long is cut off


async def whole(engine: Engine, body: ChatBody, requests: Sequence[Request]) -> JSONResponse:
    choices = [Choice(index, body.logprobs) for index in range(len(requests))]
    async with contextlib.AsyncExitStack() as stack:
        events = await _merged(engine, requests, stack)
        async for index, event in events:
            choices[index].take(event)
    return JSONResponse(
        {
            **_head(engine, "chat.completion"),
            "choices": [choice.as_message() for choice in choices],
            "usage": _usage([choice.usage for choice in choices]),
        }
    )


async def stream(engine: Engine, body: ChatBody, requests: Sequence[Request]) -> EventStream:
    stack = contextlib.AsyncExitStack()
    try:
        events = await _merged(engine, requests, stack)
    except BaseException:
        await stack.aclose()
        raise
    return EventStream(_chunks(engine, body, len(requests), events), stack)


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


async def _chunks(
    engine: Engine, body: ChatBody, num_choices: int, events: AsyncIterator[tuple[int, Event]]
) -> AsyncIterator[str]:
    head = _head(engine, "chat.completion.chunk")
    if body.include_usage:
        head["usage"] = None
    choices = [Choice(index, body.logprobs) for index in range(num_choices)]

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
    if body.include_usage:
        usage = _usage([choice.usage for choice in choices])
        yield _event({**head, "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


async def _merged(
    engine: Engine, requests: Sequence[Request], stack: contextlib.AsyncExitStack
) -> AsyncIterator[tuple[int, Event]]:
    """The events of all choices as they come, with the choice's index. Closing the stack aborts them.

    Returns once every choice has its first event; an error before that is raised here.
    """
    streams = [engine.astream(request) for request in requests]
    for events in streams:
        stack.push_async_callback(events.aclose)
    firsts = [asyncio.ensure_future(anext(events)) for events in streams]
    try:
        first_events = await asyncio.gather(*firsts)
    except BaseException:
        for task in firsts:
            task.cancel()
        await asyncio.gather(*firsts, return_exceptions=True)
        raise
    if len(streams) == 1:
        return _chain(first_events[0], streams[0])
    ready: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()
    pumps = [
        asyncio.ensure_future(_pump(index, first, events, ready))
        for index, (first, events) in enumerate(zip(first_events, streams, strict=True))
    ]

    async def stop_pumps() -> None:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

    stack.push_async_callback(stop_pumps)
    return _drain(ready, len(streams))


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
