"""Small honest stand-ins: checkpoint folders with real tokenizers of a few hundred tokens."""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

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
