"""The only place of the web UI that touches the engine: the model's state, and answers being written.

An answer belongs to its conversation, not to a page: a task on the service's own event loop drains the
engine's stream into it, and pages follow. So Stop cancels the request in the engine even while it waits
in the queue, a reload loses nothing, and an answer that no page has looked at for a while is given up.
This is one of the three places with a broad `except`: whatever goes wrong becomes a sentence.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine import (
    ChatMessage,
    EngineConfig,
    EngineError,
    Event,
    Finished,
    ImagePart,
    Request,
    RequestError,
    SamplingParams,
    TextPart,
    load_image,
)
from ui.conversation import Answer, Conversation, ConversationStore, Phase, Turn
from ui.text import text

if TYPE_CHECKING:  # these two bring torch, which a page that is only opening does not need
    from engine import Engine, ModelHost

UNATTENDED_GRACE_S = 30.0
JANITOR_PERIOD_S = 5.0
MODEL_POLL_S = 0.1

log = logging.getLogger("lmdeck.ui")


@dataclass(frozen=True)
class ModelState:
    """What the header says. phase is 'empty', 'loading', 'ready' or 'failed'; detail is for a reader."""

    phase: str
    detail: str = ""


class StudioService:
    """Conversations and the model behind them, for any number of pages at once."""

    def __init__(self, host: ModelHost, unattended_grace_s: float = UNATTENDED_GRACE_S) -> None:
        self._host = host
        self._grace_s = unattended_grace_s
        self._store = ConversationStore(on_drop=self._give_up)
        self._state = ModelState("empty")
        self._settled = threading.Event()  # the first load has ended, well or badly
        self._tasks: dict[str, Future[None]] = {}  # by conversation: the task of its last answer
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="lmdeck-answers", daemon=True).start()
        self._janitor_task = asyncio.run_coroutine_threadsafe(self._janitor(), self._loop)

    # The model.

    def load(self, config: EngineConfig) -> Engine:
        """Load a model, blocking; the state says how it goes. Raises what the engine raises."""
        name = config.model_name or os.path.basename(os.path.normpath(str(config.model)))
        self.announce(text("state.loading", name=name))

        def progress(done: int, total: int) -> None:
            self.announce(text("state.loading_share", name=name, share=done / max(1, total)))

        try:
            engine = self._host.load(config, progress)
        except BaseException as error:
            self._state = ModelState("failed", str(error))
            raise
        else:
            self._state = ModelState("ready")
            return engine
        finally:
            self._settled.set()

    def announce(self, detail: str) -> None:
        """Say what is happening before a model is there, such as a download."""
        self._state = ModelState("loading", detail)

    def engine(self) -> Engine | None:
        try:
            return self._host.get()
        except RequestError:
            return None

    def supports_images(self) -> bool:
        engine = self.engine()
        return engine is not None and engine.supports_images

    def status(self, conversation_id: str | None = None) -> dict[str, Any]:
        """For the header as JSON: state, the model once there is one, and the conversation's version."""
        conversation = self._store.find(conversation_id)
        version = None if conversation is None else conversation.version
        engine = self.engine()
        if engine is None:
            words = self._state.detail or text("state.empty")
            return {"phase": self._state.phase, "words": words, "version": version}
        stats = engine.stats()
        if self._state.phase == "loading":
            words = self._state.detail
        elif stats.waiting:
            words = text("state.queued", running=stats.running, waiting=stats.waiting)
        elif stats.running:
            words = text("state.answering", running=stats.running)
        else:
            words = text("state.ready")
        return {
            "phase": "busy" if stats.running or stats.waiting else "ready",
            "words": words,
            "name": engine.name,
            "facts": [engine.dtype, engine.device, text("chip.context", tokens=engine.max_context)],
            "images": engine.supports_images,
            "running": stats.running,
            "version": version,
        }

    # Conversations.

    def open(self, conversation_id: str | None) -> Conversation:
        """The page's conversation, or a new one if the server does not know the id."""
        return self._store.find(conversation_id) or self._store.create()

    def find(self, conversation_id: str | None) -> Conversation:
        conversation = self._store.find(conversation_id)
        if conversation is None:
            raise RequestError(text("error.unknown_conversation"))
        return conversation

    def send(
        self, conversation_id: str, said: str, files: list[str], settings: dict[str, Any]
    ) -> Conversation:
        """Add a message and start its answer. A refusal raises, and the conversation stays as it was."""
        conversation = self.find(conversation_id)
        if not said.strip() and not files:
            raise RequestError(text("error.empty_message"))
        if files and self.engine() is not None and not self.supports_images():
            raise RequestError(text("error.text_only", name=self._host.get().name))
        for file in files:
            load_image(file)
        with conversation.lock:
            self._refuse_while_answering(conversation)
            turn = Turn(said, tuple(files))
            self._answer(conversation, [*conversation.turns, turn], settings)
        return conversation

    def stop(self, conversation_id: str) -> Conversation:
        """Give up the answer being written; what is there stays, marked as stopped."""
        conversation = self.find(conversation_id)
        with conversation.lock:
            self._give_up(conversation)
            conversation.notice = ""
            conversation.changed()
        return conversation

    def regenerate(self, conversation_id: str, turn: int, settings: dict[str, Any]) -> Conversation:
        """Write the answer of this turn anew; later turns answered the old one and go."""
        conversation = self.find(conversation_id)
        with conversation.lock:
            self._refuse_while_answering(conversation)
            self._answer(conversation, conversation.turns[: turn + 1], settings)
        return conversation

    def edit(
        self, conversation_id: str, turn: int, said: str, settings: dict[str, Any]
    ) -> Conversation:
        """Replace what was said in this turn, drop everything after it, and answer again."""
        conversation = self.find(conversation_id)
        with conversation.lock:
            self._refuse_while_answering(conversation)
            kept = conversation.turns[turn]
            if not said.strip() and not kept.files:
                raise RequestError(text("error.empty_message"))
            turns = [*conversation.turns[:turn], Turn(said, kept.files)]
            self._answer(conversation, turns, settings)
        return conversation

    def undo(self, conversation_id: str) -> tuple[Conversation, Turn | None]:
        """Take the last turn back and return it, so that the page can offer its text again."""
        conversation = self.find(conversation_id)
        with conversation.lock:
            self._give_up(conversation)
            turn = conversation.turns.pop() if conversation.turns else None
            conversation.notice = ""
            conversation.changed()
        return conversation, turn

    def clear(self, conversation_id: str) -> Conversation:
        """Stop and forget the conversation; the page goes on in a new one."""
        old = self._store.find(conversation_id)
        if old is not None:
            with old.lock:
                self._give_up(old)
                old.turns.clear()
                old.notice = ""
                old.changed()
        return old or self._store.create()

    def notify(self, conversation_id: str, sentence: str) -> Conversation | None:
        """Put a sentence at the end of the chat until the next action."""
        conversation = self._store.find(conversation_id)
        if conversation is not None:
            with conversation.lock:
                conversation.notice = sentence
                conversation.changed()
        return conversation

    def close(self) -> None:
        """Stop every answer; the host belongs to the caller."""
        self._janitor_task.cancel()
        for conversation in self._store.all():
            self._give_up(conversation)
        self._loop.call_soon_threadsafe(self._loop.stop)

    # Answers.

    def _refuse_while_answering(self, conversation: Conversation) -> None:
        if conversation.answering is not None:
            raise RequestError(text("error.still_answering"))

    def _answer(
        self, conversation: Conversation, turns: list[Turn], settings: dict[str, Any]
    ) -> None:
        """Make these the conversation's turns and answer the last; the caller holds its lock."""
        params = _sampling_params(settings)  # first: a refusal must change nothing
        answer = Answer(settings, waits_for_model=not self._settled.is_set())
        conversation.turns = [*turns[:-1], replace(turns[-1], answer=answer)]
        conversation.notice = ""
        conversation.changed()
        work = self._work(conversation, answer, params)
        task = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._tasks[conversation.id] = task

    async def _work(
        self, conversation: Conversation, answer: Answer, params: SamplingParams
    ) -> None:
        try:
            while not self._settled.is_set():
                await asyncio.sleep(MODEL_POLL_S)
            engine = self._host.get()
            with conversation.lock:
                answer.waits_for_model = False
                conversation.changed()
            messages = await asyncio.to_thread(_messages, conversation, answer)
            async with aclosing(engine.astream(Request(messages, params))) as events:
                await _drain(events, conversation, answer)
        except EngineError as error:
            _finish(conversation, answer, Phase.FAILED, error=str(error))
        except Exception:
            log.exception("An answer failed.")
            _finish(conversation, answer, Phase.FAILED, error=text("error.internal"))

    def _give_up(self, conversation: Conversation) -> None:
        with conversation.lock:
            if conversation.answering is not None:
                _finish(conversation, conversation.answering, Phase.STOPPED)
                self._tasks[conversation.id].cancel()

    async def _janitor(self) -> None:
        while True:
            await asyncio.sleep(min(JANITOR_PERIOD_S, self._grace_s))
            unattended = time.monotonic() - self._grace_s
            for conversation in self._store.all():
                if conversation.seen_at < unattended:
                    self._give_up(conversation)
            self._store.drop_idle()
            self._tasks = {k: task for k, task in self._tasks.items() if not task.done()}


