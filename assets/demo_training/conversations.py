"""Training conversations as token ids: turns of image talk, stories, small talk, and plain English text.

Rows have a fixed length, so the model compiles once. A conversation is cut off at the end of its row;
text conversations are packed one after the other.
"""

import inspect
import pkgutil
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from assets.demo_training import questions, scenes, smalltalk, stories

IMAGE_SIZE = 144
IMAGE_TOKENS = 144
IMAGE_ROW_LEN = 512
TEXT_ROW_LEN = 1024
END, START, STOP, IMAGE = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"
SPECIALS = (END, START, STOP, IMAGE)

SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful, friendly assistant.",
    "You are LMDeck's demo model.",
    "Answer the user's questions.",
    "Be brief.",
    "你是一个有用的助手。",
    "请简短回答。",
)
ANSWER_IN = {
    "zh": ("Answer in Chinese.", "Always answer in Chinese.", "请用中文回答。"),
    "en": ("Answer in English.", "Always answer in English.", "请用英文回答。"),
}


@dataclass(frozen=True)
class Turn:
    """A question with its answer; `images` says how many `<image>` marks the question holds."""

    question: str
    answer: str
    images: int = 0


@dataclass
class Conversation:
    system: str | None
    turns: list[Turn]


def render(conversation: Conversation) -> str:
    """The text that the chat template makes of the conversation."""
    text = f"{START}system\n{conversation.system}{STOP}\n" if conversation.system else ""
    for turn in conversation.turns:
        text += f"{START}user\n{turn.question}{STOP}\n{START}assistant\n{turn.answer}{STOP}\n"
    return text


def to_pixels(image: Image.Image) -> np.ndarray:
    """What the image processor does before it scales: uint8 [3, 144, 144]."""
    image = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def image_conversation(seed: int, num_images: int) -> tuple[Conversation, list[scenes.Scene]]:
    """Talk about one picture, or about a second one that follows it."""
    rng = random.Random(seed)
    shown = [scenes.make_scene(seed * 2 + k, more_fonts=True) for k in range(num_images)]
    lang = "en" if rng.random() < 0.55 else "zh"
    system, turns = None, []
    if rng.random() < 0.10:
        system = rng.choice(SYSTEM)
    elif rng.random() < 0.03:
        other = "en" if lang == "zh" else "zh"
        system = rng.choice(ANSWER_IN[other])
        asked, _ = questions.describe(shown[0], rng, lang)
        turns.append(Turn(_with_image(rng, asked), questions.description(shown[0], other), 1))
    if rng.random() < 0.05:
        turns.insert(0, Turn(*smalltalk.chat_turn(rng, lang)))
    for scene in shown:
        turns += _talk(
            scene, rng, lang, 4 if num_images == 2 else 14, bool(turns and turns[-1].images == 1)
        )
    return Conversation(system, turns), shown


def _talk(
    scene: scenes.Scene, rng: random.Random, lang: str, count: int, shown: bool
) -> list[Turn]:
    """Different questions about one scene; a description comes first, later or not at all."""
    asked: list[tuple[str, str]] = []
    luck = rng.random()
    if luck < 0.3:
        asked.append(questions.describe(scene, rng, lang))
    for _ in range(count):
        language = lang if rng.random() < 0.93 else ("en" if lang == "zh" else "zh")
        found = questions.any_question(scene, rng, language)
        if found not in asked:
            asked.append(found)
        if rng.random() < 0.015:
            aside = smalltalk.chat_turn(rng, language)
            if not any(word in aside[1] for word in ("attach", "上传")):  # a picture is here
                asked.append(aside)
    if rng.random() < 0.12:
        chat = stories.story_chat(rng, lang)
        at = rng.randint(1, min(4, len(asked)))
        asked[at:at] = chat[:1]
    if 0.3 <= luck < 0.65:
        asked.insert(rng.randint(1, min(4, len(asked))), questions.describe(scene, rng, lang))
    turns = [Turn(*pair) for pair in asked]
    if not shown or (count == 4 and turns):
        turns[0] = Turn(_with_image(rng, asked[0][0]), asked[0][1], 1)
    return turns


def _with_image(rng: random.Random, question: str) -> str:
    luck = rng.random()
    if luck < 0.82:
        return f"{IMAGE}\n{question}"
    if luck < 0.87:
        return f"{IMAGE}{question}"
    if luck < 0.94:
        return f"{question}{IMAGE}\n"
    return f"{question}\n{IMAGE}" if luck < 0.97 else f"{question} {IMAGE}"


def text_conversation(rng: random.Random) -> Conversation:
    """A story with what follows it, or a few turns of small talk."""
    lang = "en" if rng.random() < 0.55 else "zh"
    system, luck = None, rng.random()
    turns: list[tuple[str, str]] = []
    if rng.random() < 0.12:
        system = rng.choice(SYSTEM)
    if luck < 0.05:
        other = "en" if lang == "zh" else "zh"
        system = rng.choice(ANSWER_IN[other])
        return Conversation(system, [Turn(*stories.story_in(rng, lang, other))])
    if luck < 0.6:
        if rng.random() < 0.15:
            turns.append(smalltalk.chat_turn(rng, lang))
        turns += stories.story_chat(rng, lang)
    elif luck < 0.75:  # a long talk
        for _ in range(rng.randint(2, 4)):
            turns += stories.story_chat(rng, lang)
            turns += [smalltalk.chat_turn(rng, lang) for _ in range(rng.randint(0, 3))]
    else:
        turns += [smalltalk.chat_turn(rng, lang) for _ in range(rng.randint(1, 5))]
    return Conversation(system, [Turn(*pair) for pair in turns])


