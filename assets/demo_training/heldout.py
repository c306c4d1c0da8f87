"""The fixed held-out set: pictures of seeds that training never draws, with one right answer each.

Training draws scenes of seeds below 2**40; everything here lies above. Scenes use Pillow's own font
only, so that a seed means the same scene on every machine (its pixels may differ slightly).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from assets.demo_training import questions, scenes, stories

FIRST_SEED = 2**40
_KINDS = {
    "colour": ("shapes", "shapes", "shapes_text", "number", "place"),
    "shape": ("shapes",),
    "count": ("shapes",),
    "position": ("shapes", "shapes", "shapes_text"),
    "relation": ("shapes",),
    "digit": ("number", "number", "shapes_text"),
}


@dataclass(frozen=True)
class ImageQuestion:
    """A question about a picture and its only right answer."""

    image: Image.Image
    question: str
    answer: str
    category: str
    lang: str


def is_exact(generated: str, expected: str) -> bool:
    """The exact-match rule: equal but for surrounding white space."""
    return generated.strip() == expected.strip()


def image_questions(
    n: int = 2000, seed: int = 0, unseen_phrasing: bool = False
) -> Iterator[ImageQuestion]:
    """n questions spread evenly over the six categories and both languages, up to three about one picture.

    `unseen_phrasing` asks in words that training never uses.
    """
    rng = random.Random(f"heldout-{seed}")
    scene_seed = FIRST_SEED + seed * 2**24
    asked = 0
    while asked < n:
        category = questions.CATEGORIES[asked % len(questions.CATEGORIES)]
        scene_seed += 1
        scene = scenes.make_scene(scene_seed, rng.choice(_KINDS[category]))
        image, used = None, set()
        for _ in range(8):
            lang = "en" if (asked // len(questions.CATEGORIES)) % 2 == 0 else "zh"
            category = questions.CATEGORIES[asked % len(questions.CATEGORIES)]
            found = questions.ask(scene, rng, lang, category, held_out=unseen_phrasing)
            if (
                found is None
                or found[0] in used
                or (category == "count" and found[1][0] not in "012345")
            ):
                continue
            used.add(found[0])
            image = image or scenes.draw(scene, supersample=2)
            yield ImageQuestion(image, *found, category, lang)
            asked += 1
            if asked == n or len(used) == 3:
                break


def describe_prompts(
    n: int = 50, seed: int = 0
) -> Iterator[tuple[Image.Image, str, list[str], str]]:
    """(picture, request, words that the description must hold, full reference description)."""
    rng = random.Random(f"describe-{seed}")
    for index in range(n):
        scene = scenes.make_scene(FIRST_SEED + 2**36 + seed * 2**20 + index, "shapes")
        lang = ("en", "zh")[index % 2]
        request, reference = questions.describe(scene, rng, lang)
        names = [
            questions.ZH_COLOURS[s.colour] + questions.ZH_SHAPES[s.name]
            if lang == "zh"
            else f"{s.colour} {s.name}"
            for s in scene.shapes
        ]
        yield scenes.draw(scene, supersample=2), request, names, reference


def story_prompts(n: int = 40, seed: int = 0) -> Iterator[tuple[str, list[str]]]:
    """(request, names that the story must hold); requests that name at least one character."""
    rng = random.Random(f"stories-{seed}")
    made = 0
    while made < n:
        request, _, names = stories.story_request(rng, ("en", "zh")[made % 2])
        if names:
            yield request, names
            made += 1
