"""From a Request to what the model reads: token ids, and where pictures stand among them.

A placeholder token becomes as many copies as the vision tower gives rows; the runner replaces them.
`build` keeps no state, so any number of request threads may call it at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from engine.chat import ChatTemplate
from engine.errors import ModelError, RequestError
from engine.images import check_image, check_num_images
from engine.models.spec import ModelSpec, VisionSpec
from engine.tokenizer import Tokenizer
from engine.types import ChatMessage, ImagePart, Request

_LENGTHS = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
_MAX_SIDE = 4096  # of what a vision tower reads
# what transformers' processors raise on settings that make no sense
_UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class ImageSpan:
    """One picture: its rows are token_ids[start : start + length]; equal digests are equal pixels."""

    start: int
    length: int
    pixel_values: Tensor  # [3, H, W] float32
    digest: bytes


@dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    images: tuple[ImageSpan, ...] = ()


class PromptBuilder:
    """Builds prompts for one checkpoint."""

    def __init__(
        self, folder: str | Path, spec: ModelSpec, tokenizer: Tokenizer, template: ChatTemplate
    ) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self._template = template
        self._processor = None
        if spec.vision is not None:
            if not tokenizer.token_bytes(spec.vision.image_token_id):
                raise ModelError(
                    f"The tokenizer has no token {spec.vision.image_token_id}, which config.json names "
                    "as the image placeholder. Copy the tokenizer files from the model's page again."
                )
            self._processor = _load_processor(Path(folder), spec.vision)

    def build(self, request: Request) -> Prompt:
        """Raises RequestError for what this model cannot read."""
        prompt = request.prompt
        if isinstance(prompt, str):
            ids, images = self._encode_text(prompt), []
        elif prompt and isinstance(prompt[0], ChatMessage):
            images = self._images(prompt)
            ids = self._encode_chat(prompt, request.continue_last)
        else:
            ids, images = self._check_ids(prompt), []
        if not ids:
            raise RequestError("The prompt is empty. Give at least one message, word or token.")
        self._check_ids(ids)
        return self._place(ids, images)

    def _encode_text(self, text: str) -> list[int]:
        """A raw prompt is written by hand, so control tokens in it are meant; BOS is added once."""
        ids = self._tokenizer.encode(text, parse_special=True)
        return self._with_bos(ids) if ids else ids

    def _encode_chat(self, messages: Sequence[ChatMessage], continue_last: bool) -> list[int]:
        rendered = self._template.render(messages, continue_last=continue_last)
        ids = self._tokenizer.encode_marked(rendered.text, rendered.marks)
        return self._with_bos(ids) if self._template.adds_bos else ids

    def _with_bos(self, ids: list[int]) -> list[int]:
        prefix = self._tokenizer.bos_prefix
        return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]

    def _check_ids(self, ids: Sequence[Any]) -> list[int]:
        size = self._spec.vocab_size
        for index, token in enumerate(ids):
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < size:
                raise RequestError(
                    f"Token {index} of the prompt is {token!r:.40}; this model has tokens 0 to {size - 1}."
                )
        return list(ids)

    def _images(self, messages: Sequence[ChatMessage]) -> list[Image.Image]:
        images = [
            part.image
            for message in messages
            if not isinstance(message.content, str)
            for part in message.content
            if isinstance(part, ImagePart)
        ]
        check_num_images(len(images), supports_images=self._spec.vision is not None)
        return images

    def _place(self, ids: list[int], images: list[Image.Image]) -> Prompt:
        """Widen each placeholder to the tower's rows and put the pictures there, in order."""
        vision = self._spec.vision
        if vision is None:
            return Prompt(ids)
        num_places = ids.count(vision.image_token_id)
        if num_places != len(images):
            raise RequestError(
                f"The prompt has places for {num_places} images, and the request brings {len(images)}. "
                "Send images in chat messages; the chat template writes their places."
            )
        wide: list[int] = []
        spans: list[ImageSpan] = []
        pictures = iter(images)
        for token in ids:
            if token != vision.image_token_id:
                wide.append(token)
                continue
            spans.append(self._span(next(pictures), len(wide), vision.num_image_tokens))
            wide += [token] * vision.num_image_tokens
        return Prompt(wide, tuple(spans))

    def _span(self, image: Image.Image, start: int, length: int) -> ImageSpan:
        pixels = _pixel_values(self._processor, check_image(image))
        digest = hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).digest()
        return ImageSpan(start, length, pixels, digest)


def _load_processor(folder: Path, vision: VisionSpec) -> Any:
    """The checkpoint's image processor on Pillow, so that results do not depend on torchvision."""
    try:
        processor = AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )
        _check_settings(processor)
        pixels = _pixel_values(processor, Image.new("RGB", (40, 30)))
        if not pixels.isfinite().all():
            raise ValueError("its numbers make pixels that are not finite")
    except _UNREADABLE as error:
        raise ModelError(
            "The checkpoint's preprocessor_config.json is missing or cannot be read. Copy it from the "
            "model's page again."
        ) from error
    side = vision.config.get("image_size", pixels.shape[-1])
    if tuple(pixels.shape) != (3, side, side):
        raise ModelError(
            f"preprocessor_config.json makes images of {list(pixels.shape)}; the vision tower in config.json "
            f"reads {[3, side, side]}. Copy both files from the model's page again."
        )
    return processor


def _check_settings(processor: Any) -> None:
    """transformers would take any text for true, and fill the memory with a picture of any size."""
    for name, value in vars(processor).items():
        if name.startswith("do_") and not isinstance(value, bool | None):
            raise ValueError(f"{name} is {value!r}; expected true or false")
    for name in ("size", "crop_size", "pad_size"):
        for key, length in getattr(processor, name, None) or ():
            if key in _LENGTHS and length > _MAX_SIDE:
                raise ValueError(f"{name} has {key} {length}; expected at most {_MAX_SIDE}")


def _pixel_values(processor: Any, image: Image.Image) -> Tensor:
    """[3, H, W] float32 of one RGB picture."""
    values = processor(images=image, return_tensors="pt")["pixel_values"]
    return values[0].to(torch.float32).contiguous()
