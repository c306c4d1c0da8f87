"""PromptBuilder: ids and picture places for each form of a request."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from engine.chat import ChatTemplate
from engine.errors import ModelError, RequestError
from engine.prompt import PromptBuilder
from engine.tokenizer import Tokenizer
from engine.types import ChatMessage, ImagePart, Request, TextPart
from tests.fakes import byte_level_folder, sentencepiece_folder

PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": 28, "width": 28},
    "size": {"shortest_edge": 28},
    "do_center_crop": True,
    "do_resize": True,
    "do_normalize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}


def spec_of(tokenizer, *, image=False):
    vision = None
    if image:
        vision = SimpleNamespace(
            image_token_id=tokenizer.control_id("<image>"),
            num_image_tokens=4,
            config={"image_size": 28},
        )
    return SimpleNamespace(
        vision=vision, family="llava", vocab_size=tokenizer.vocab_size, eos_token_ids=()
    )


def make_builder(folder, *, image=False, template=None):
    tokenizer = Tokenizer.load(folder)
    spec = spec_of(tokenizer, image=image)
    chat = ChatTemplate.load(folder, tokenizer, spec, template)
    return PromptBuilder(folder, spec, tokenizer, chat), tokenizer


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory):
    folder = sentencepiece_folder(
        tmp_path_factory.mktemp("prompt") / "llava", reserved=("<image>",)
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture(scope="module")
def vision(vision_folder):
    return make_builder(vision_folder, image=True, template="llava-v1")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make_builder(
        byte_level_folder(tmp_path_factory.mktemp("prompt") / "text", special=("<|im_end|>",)),
        template="chatml",
    )


def noise(seed, size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ask(*parts, **options):
    return Request((ChatMessage("user", tuple(parts)),), **options)


def test_placeholders_widen_to_the_towers_rows_in_order(vision):
    builder, tokenizer = vision
    first, second = noise(1), noise(2)
    prompt = builder.build(ask(ImagePart(first), TextPart("and "), ImagePart(second)))
    image_id = tokenizer.control_id("<image>")
    assert prompt.token_ids.count(image_id) == 8
    for span in prompt.images:
        assert prompt.token_ids[span.start : span.start + span.length] == [image_id] * 4
        assert span.pixel_values.shape == (3, 28, 28)
        assert span.pixel_values.dtype == torch.float32
    assert prompt.images[0].start < prompt.images[1].start
    assert prompt.images[0].digest != prompt.images[1].digest
    swapped = builder.build(ask(ImagePart(second), ImagePart(first)))
    assert swapped.images[0].digest == prompt.images[1].digest


def test_bos_stands_once_before_chat_and_raw_text(vision):
    builder, tokenizer = vision
    for prompt in ("the dog", "<s>the dog", (ChatMessage("user", "the dog"),)):
        ids = builder.build(Request(prompt)).token_ids
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


def test_pixels_equal_the_clip_processor_on_pillow(vision):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    options = {k: v for k, v in PREPROCESSOR.items() if k != "image_processor_type"}
    picture = noise(3, (61, 47))
    expected = CLIPImageProcessorPil(**options)(images=picture, return_tensors="pt")[
        "pixel_values"
    ][0]
    span = vision[0].build(ask(ImagePart(picture))).images[0]
    assert torch.equal(span.pixel_values, expected.float())


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (1, 100), (500, 5)])
def test_tiny_pictures_are_read_as_colour(vision, size):
    span = vision[0].build(ask(ImagePart(Image.new("RGB", size, (255, 0, 0))))).images[0]
    assert span.pixel_values.shape == (3, 28, 28)
    assert torch.allclose(span.pixel_values[0], torch.tensor(2.0), atol=1e-5)
    assert torch.allclose(span.pixel_values[1], torch.tensor(-2.0), atol=1e-5)


def test_pictures_that_python_callers_make_are_checked_too(vision):
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    span = vision[0].build(ask(ImagePart(clear))).images[0]
    assert torch.allclose(span.pixel_values, torch.tensor(2.0), atol=1e-5)
    with pytest.raises(RequestError, match="Crop it"):
        vision[0].build(ask(ImagePart(Image.new("RGB", (3000, 2)))))


def test_typed_placeholder_is_text_in_chat_and_refused_in_raw_prompts(vision):
    builder, tokenizer = vision
    ids = builder.build(ask(TextPart("what is <image> ?"))).token_ids
    assert tokenizer.control_id("<image>") not in ids
    for raw in ("look: <image>", (1, tokenizer.control_id("<image>"))):
        with pytest.raises(RequestError, match="places for 1 images"):
            builder.build(Request(raw))


def test_more_than_sixteen_pictures_are_refused(vision):
    with pytest.raises(RequestError, match="at most 16"):
        vision[0].build(ask(*[ImagePart(noise(0))] * 17))


def test_text_model_refuses_pictures(text):
    with pytest.raises(RequestError, match="reads text only"):
        text[0].build(ask(ImagePart(noise(0))))


@pytest.mark.parametrize("prompt", ["", (), []])
def test_empty_prompts_are_refused(text, prompt):
    with pytest.raises(RequestError, match="prompt is empty"):
        text[0].build(Request(prompt))


@pytest.mark.parametrize("token", [-1, 10**9, True, 1.5, "a", None])
def test_token_ids_are_checked(text, token):
    with pytest.raises(RequestError, match="Token 1 of the prompt"):
        text[0].build(Request((0, token)))


def test_token_ids_pass_as_they_are(text):
    assert text[0].build(Request((5, 4, 3))).token_ids == [5, 4, 3]


@pytest.mark.parametrize("prompt", ["a\ud800", (ChatMessage("user", "\udfff"),)])
def test_lone_surrogates_are_refused(text, prompt):
    with pytest.raises(RequestError, match="lone surrogate"):
        text[0].build(Request(prompt))


def test_control_tokens_work_in_raw_prompts(text):
    builder, tokenizer = text
    assert tokenizer.control_id("<|im_end|>") in builder.build(Request("a<|im_end|>")).token_ids


def test_many_threads_build_the_same_prompts(vision):
    builder, _ = vision
    requests = [ask(ImagePart(noise(i % 4)), TextPart(f"</s> number {i % 4}")) for i in range(32)]
    alone = [builder.build(request) for request in requests[:4]]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(builder.build, requests))
    for i, prompt in enumerate(together):
        assert prompt.token_ids == alone[i % 4].token_ids
        assert prompt.images[0].digest == alone[i % 4].images[0].digest


def test_missing_preprocessor_is_a_model_error(tmp_path):
    folder = sentencepiece_folder(tmp_path / "m", reserved=("<image>",))
    with pytest.raises(ModelError, match=r"preprocessor_config\.json"):
        make_builder(folder, image=True)


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(
    "setting",
    [
        {"size": {"shortest_edge": 1e99}},
        {"size": {"shortest_edge": 10**6}},
        {"size": {"height": 10**9, "width": 10**9}},
        {"size": {"shortest_edge": "28"}},
        {"size": []},
        {"crop_size": {"height": 10**9, "width": 28}},
        {"do_convert_rgb": "q"},
        {"do_rescale": 1},
        {"resample": 99},
        {"image_mean": []},
        {"image_std": [0, 0, 0]},
    ],
)
def test_preprocessor_that_makes_no_sense_is_a_model_error(tmp_path, setting):
    folder = sentencepiece_folder(tmp_path / "m", reserved=("<image>",))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | setting))
    with pytest.raises(ModelError, match="cannot be read"):
        make_builder(folder, image=True)


def test_preprocessor_for_another_tower_is_a_model_error(tmp_path):
    folder = sentencepiece_folder(tmp_path / "m", reserved=("<image>",))
    other = {**PREPROCESSOR, "crop_size": {"height": 14, "width": 14}}
    (folder / "preprocessor_config.json").write_text(json.dumps(other))
    with pytest.raises(ModelError, match="vision tower"):
        make_builder(folder, image=True)


def test_processor_runs_without_torchvision(vision_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    builder, _ = make_builder(vision_folder, image=True)
    assert builder._processor.backend == "pil"
