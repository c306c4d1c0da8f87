"""The engine's facade: load a model, stream answers, abort, report, close.

One thread owns the model and the scheduler; everything else talks to it through an inbox, and every
request hears back through its own sink. A request that fails, fails alone: when a step raises, its
sequences are tried one by one. The idea of a loop with an inbox is vLLM's and SGLang's.

On a GPU a decode step is started before the tokens of the one before it are read (they stay on the
device), so the host's work on n hides behind the device's on n + 1 (SGLang's overlapped scheduler). A
sequence that turns out to have ended, or was aborted, has then been computed once in vain: that token
is dropped. Its blocks may be given away at once, since the device works in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.blocks import BlockManager
from engine.chat import ChatTemplate
from engine.config import EngineConfig
from engine.errors import (
    CapacityError,
    EngineError,
    ModelError,
    QueueFullError,
    RequestError,
)
from engine.inputs import to_device
from engine.models.families import read_spec, with_rope_scaling_factor
from engine.models.weights import Model, check_weights, load_model
from engine.prompt import PromptBuilder
from engine.resolve import (
    check_format,
    resolve_device,
    resolve_dtype,
    resolve_session_len,
    shareable_tokens,
)
from engine.runner import Runner
from engine.sampler import INVALID_TOKEN, Sampled, Sampler, TokenLogprobs, has_penalty
from engine.scheduler import Scheduler, Work
from engine.sequence import Sequence
from engine.tokenizer import StreamDecoder, Tokenizer
from engine.types import ChatMessage, Event, Finished, FinishReason, Logprob, Request, TextDelta

log = logging.getLogger(__name__)

OVERLAPPED = ("cuda",)  # device types on which the next step starts early
STALL_S = {"cuda": 30.0, "cpu": 300.0}  # a step that takes longer makes the engine unhealthy
UNLOADED = "The model was unloaded. Load a model and try again."


@dataclass(frozen=True)
class EngineStats:
    """A snapshot: sequences, KV blocks (cached ones count as free), bytes, totals since load."""

    running: int
    waiting: int
    num_blocks: int
    free_blocks: int
    block_size: int
    weight_bytes: int
    kv_bytes: int
    preemptions: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class _Flight:
    """A step that the device has been given, and the tokens that it picks (None: it picks none).

    picks says which items have one; it is kept because an item whose sequence ends meanwhile forgets.
    """

    work: list[Work]
    picks: list[bool]
    sampled: Sampled | None


class Engine:
    """A loaded model that answers requests until it is closed. Make one with `Engine.load`."""

    def __init__(
        self,
        model: Model,
        config: EngineConfig,
        device: torch.device,
        session_len: int,
        tokenizer: Tokenizer,
        prompts: PromptBuilder,
    ) -> None:
        spec = model.spec
        self.name = config.model_name or Path(config.model).resolve().name
        self.config = config
        self.spec = spec
        self.device = str(device)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.supports_images = spec.vision is not None
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._weight_bytes = model.weight_bytes
        self._runner = Runner(model, config, device, session_len)
        self._sampler = Sampler(spec.vocab_size, config.max_batch_size, device)
        self._scheduler = Scheduler(
            BlockManager(self._runner.num_blocks),
            self._runner.block_size,
            max_batch_size=config.max_batch_size,
            max_step_tokens=config.max_prefill_token_num,
            share_prefixes=config.enable_prefix_caching,
            on_preempt=self._sampler.release,
        )
        self.max_context = min(session_len, self._runner.num_blocks * self._runner.block_size)
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._open: set[Sequence] = set()  # owned by the loop thread
        self._next: _Flight | None = None  # started before the step before it was read
        self._starts_early = device.type in OVERLAPPED
        self._admission = threading.Lock()
        self._num_open = 0
        self._is_closed = False
        self._step_began: float | None = None
        self._is_broken = False  # the device gave up; only a new process helps
        self._thread = threading.Thread(target=self._loop, name=f"engine-{self.name}", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls, config: EngineConfig, on_progress: Callable[[int, int], None] | None = None
    ) -> Engine:
        """Check everything that the headers tell, then read the weights; on_progress(done, total) bytes.

        Raises ConfigError, ModelError or CapacityError; nothing stays allocated then.
        """
        folder = Path(config.model).expanduser()
        if not folder.is_dir():
            raise ModelError(f"{folder} is not a folder. Give the folder that holds config.json.")
        device = resolve_device(config.device)
        spec = with_rope_scaling_factor(read_spec(folder), config.rope_scaling_factor)
        session_len = resolve_session_len(spec, config)
        check_format(spec, config)
        dtype = resolve_dtype(config.dtype, spec, device)
        plan = check_weights(folder, spec)
        tokenizer = Tokenizer.load(folder, spec)
        template = ChatTemplate.load(folder, tokenizer, spec, config.chat_template)
        prompts = PromptBuilder(folder, spec, tokenizer, template)
        try:
            model = load_model(plan, device, dtype, on_progress)
            return cls(model, config, device, session_len, tokenizer, prompts)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory("loading the model", error) from error
        finally:
            _return_unused_memory(device)

    def stream(self, request: Request) -> Iterator[Event]:
        """Yield TextDelta events and one Finished; closing the generator aborts the request.

        Raises RequestError (the request cannot be served), CapacityError (the queue is full) or
        EngineError (the engine failed or was closed).
        """
        events: queue.SimpleQueue[Event | EngineError] = queue.SimpleQueue()
        sequence = self._submit(request, events.put)
        try:
            while True:
                event = events.get()
                if isinstance(event, EngineError):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self._abort(sequence)

    async def astream(self, request: Request) -> AsyncIterator[Event]:
        """`stream` for asyncio: the prompt is built on a worker thread, events come as they are made."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | EngineError] = asyncio.Queue()

        def deliver(event: Event | EngineError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        submitting = loop.run_in_executor(None, self._submit, request, deliver)
        del request  # its pictures are large, and the sequence has what it needs of them
        try:
            sequence = await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(
                lambda done: done.cancelled() or done.exception() or self._abort(done.result())
            )
            raise
        try:
            while True:
                event = await events.get()
                if isinstance(event, EngineError):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self._abort(sequence)

    def stats(self) -> EngineStats:
        scheduler, runner = self._scheduler, self._runner
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            num_blocks=runner.num_blocks,
            free_blocks=scheduler.blocks.num_available,
            block_size=runner.block_size,
            weight_bytes=self._weight_bytes,
            kv_bytes=runner.num_blocks * runner.bytes_per_block,
            preemptions=scheduler.num_preemptions,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
        )

    def healthy(self) -> bool:
        """The loop runs, and the step in progress is not stuck."""
        began = self._step_began
        limit_s = STALL_S[self.device.partition(":")[0]]
        stalled = began is not None and time.monotonic() - began > limit_s
        return self._thread.is_alive() and not stalled and not self._is_broken

    def close(self) -> None:
        """End every request with an error, stop the loop and give the memory back. Idempotent."""
        with self._admission:
            if self._is_closed:
                return
            self._is_closed = True
        self._inbox.put(lambda: None)
        self._thread.join()
        self._runner.free()
        self._sampler.free()
        _return_unused_memory(torch.device(self.device))

    # The caller's side: these run on the threads of those who ask.

    def _submit(self, request: Request, sink: Callable[[Event | EngineError], None]) -> Sequence:
        arrived = time.perf_counter()
        self._reserve()
        try:
            sequence = self._make_sequence(request, sink, arrived)
            with self._admission:  # nothing enters once `close` has said that the loop ends
                if self._is_closed:
                    raise EngineError(UNLOADED)
                self._inbox.put(lambda: self._enter(sequence))
        except BaseException:
            self._unreserve()
            raise
        return sequence

    def _make_sequence(
        self, request: Request, sink: Callable[[Event | EngineError], None], arrived: float
    ) -> Sequence:
        params = request.params
        self._check_tokens("logit_bias", params.logit_bias)
        self._check_tokens("stop_token_ids", params.stop_token_ids)
        prompt = self._prompts.build(request)
        length = len(prompt.token_ids)
        if length >= self.max_context:
            raise RequestError(
                f"Prompt has {length:,} tokens; this model accepts {self.max_context - 1:,} and needs "
                f"one for the answer. Shorten the prompt{self._advice()}."
            )
        room = self.max_context - length
        answer = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
        is_chat = bool(request.prompt) and isinstance(request.prompt[0], ChatMessage)
        decoder = StreamDecoder(
            self._tokenizer,
            stop=params.stop,
            skip_special_tokens=params.skip_special_tokens,
            continues=request.continue_last or not is_chat,
        )
        return Sequence(
            prompt.token_ids,
            params,
            max_tokens=length + answer,
            images=prompt.images,
            decoder=decoder,
            sink=sink,
            num_shareable=shareable_tokens(self.spec, length),
            arrived=arrived,
        )

    def _advice(self) -> str:
        """What would make room for longer prompts, if anything would."""
        if self.max_context == self._runner.num_blocks * self._runner.block_size:
            return ", or give the KV cache more room (cache_max_entry_count, cache_bytes, cache_tokens)"
        if self.max_context < self.spec.max_position:
            return ", or load the model with a larger session_len"
        return " or start a new chat"

    def _check_tokens(self, name: str, token_ids: Iterable[int]) -> None:
        size = self.spec.vocab_size
        outside = [token for token in token_ids if not 0 <= token < size]
        if outside:
            raise RequestError(
                f"{name} names token {outside[0]}; this model has tokens 0 to {size - 1}."
            )

    def _reserve(self) -> None:
        """Count the request in before its prompt is built, so that a burst cannot pass the limit."""
        limit = self.config.max_waiting + self.config.max_batch_size
        with self._admission:
            if self._is_closed:
                raise EngineError(UNLOADED)
            if self._num_open >= limit:
                raise QueueFullError(
                    f"{self._num_open} requests are in the queue, which is full. Try again later."
                )
            self._num_open += 1

    def _unreserve(self) -> None:
        with self._admission:
            self._num_open -= 1

    def _abort(self, sequence: Sequence) -> None:
        if not sequence.is_finished:
            sequence.is_aborted = True
            self._inbox.put(lambda: self._drop(sequence))

    # The loop's side: everything below runs on the engine's own thread.

    def _loop(self) -> None:
        if self.device.startswith("cuda:"):
            torch.cuda.set_device(self.device)
        while not self._is_closed:
            try:
                self._drain_inbox()
                self._step_began = time.monotonic()
                self._step()
            except Exception:
                # The loop must outlive any fault; those whose state is unknown are told.
                log.exception("engine step failed")
                self._next = None
                self._fail_all(EngineError("The engine failed on this step; please try again."))
            finally:
                self._step_began = None
        while not self._inbox.empty():
            self._inbox.get()()
        self._next = None
        self._fail_all(EngineError("The model was unloaded while it was answering."))

    def _drain_inbox(self) -> None:
        """Run what others asked for; wait for it when there is nothing else to do."""
        idle = not (self._scheduler.running or self._scheduler.waiting)
        while not self._is_closed and (idle or not self._inbox.empty()):
            self._inbox.get()()
            idle = False

    def _enter(self, sequence: Sequence) -> None:
        self._open.add(sequence)
        if sequence.is_aborted:
            self._drop(sequence)
        else:
            self._scheduler.add(sequence)
            self._prompt_tokens += sequence.num_prompt

    def _step(self) -> None:
        flight, self._next = self._next, None
        if flight is None:
            work = self._scheduler.schedule()
            if not work:
                return
            try:
                flight = self._start(work)
            except Exception as error:
                self._step_apart(work, error)
                return
        self._next = self._start_next(flight)
        try:
            outcomes = self._read(flight)
        except Exception as error:
            self._next = None
            self._step_apart(flight.work, error)
            return
        self._commit(flight.work, outcomes)
        if not self._scheduler.running:
            self._next = None  # all of it is in vain

    def _step_apart(self, work: list[Work], error: Exception) -> None:
        """A step failed with `error`: find out whose fault it is."""
        work = [item for item in work if not item.sequence.is_finished]
        if len(work) == 1:
            self._fail(work[0].sequence, error)
            return
        log.warning("a step over %d sequences failed; trying each alone", len(work))
        for item in work:
            try:
                outcomes = self._read(self._start([item]))
            except Exception as own_error:
                self._fail(item.sequence, own_error)
            else:
                self._commit([item], outcomes)

    def _start(self, work: list[Work], input_ids: Tensor | None = None) -> _Flight:
        """Forward and sample, without waiting for the device; input_ids: see Runner.forward."""
        ahead = 0 if input_ids is None else 1
        logits = self._runner.forward(work, input_ids) if ahead else self._runner.forward(work)
        picks = [item.samples for item in work]
        sampling = [item.sequence for item in work if item.samples]
        if not sampling:
            return _Flight(work, picks, None)
        banned = [self._banned(sequence, ahead) for sequence in sampling]
        return _Flight(work, picks, self._sampler.sample(logits, sampling, banned, ahead))

    def _start_next(self, flight: _Flight) -> _Flight | None:
        """The step after `flight`, if it needs nothing that only the host will know once it has read it."""
        if not self._starts_early or flight.sampled is None or not self._inbox.empty():
            return None
        if any(_needs_host(item.sequence) for item in flight.work):
            return None
        work = self._scheduler.look_ahead(flight.work)
        if not work:
            return None
        tokens = flight.sampled.tokens
        picking = [i.sequence for i, picks in zip(flight.work, flight.picks, strict=True) if picks]
        if len(work) < len(picking):
            rows = {sequence: row for row, sequence in enumerate(picking)}
            index = [rows[item.sequence] for item in work]
            tokens = tokens[to_device(index, torch.int64, tokens.device)]
        try:
            return self._start(work, tokens)
        except Exception:
            # It will be scheduled again after this one, and then its failure finds its owner.
            log.warning("a step could not be started early", exc_info=True)
            return None

    def _read(self, flight: _Flight) -> list[tuple[int, TokenLogprobs | None] | None]:
        """Wait for the step -> a token for each item that reached its last known token."""
        if flight.sampled is None:
            return [None] * len(flight.work)
        tokens, logprobs = flight.sampled.collect()
        sampled = iter(zip(tokens, logprobs, strict=True))
        return [next(sampled) if picks else None for picks in flight.picks]

    def _banned(self, sequence: Sequence, ahead: int) -> tuple[int, ...]:
        params = sequence.params
        if sequence.num_output + ahead >= params.min_new_tokens:
            return ()
        ends = {*self._tokenizer.eos_token_ids, *params.stop_token_ids}
        return tuple(token for token in ends if token < self.spec.vocab_size)

    def _commit(
        self, work: list[Work], outcomes: list[tuple[int, TokenLogprobs | None] | None]
    ) -> None:
        for item, outcome in zip(work, outcomes, strict=True):
            if item.sequence.is_finished:  # since the step began
                continue
            token, logprobs = outcome or (None, None)
            if token == INVALID_TOKEN:
                self._fail(item.sequence, EngineError(_NOT_FINITE.format(dtype=self.dtype)))
                continue
            self._scheduler.commit(item, token)
            if token is not None:
                self._completion_tokens += 1
                item.sequence.mark_token()
                self._emit(item.sequence, token, logprobs)

    def _emit(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> None:
        """Send the token's text, and the end when this token brings it."""
        params, decoder = sequence.params, sequence.decoder
        may_stop = sequence.num_output >= params.min_new_tokens
        reason: FinishReason | None = None
        match: str | int | None = None
        text = ""
        is_end = token in self._tokenizer.eos_token_ids and not params.ignore_eos
        if may_stop and (is_end or token in params.stop_token_ids):
            reason, match = "stop", token
        else:
            text, match = decoder.push(token, may_stop=may_stop)
            if match is not None:
                reason = "stop"
            elif sequence.num_tokens >= sequence.max_tokens:
                reason = "length"
        if reason and not isinstance(match, str):
            text += decoder.flush()
        details = () if logprobs is None else (self._describe(token, logprobs),)
        sequence.sink(TextDelta(text, (token,), details))
        if reason:
            self._finish(sequence, reason, match)

    def _describe(self, token: int, logprobs: TokenLogprobs) -> Logprob:
        def entry(token_id: int, value: float, top: tuple[Logprob, ...] = ()) -> Logprob:
            text = self._tokenizer.token_text(token_id)
            return Logprob(token_id, text, self._tokenizer.token_bytes(token_id), value, top)

        top = tuple(entry(token_id, value) for token_id, value in logprobs.top)
        return entry(token, logprobs.sampled, top)

    def _finish(self, sequence: Sequence, reason: FinishReason, match: str | int | None) -> None:
        event = Finished(reason, sequence.usage(), sequence.timing(), match)
        self._leave(sequence)
        sequence.sink(event)

    def _drop(self, sequence: Sequence) -> None:
        if not sequence.is_finished:
            self._finish(sequence, "abort", None)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            error = _out_of_memory("answering this request", error)
        elif isinstance(error, torch.AcceleratorError):
            log.critical("the device failed", exc_info=error)
            self._is_broken = True
            error = EngineError(
                "The GPU reported an error that it cannot recover from. Restart LMDeck."
            )
        elif not isinstance(error, EngineError):
            log.error("request %d failed", sequence.id, exc_info=error)
            error = EngineError(
                "The engine could not compute this request; its log has the details."
            )
        self._leave(sequence)
        sequence.sink(error)

    def _fail_all(self, error: EngineError) -> None:
        for sequence in list(self._open):
            self._leave(sequence)
            sequence.sink(error)

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence out of every book."""
        sequence.is_finished = True
        self._open.discard(sequence)
        self._sampler.release(sequence)
        if sequence in self._scheduler.running or sequence in self._scheduler.waiting:
            self._scheduler.remove(sequence)
        self._unreserve()


_NOT_FINITE = (
    "The model computed NaN or Inf for this request in {dtype}. Load it with dtype bfloat16 or float32; "
    "if that fails too, its weights are damaged."
)


def _needs_host(sequence: Sequence) -> bool:
    """Penalties count tokens and log probabilities are read apart: both wait for the step before."""
    return sequence.params.logprobs is not None or has_penalty(sequence)


def _return_unused_memory(device: torch.device) -> None:
    """Give back what torch keeps for later, so that the next load sees it as free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _out_of_memory(doing: str, error: torch.OutOfMemoryError) -> CapacityError:
    needed = str(error).split(". GPU", maxsplit=1)[0]
    room = ""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        room = f" {free:,} of {total:,} bytes are free."
    return CapacityError(
        f"Out of memory while {doing}: {needed}.{room} Use a smaller or quantized model, a smaller "
        "KV cache or a shorter prompt."
    )