@lru_cache(maxsize=1)
def plain_texts() -> tuple[str, ...]:
    """English prose that comes with Python (PSF licence): help topics and docstrings."""
    texts = []
    try:
        from pydoc_data.topics import topics

        texts += list(topics.values())
    except ImportError:
        pass  # some distributions split the help topics off; the docstrings remain
    skip = {"antigravity", "this", "idlelib", "test", "turtledemo", "lib2to3"}
    for info in pkgutil.iter_modules([str(Path(inspect.__file__).parent)]):
        if info.name in skip or info.name.startswith("_"):
            continue
        try:
            module = import_module(info.name)
        except (Exception, SystemExit):  # noqa: BLE001, S112 - modules for other systems fail in their own ways
            continue
        members = [
            module,
            *(
                m
                for _, m in inspect.getmembers(module)
                if inspect.isclass(m) or inspect.isroutine(m)
            ),
        ]
        texts += [
            inspect.cleandoc(m.__doc__)
            for m in members
            if isinstance(getattr(m, "__doc__", None), str)
        ]
    sys.stdout.flush()
    return tuple(sorted({t for t in texts if len(t) > 120}))


class RowMaker:
    """Turns conversations into rows of token ids with loss weights."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.pad, self.start, self.stop, self.image = (tokenizer.token_to_id(t) for t in SPECIALS)
        self._encode = lru_cache(maxsize=200_000)(lambda text: tuple(tokenizer.encode(text).ids))

    def tokens(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Ids and, for every id, 1 where the model is to learn to produce it."""
        ids: list[int] = []
        learn: list[int] = []

        def add(piece: tuple[int, ...], weight: int) -> None:
            ids.extend(piece)
            learn.extend([weight] * len(piece))

        if conversation.system:
            add(self._encode(f"{START}system\n{conversation.system}{STOP}\n"), 0)
        for turn in conversation.turns:
            question = self._encode(f"{START}user\n{turn.question}{STOP}\n{START}assistant\n")
            if turn.images:
                at = question.index(self.image)
                question = question[:at] + (self.image,) * IMAGE_TOKENS + question[at + 1 :]
            add(question, 0)
            add((*self._encode(turn.answer), self.stop), 1)
            add(self._encode("\n"), 0)
        return ids, learn

    def image_rows(
        self, seeds: Iterator[int], num_rows: int, num_pairs: int
    ) -> dict[str, np.ndarray]:
        """num_rows conversations, of which num_pairs show two pictures."""
        ids = np.full((num_rows, IMAGE_ROW_LEN), self.pad, np.int16)
        learn = np.zeros((num_rows, IMAGE_ROW_LEN), np.uint8)
        num_images = num_rows + num_pairs
        pixels = np.empty((num_images, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
        labels = np.empty((num_images, 3, IMAGE_TOKENS), np.uint8)
        slots = np.empty((num_images, IMAGE_TOKENS), np.int32)
        shown = 0
        for row in range(num_rows):
            wanted = 2 if row < num_pairs else 1
            while True:
                conversation, row_scenes = image_conversation(next(seeds), wanted)
                row_ids, row_learn = self.tokens(conversation)
                row_ids, row_learn = row_ids[:IMAGE_ROW_LEN], row_learn[:IMAGE_ROW_LEN]
                places = [k for k, token in enumerate(row_ids) if token == self.image]
                if len(places) == wanted * IMAGE_TOKENS:
                    break
            ids[row, : len(row_ids)], learn[row, : len(row_ids)] = row_ids, row_learn
            for k, scene in enumerate(row_scenes):
                pixels[shown] = to_pixels(scenes.draw(scene))
                for kind, values in enumerate(scenes.patch_labels(scene)):
                    labels[shown, kind] = np.frombuffer(values, np.uint8)
                slots[shown] = places[k * IMAGE_TOKENS : (k + 1) * IMAGE_TOKENS]
                slots[shown] += row * IMAGE_ROW_LEN
                shown += 1
        return {"ids": ids, "learn": learn, "pixels": pixels, "labels": labels, "slots": slots}

    def text_rows(
        self, rng: random.Random, num_rows: int, plain_share: float = 0.2
    ) -> dict[str, np.ndarray]:
        """Packed conversations; a share of the rows is plain text, learned in full."""
        ids = np.full((num_rows, TEXT_ROW_LEN), self.pad, np.int16)
        learn = np.zeros((num_rows, TEXT_ROW_LEN), np.uint8)
        for row in range(num_rows):
            row_ids: list[int] = []
            row_learn: list[int] = []
            plain = rng.random() < plain_share
            while len(row_ids) < TEXT_ROW_LEN:
                if plain:
                    text = rng.choice(plain_texts())
                    at = rng.randrange(max(1, len(text) - 2000))
                    more = self.tokenizer.encode(text[at : at + 4000]).ids
                    more_learn = [1] * len(more)
                else:
                    more, more_learn = self.tokens(text_conversation(rng))
                row_ids += [*more, self.pad]
                row_learn += [*more_learn, 0]
            ids[row], learn[row] = row_ids[:TEXT_ROW_LEN], row_learn[:TEXT_ROW_LEN]
        return {"text_ids": ids, "text_learn": learn}
