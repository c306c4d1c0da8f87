"""The demo model keeps its promises on a held-out set, through our engine and through transformers.

The set is made with seeds that training never draws (assets/demo_training/heldout.py).
"""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from assets.demo_training.heldout import describe_prompts, image_questions, is_exact, story_prompts
from assets.demo_training.questions import ZH_COLOURS, ZH_SHAPES
from engine import (
    ChatMessage,
    Engine,
    EngineConfig,
    ImagePart,
    Request,
    SamplingParams,
    TextDelta,
    TextPart,
)

MODEL = Path(__file__).resolve().parents[2] / "assets" / "demo_model"
STREAMS = 16
SMALL_TALK = [
    "Hello!",
    "你是谁？",
    "What can you do?",
    "What is the capital of France?",
    "2 + 3 = ?",
]
OBJECTS = [
    name
    for colour, zh_colour in ZH_COLOURS.items()
    for shape, zh_shape in ZH_SHAPES.items()
    for name in (f"{colour} {shape}", zh_colour + zh_shape)
]


@pytest.fixture(scope="module")
def engine():
    engine = Engine.load(EngineConfig(model=MODEL, device="cpu"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def peer():
    """transformers' own model, processor and loading report."""
    model, report = AutoModelForImageTextToText.from_pretrained(
        MODEL, dtype=torch.float32, output_loading_info=True
    )
    return model.eval(), AutoProcessor.from_pretrained(MODEL), report


def ask(engine, text, image=None, max_new_tokens=300):
    """(answer, token ids), greedily."""
    parts = (TextPart(text),) if image is None else (ImagePart(image), TextPart(text))
    params = SamplingParams(temperature=0, max_new_tokens=max_new_tokens)
    stream = engine.stream(Request((ChatMessage("user", parts),), params))
    events = [event for event in stream if isinstance(event, TextDelta)]
    answer = "".join(event.text for event in events)
    return answer, [token for event in events for token in event.token_ids]


def ask_together(engine, questions):
    """Answers to (text, image) pairs, many at a time."""
    with ThreadPoolExecutor(STREAMS) as pool:
        return [answer for answer, _ in pool.map(lambda q: ask(engine, *q), questions)]


@pytest.mark.parametrize("unseen_phrasing", [False, True])
def test_image_questions_are_answered_exactly(engine, unseen_phrasing):
    """In words that training never uses, positions are the weakest: 86% (see the model card)."""
    count, least = (500, 0.80) if unseen_phrasing else (2000, 0.95)
    questions = list(image_questions(count, unseen_phrasing=unseen_phrasing))
    answers = ask_together(engine, [(q.question, q.image) for q in questions])
    asked = Counter(q.category for q in questions)
    wrong = [
        (q.category, q.question, q.answer, answer)
        for q, answer in zip(questions, answers, strict=True)
        if not is_exact(answer, q.answer)
    ]
    missed = Counter(category for category, *_ in wrong)
    assert set(asked) == {"colour", "shape", "count", "position", "relation", "digit"}
    assert len(wrong) <= 0.05 * count, f"{len(wrong)} of {count} wrong, first {wrong[:5]}"
    for category, number in asked.items():
        share = 1 - missed[category] / number
        assert share >= least, (
            f"{category}: {share:.1%}; {[w for w in wrong if w[0] == category][:5]}"
        )


def test_descriptions_name_the_objects_that_are_there_and_no_others(engine):
    prompts = list(describe_prompts(60))
    answers = ask_together(engine, [(request, image) for image, request, _, _ in prompts])
    there = [set(names) for _, _, names, _ in prompts]
    named = [{name for name in OBJECTS if name in answer} for answer in answers]
    num_there, num_named = sum(map(len, there)), sum(map(len, named))
    num_right = sum(len(a & b) for a, b in zip(there, named, strict=True))
    assert num_right >= 0.95 * num_there, f"{num_right} of {num_there} objects named"
    assert num_right >= 0.95 * num_named, f"{num_named - num_right} of {num_named} are not there"


def test_stories_keep_their_named_characters(engine):
    prompts = list(story_prompts(40))
    stories = ask_together(engine, [(request, None) for request, _ in prompts])
    kept = [
        all(name in story for name in names)
        for story, (_, names) in zip(stories, prompts, strict=True)
    ]
    lost = [(p, s) for p, s, ok in zip(prompts, stories, kept, strict=True) if not ok]
    assert sum(kept) >= 0.95 * len(kept), f"{len(lost)} of {len(kept)} lost a name: {lost[:2]}"
    assert min(map(len, stories)) > 60, "a story is longer than a sentence"
    assert len(set(stories)) > 0.9 * len(stories), "different requests give different stories"


def test_answers_are_those_of_transformers(engine, peer):
    model, processor, _ = peer
    pictures = [(q.question, q.image) for q in image_questions(20, seed=1)]
    described = [(request, image) for image, request, _, _ in describe_prompts(5, seed=1)]
    stories = [(request, None) for request, _ in story_prompts(5, seed=1)]
    for text, image in [*pictures, *described, *stories, *((t, None) for t in SMALL_TALK)]:
        content = [] if image is None else [{"type": "image", "image": image}]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
        inputs = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=300)
        expected = output[0, inputs["input_ids"].shape[1] :].tolist()
        assert ask(engine, text, image)[1] == expected, text


def test_transformers_loads_the_folder_without_a_missing_or_unused_weight(peer):
    _, _, report = peer
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]


def test_the_folder_fits_the_project():
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 32_000_000
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"]
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert text["hidden_size"] % 128 == text["intermediate_size"] % 128 == 0
