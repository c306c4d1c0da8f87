"""The demo model's data and folder hold together: processor, seeds, phrasings, size."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from assets.demo_training import conversations, heldout, questions, scenes, stories

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "demo_model"


def test_same_seed_draws_the_same_picture():
    one, two = (scenes.draw(scenes.make_scene(2**40 + 7)) for _ in range(2))
    assert one.tobytes() == two.tobytes()


def test_held_out_set_is_fixed_and_even_over_categories():
    one = list(heldout.image_questions(120))
    two = list(heldout.image_questions(120))
    assert [(q.question, q.answer) for q in one] == [(q.question, q.answer) for q in two]
    counts = {c: sum(q.category == c for q in one) for c in questions.CATEGORIES}
    assert counts == dict.fromkeys(questions.CATEGORIES, 20)


@pytest.mark.parametrize("category", questions.PHRASES)
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_held_back_phrasings_are_never_trained(category: str, lang: str):
    trained, held_back = questions.PHRASES[category][lang]
    assert not set(trained) & set(held_back)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_stories_keep_the_names_of_the_request(lang: str):
    rng = random.Random(5)
    for _ in range(200):
        request, story, names = stories.story_request(rng, lang)
        assert all(name in request and story.count(name) >= 2 for name in names), request


def test_training_pixels_equal_the_processor():
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoProcessor.from_pretrained(FOLDER).image_processor
    if type(processor).__name__ != "CLIPImageProcessorPil":
        pytest.skip("torchvision is installed; its resize rounds differently")
    image = next(heldout.image_questions(1)).image
    expected = processor(images=image, return_tensors="np")["pixel_values"][0]
    trained = conversations.to_pixels(image) / 127.5 - 1.0
    assert np.abs(expected - trained).max() < 1e-6


def test_folder_fits_and_names_its_files():
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) <= 32_000_000
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["vision_config"]["image_size"] == conversations.IMAGE_SIZE