async def _drain(events: AsyncIterator[Event], conversation: Conversation, answer: Answer) -> None:
    """Move the engine's events into the answer until it ends."""
    started = first_at = time.monotonic()
    async for event in events:
        with conversation.lock:
            if answer.phase.is_final:
                return
            if isinstance(event, Finished):
                answer.prompt_tokens = event.usage.prompt_tokens
                answer.image_tokens = event.usage.image_tokens
                answer.completion_tokens = event.usage.completion_tokens
                answer.first_token_s = event.timing.first_token_s
                answer.decode_tps = event.timing.decode_tps
                answer.finish_reason = event.reason
                continue
            now = time.monotonic()
            if answer.first_token_s is None and event.token_ids:
                first_at, answer.first_token_s = now, now - started
            answer.phase = Phase.WRITING
            answer.text += event.text
            answer.completion_tokens += len(event.token_ids)
            if now > first_at and answer.completion_tokens > 1:
                answer.decode_tps = (answer.completion_tokens - 1) / (now - first_at)
            conversation.changed()
    _finish(conversation, answer, Phase.DONE)


def _finish(conversation: Conversation, answer: Answer, phase: Phase, error: str = "") -> None:
    """End an answer once: whoever comes second, Stop or the last token, changes nothing."""
    with conversation.lock:
        if not answer.phase.is_final:
            answer.phase, answer.error = phase, error
            conversation.changed()


