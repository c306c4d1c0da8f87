"""Measure a demo model folder through transformers: real greedy generation on the held-out set.

python -m assets.demo_training.evaluate assets/demo_model --output results.json
"""

import argparse
import itertools
import json
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from assets.demo_training import heldout
from assets.demo_training.chinese import is_chinese


class Answerer:
    """Answers (picture or None, request) pairs in batches, greedily."""

    def __init__(self, folder: Path, device: str, batch: int) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "left"
        self.model = (
            AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
            .to(device)
            .eval()
        )
        self.device, self.batch = device, batch

    def __call__(
        self, asked: Iterable[tuple[Image.Image | None, str]], max_new_tokens: int
    ) -> Iterator[str]:
        asked = iter(asked)
        while part := list(itertools.islice(asked, self.batch)):
            yield from self._answer(part, max_new_tokens)

    @torch.no_grad()
    def _answer(self, part: list[tuple[Image.Image | None, str]], max_new_tokens: int) -> list[str]:
        prompts = [self._prompt(image is not None, request) for image, request in part]
        images = [image for image, _ in part if image is not None] or None
        inputs = self.processor(images=images, text=prompts, padding=True, return_tensors="pt").to(
            self.device
        )
        inputs.pop("token_type_ids", None)
        made = self.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None
        )
        fresh = made[:, inputs["input_ids"].shape[1] :]
        return [
            text.strip() for text in self.processor.batch_decode(fresh, skip_special_tokens=True)
        ]

    def _prompt(self, with_image: bool, request: str) -> str:
        content = [{"type": "image"}] if with_image else []
        message = {"role": "user", "content": [*content, {"type": "text", "text": request}]}
        return self.processor.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=False
        )


def exact_match(
    answerer: Answerer, held: list[heldout.ImageQuestion]
) -> tuple[dict[str, float], list[str]]:
    """Share of exact answers by category and language, and the first wrong ones."""
    right: dict[str, list[bool]] = {}
    wrong = []
    answers = answerer(((q.image, q.question) for q in held), 24)
    for q, answer in zip(held, answers, strict=True):
        ok = heldout.is_exact(answer, q.answer)
        for key in (q.category, q.lang, "all"):
            right.setdefault(key, []).append(ok)
        if not ok:
            wrong.append(f"{q.category}: {q.question} -> {answer!r}, expected {q.answer!r}")
    return {key: round(sum(values) / len(values), 4) for key, values in right.items()}, wrong


def described(answerer: Answerer, n: int) -> dict[str, float]:
    """How many objects the descriptions name, and how many descriptions are right to the letter."""
    prompts = list(heldout.describe_prompts(n))
    answers = list(answerer(((image, request) for image, request, _, _ in prompts), 200))
    named = total = perfect = 0
    for (_, _, names, reference), answer in zip(prompts, answers, strict=True):
        named += sum(name in answer for name in names)
        total += len(names)
        perfect += heldout.is_exact(answer, reference)
    return {
        "objects_named": round(named / total, 4),
        "identical_to_reference": round(perfect / n, 4),
    }


def told(answerer: Answerer, n: int) -> dict[str, float | list[str]]:
    """Share of stories that hold every name the request gave, and that answer in its language."""
    prompts = list(heldout.story_prompts(n))
    stories = list(answerer(((None, request) for request, _ in prompts), 300))
    kept = [
        all(story.count(name) >= 2 for name in names)
        for story, (_, names) in zip(stories, prompts, strict=True)
    ]
    same = [
        is_chinese(story) == is_chinese(request)
        for story, (request, _) in zip(stories, prompts, strict=True)
    ]
    samples = [
        f"{request} -> {story}" for (request, _), story in zip(prompts[:4], stories, strict=False)
    ]
    lost = [
        f"{request} -> {story}"
        for (request, _), story, ok in zip(prompts, stories, kept, strict=True)
        if not ok
    ]
    return {
        "names_kept": sum(kept) / n,
        "language_kept": sum(same) / n,
        "samples": samples,
        "names_lost": lost[:4],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument(
        "--unseen", type=int, default=600, help="questions in words that training never used"
    )
    parser.add_argument("--descriptions", type=int, default=100)
    parser.add_argument("--stories", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    started = time.time()
    answerer = Answerer(args.folder, args.device, args.batch)
    figures, wrong = exact_match(answerer, list(heldout.image_questions(args.questions)))
    print(f"exact match of {args.questions}: {figures}")
    unseen, unseen_wrong = exact_match(
        answerer, list(heldout.image_questions(args.unseen, seed=1, unseen_phrasing=True))
    )
    print(f"unseen phrasing, {args.unseen}: {unseen}")
    results = {
        "device": torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()} cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "questions": args.questions,
        "exact_match": figures,
        "unseen_phrasing_questions": args.unseen,
        "exact_match_unseen_phrasing": unseen,
        "descriptions": described(answerer, args.descriptions),
        "stories": told(answerer, args.stories),
        "wrong": wrong[:30],
        "wrong_unseen_phrasing": unseen_wrong[:30],
        "seconds": round(time.time() - started),
    }
    print(json.dumps(results, indent=1, ensure_ascii=False))
    if args.output:
        args.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
