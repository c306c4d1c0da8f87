"""The demo model's own tokenizer: byte-level BPE over the training text, so nothing is ever unknown."""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from assets.demo_training import conversations

VOCAB_SIZE = 4096
# Words with their leading space, digits one by one, marks, white space (Qwen2's pattern).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def training_text(num_conversations: int) -> Iterator[str]:
    """Generated conversations and a part of the plain text."""
    rng = random.Random(1)
    for seed in range(num_conversations):
        conversation, _ = conversations.image_conversation(seed, 1)
        yield from _words(conversation)
        for _ in range(2):
            yield from _words(conversations.text_conversation(rng))
    texts = conversations.plain_texts()
    yield from rng.sample(texts, min(len(texts), 1500))


def _words(conversation: conversations.Conversation) -> Iterator[str]:
    for turn in conversation.turns:
        yield f"user\n{turn.question.replace(conversations.IMAGE, '')}"
        yield f"assistant\n{turn.answer}"


def train_tokenizer(num_conversations: int = 6000) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(conversations.SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(num_conversations), trainer)
    return tokenizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the model folder to write to")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    made = train_tokenizer()
    made.save(str(folder / "tokenizer.json"))
    print(f"{made.get_vocab_size()} tokens written to {folder / 'tokenizer.json'}")
