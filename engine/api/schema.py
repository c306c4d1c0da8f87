"""The body of POST /v1/chat/completions: checked, bounded, turned into a Request.

null means absent. Fields that we do not know are ignored, since clients send their own; fields that
we know and cannot honour are refused unless their value asks for nothing (_HARMLESS). Beyond OpenAI's
fields: top_k (0 or -1 is off), min_p, repetition_penalty, min_tokens, stop_token_ids, ignore_eos,
skip_special_tokens, and continue_final_message with add_generation_prompt as in vLLM. Defaults are
OpenAI's, not those of the checkpoint's generation_config.json. A message's name and an image's detail
are accepted and have no effect.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.api.errors import ApiError
from engine.errors import RequestError
from engine.images import check_num_images, load_data_url
from engine.types import ChatMessage, ImagePart, Request, SamplingParams, TextPart

MAX_CHOICES = 16
MAX_REQUEST_PIXELS = 100_000_000  # of all images of a request: 300 MB as RGB

_HARMLESS: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "echo": (False,),
    "prompt_logprobs": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "logits_processors": ([],),
}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

Finite = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {key: value for key, value in values.items() if value is not None}
        return values


class ImageUrl(_Body):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class TextContent(_Body):
    type: Literal["text"]
    text: str


class ImageContent(_Body):
    type: Literal["image_url"]
    image_url: str | ImageUrl

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


Part = Annotated[TextContent | ImageContent, Field(discriminator="type")]


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(min_length=1)]
    tool_calls: Annotated[list[Any], Field(max_length=0)] = []

    @property
    def num_images(self) -> int:
        if isinstance(self.content, str):
            return 0
        return sum(isinstance(part, ImageContent) for part in self.content)


class StreamOptions(_Body):
    include_usage: bool = False


class ChatBody(_Body):
    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=16384)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    temperature: Annotated[Finite, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[Finite, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    min_p: Annotated[Finite, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[Finite, Field(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Annotated[Finite, Field(ge=-100, le=100)]] = {}
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stop: str | list[str] = []
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] = []
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None

    @property
    def num_images(self) -> int:
        return sum(message.num_images for message in self.messages)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def parse_body(data: bytes) -> ChatBody:
    """Raises ApiError 400 that names the field. Takes as long as the body is large: not on the loop."""
    values = _parse_json(data)
    if not isinstance(values, dict):
        raise ApiError(400, "The body is not a JSON object. Send {model, messages, ...}.")
    for name, harmless in _HARMLESS.items():
        value = values.get(name)
        if value is not None and not any(_same(value, ok) for ok in harmless):
            raise ApiError(
                400, f"{name} is not supported by this server. Leave it out.", param=name
            )
    try:
        body = ChatBody.model_validate(values)
    except ValidationError as error:
        raise _validation_error(error) from None
    _check_combinations(body)
    return body


def to_requests(body: ChatBody, *, supports_images: bool) -> list[Request]:
    """One engine request for each of the n choices. Decodes pictures: not on the event loop."""
    messages = _messages(body, supports_images)
    seeds = [body.seed] * body.n
    if body.seed is not None:
        # distinct answers that are still repeatable; wraps around at the largest seed
        seeds = [(body.seed + i + 2**63) % 2**64 - 2**63 for i in range(body.n)]
    return [
        Request(messages, _sampling(body, seed), continue_last=body.continue_final_message)
        for seed in seeds
    ]


def _sampling(body: ChatBody, seed: int | None) -> SamplingParams:
    return SamplingParams(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=_logit_bias(body),
        seed=seed,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
        stop_token_ids=tuple(body.stop_token_ids),
        max_new_tokens=body.max_completion_tokens or body.max_tokens,
        min_new_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        skip_special_tokens=body.skip_special_tokens,
    )


def _logit_bias(body: ChatBody) -> dict[int, float]:
    bias: dict[int, float] = {}
    for token, value in body.logit_bias.items():
        if not re.fullmatch(r"[0-9]{1,9}", token, re.ASCII):
            raise ApiError(
                400,
                f"logit_bias has the key {token[:40]!r}; expected token ids such as '42'.",
                param="logit_bias",
            )
        bias[int(token)] = value
    return bias


def _messages(body: ChatBody, supports_images: bool) -> tuple[ChatMessage, ...]:
    for index, message in enumerate(body.messages):
        if message.num_images and message.role != "user":
            raise _bad_messages(
                f"messages[{index}] is of role {message.role} and has an image; only user messages may."
            )
    try:
        check_num_images(body.num_images, supports_images=supports_images)
    except RequestError as error:
        raise _bad_messages(str(error)) from None
    pictures = _Pictures()
    return tuple(_message(message, pictures) for message in body.messages)


class _Pictures:
    """Decodes a request's images one by one, within the pixels that a request may bring."""

    def __init__(self) -> None:
        self._left = MAX_REQUEST_PIXELS

    def decode(self, url: str) -> ImagePart:
        try:
            image = load_data_url(url)
        except RequestError as error:
            raise _bad_messages(str(error)) from None
        self._left -= image.width * image.height
        if self._left < 0:
            raise _bad_messages(
                f"The images of this request have over {MAX_REQUEST_PIXELS // 10**6} million pixels "
                "together. Scale them down."
            )
        return ImagePart(image)


def _message(message: Message, pictures: _Pictures) -> ChatMessage:
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return ChatMessage(role, message.content)
    parts = (
        pictures.decode(part.url) if isinstance(part, ImageContent) else TextPart(part.text)
        for part in message.content
    )
    return ChatMessage(role, tuple(parts))


def _bad_messages(sentence: str) -> ApiError:
    return ApiError(400, sentence, param="messages")


def _check_combinations(body: ChatBody) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true.", param="stream_options")
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) == 2:
        raise ApiError(
            400,
            "max_tokens and max_completion_tokens differ. Send one of them.",
            param="max_completion_tokens",
        )
    if limits and body.min_tokens > min(limits):
        raise ApiError(
            400, f"min_tokens is {body.min_tokens}, above max_tokens.", param="min_tokens"
        )
    if body.add_generation_prompt is (not body.continue_final_message):
        return
    if body.add_generation_prompt is not None:
        raise ApiError(
            400,
            "add_generation_prompt and continue_final_message must be opposites. Leave the first out.",
            param="add_generation_prompt",
        )


def _parse_json(data: bytes) -> Any:
    try:
        values = json.loads(
            data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_without_twins
        )
        if _SURROGATE.search(data):
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(
            400,
            "The body has half of a surrogate pair (\\ud800 to \\udfff), which is no character.",
        ) from None
    except UnicodeDecodeError:
        raise ApiError(400, "The body is not UTF-8. Encode it as UTF-8.") from None
    except RecursionError:
        raise ApiError(400, "The body's JSON is nested too deeply.") from None
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {str(error)[:200]}.") from None
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("an object has the same key twice")
    return values


def _same(value: Any, harmless: Any) -> bool:
    return value == harmless and type(value) is type(harmless)


def _validation_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [part for part in first["loc"] if part not in ("str", "text", "image_url", "ImageUrl")]
    where = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}"
        for part in path
        if "[" not in str(part)
    ).lstrip(".")
    name = str(first["loc"][0]) if first["loc"] else None
    return ApiError(400, f"{where or 'body'}: {first['msg']}.", param=name)