def _messages(conversation: Conversation, answer: Answer) -> tuple[ChatMessage, ...]:
    """The model's input up to `answer`; earlier answers that failed with nothing to show are left out."""
    messages = []
    system = answer.settings.get("system_prompt", "").strip()
    if system:
        messages.append(ChatMessage("system", system))
    with conversation.lock:
        turns = list(conversation.turns)
    for turn in turns:
        past = turn.answer
        if past is not answer and (past is None or not past.text):
            continue
        messages.append(ChatMessage("user", _content(turn)))
        if past is answer:
            break
        messages.append(ChatMessage("assistant", past.text))
    return tuple(messages)


def _content(turn: Turn) -> str | tuple[TextPart | ImagePart, ...]:
    if not turn.files:
        return turn.text
    pictures = []
    for file in turn.files:
        if not os.path.exists(file):
            raise RequestError(text("error.picture_gone"))
        with suppress(OSError):  # a sample may lie on a disk that cannot be written
            os.utime(file)  # the page's upload cache deletes by age; this one is in use
        pictures.append(ImagePart(load_image(file)))
    words = (TextPart(turn.text),) if turn.text.strip() else ()
    return (*pictures, *words)


def _sampling_params(settings: dict[str, Any]) -> SamplingParams:
    kinds: dict[str, Callable[[Any], Any]] = {
        "temperature": float,
        "top_p": float,
        "top_k": int,
        "repetition_penalty": float,
        "max_new_tokens": int,
    }
    values = {name: kind(settings[name]) for name, kind in kinds.items() if name in settings}
    return SamplingParams(**values, seed=_seed(settings.get("seed", "")))


def _seed(written: str) -> int | None:
    if not written.strip():
        return None
    try:
        return int(written)
    except ValueError as error:
        raise RequestError(text("error.seed", seed=written)) from error
