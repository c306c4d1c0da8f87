"""Small honest stand-ins: checkpoint folders with real tokenizers of a few hundred tokens."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.errors import EngineError, QueueFullError, RequestError
from engine.tokenizer import StreamDecoder
from engine.tokenizer import Tokenizer as EngineTokenizer
from engine.types import (
    Event,
    Finished,
    ImagePart,
    Logprob,
    Request,
    TextDelta,
    TextPart,
    Timing,
    Usage,
)

CORPUS = [
    "the quick brown fox jumps over the lazy dog and answers questions",
    "你好 世界 模型 回答 問題 café naïve привет мир 🙂🙃 end stop stops",
    "user assistant system a chat between them: USER: ASSISTANT: [INST] [/INST] <<SYS>>",
] * 8


def byte_level_folder(folder: Path, *, special: tuple[str, ...] = (), **config) -> Path:
    """A checkpoint folder with a byte-level BPE tokenizer.json, as Llama 3 and Qwen have."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    config = {"eos_token": "<|endoftext|>", **config}
    PreTrainedTokenizerFast(tokenizer_object=backend, **config).save_pretrained(folder)
    return folder


def sentencepiece_folder(
    folder: Path, *, dummy_prefix: bool = True, reserved: tuple[str, ...] = (), **config
) -> Path:
    """A checkpoint folder with tokenizer.model only, naming a class that exists as remote code."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"[UNUSED_TOKEN_{i}]" for i in range(len(reserved))]
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=file,
            model_type="bpe",
            vocab_size=420,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.98,
            add_dummy_prefix=dummy_prefix,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            user_defined_symbols=names,
            minloglevel=2,
        )
    added = {
        str(3 + i): {"content": token, "special": True, "normalized": False}
        for i, token in enumerate(reserved)
    }
    remote = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
    settings = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": remote,
        "added_tokens_decoder": added,
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


class FakeEngine:
    """Answers `echo: <the last message>`, one token at a time, through the real stream decoder.

    The last message may ask for a fault: REFUSE and FULL before any event, FAIL and CRASH after three
    tokens; SLOW waits 20 ms a token, and STUCK for ever before the first.
    """

    def __init__(self, name: str, folder: Path, *, supports_images: bool = True) -> None:
        self.name = name
        self.max_context = 4096
        self.supports_images = supports_images
        self.is_healthy = True
        self.requests: list[Request] = []
        self.num_started = 0
        self.num_open = 0
        self.num_tokens = 0
        self._tokenizer = EngineTokenizer.load(byte_level_folder(folder))

    def healthy(self) -> bool:
        return self.is_healthy

    def stats(self) -> dict[str, int]:
        return {"running": self.num_open}

    async def astream(self, request: Request) -> AsyncIterator[Event]:
        self.requests.append(request)
        said = "".join(_said(request.prompt[-1].content))
        if "REFUSE" in said:
            raise RequestError("Prompt has 9,120 tokens; this model accepts 8,192. Shorten it.")
        if "FULL" in said:
            raise QueueFullError("1 requests are in the queue, which is full. Try again later.")
        self.num_started += 1
        self.num_open += 1
        try:
            async for event in self._answer(request, said):
                yield event
        finally:
            self.num_open -= 1

    async def _answer(self, request: Request, said: str) -> AsyncIterator[Event]:
        params = request.params
        ids = [*self._tokenizer.encode(f"echo: {said}"), self._tokenizer.eos_token_ids[0]]
        decoder = StreamDecoder(self._tokenizer, stop=params.stop)
        reason, match = "length", None
        if "STUCK" in said:
            await asyncio.sleep(3600)
        for count, token in enumerate(ids[: params.max_new_tokens], 1):
            await asyncio.sleep(0.02 if "SLOW" in said else 0)
            if count == 4 and "FAIL" in said:
                raise EngineError("The engine failed on this step; please try again.")
            if count == 4 and "CRASH" in said:
                raise ZeroDivisionError("secret detail")
            self.num_tokens += 1
            if token in self._tokenizer.eos_token_ids:
                reason, match, text = "stop", token, decoder.flush()
            else:
                text, match = decoder.push(token)
                if match is not None:
                    reason = "stop"
                elif count == params.max_new_tokens:
                    text += decoder.flush()
            yield TextDelta(text, (token,), self._logprobs(token, params.logprobs))
            if match is not None:
                break
        usage = Usage(prompt_tokens=len(said), completion_tokens=count, cached_tokens=1)
        yield Finished(reason, usage, Timing(0, 0, 0, 0, 0), match)

    def _logprobs(self, token: int, num_top: int | None) -> tuple[Logprob, ...]:
        if num_top is None:
            return ()

        def entry(i: int, value: float, top: tuple[Logprob, ...] = ()) -> Logprob:
            text, content = self._tokenizer.token_text(i), self._tokenizer.token_bytes(i)
            return Logprob(i, text, content, value, top)

        values = (-0.5, -math.inf, math.nan, *(-1.0 - k for k in range(20)))
        return (entry(token, -0.5, tuple(entry(token + k, values[k]) for k in range(num_top))),)


class FakeHost:
    def __init__(self, *engines: FakeEngine) -> None:
        self.engines = {engine.name: engine for engine in engines}

    def names(self) -> list[str]:
        return list(self.engines)

    def get(self, name: str | None = None) -> FakeEngine:
        if name is None and self.engines:
            return next(iter(self.engines.values()))
        if name not in self.engines:
            raise RequestError(f"Model {name!r} is not loaded.")
        return self.engines[name]


def _said(content) -> list[str]:
    if isinstance(content, str):
        return [content]
    sizes = [f"{p.image.width}x{p.image.height} " for p in content if isinstance(p, ImagePart)]
    return sizes + [part.text for part in content if isinstance(part, TextPart)]
