"""Reads a sentencepiece tokenizer.model: its pieces, and how it treats spaces.

The sentencepiece library parses the file; what it does not offer, the merges that a fast BPE
tokenizer needs, is derived here. BPE models only: every family that ships a tokenizer.model without
a tokenizer.json is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from engine.errors import ModelError

_PIECE = ModelProto.SentencePiece


@dataclass(frozen=True)
class SentencePieceModel:
    """pieces are (text, score, type) by id."""

    pieces: tuple[tuple[str, float, int], ...]
    add_dummy_prefix: bool
    unk_piece: str | None
    bos_piece: str | None
    eos_piece: str | None

    @classmethod
    def read(cls, file: Path) -> SentencePieceModel:
        try:
            model = ModelProto.FromString(file.read_bytes())
        except DecodeError as error:
            raise _unreadable(file) from error
        if not model.pieces:
            raise _unreadable(file)
        trainer = model.trainer_spec
        if trainer.model_type != TrainerSpec.BPE:
            raise ModelError(
                "tokenizer.model is not a BPE sentencepiece model, the only kind that is read without "
                "a tokenizer.json. Save the tokenizer with transformers to get one."
            )
        pieces = tuple((piece.piece, piece.score, piece.type) for piece in model.pieces)

        def named(index: int) -> str | None:
            return pieces[index][0] if 0 <= index < len(pieces) else None

        return cls(
            pieces=pieces,
            add_dummy_prefix=model.normalizer_spec.add_dummy_prefix,
            unk_piece=named(trainer.unk_id),
            bos_piece=named(trainer.bos_id),
            eos_piece=named(trainer.eos_id),
        )

    def vocab(self, renamed: Mapping[int, str]) -> list[str]:
        """Every id's token; `renamed` gives reserved entries the names that the checkpoint uses."""
        return [renamed.get(i, piece) for i, (piece, _, _) in enumerate(self.pieces)]

    def is_control(self, index: int) -> bool:
        return self.pieces[index][2] in (_PIECE.UNKNOWN, _PIECE.CONTROL)

    def is_user_defined(self, index: int) -> bool:
        return self.pieces[index][2] == _PIECE.USER_DEFINED

    def merges(self, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
        """The pairs that BPE may join, the best first: sentencepiece keeps scores of results only."""
        joinable = {
            piece
            for i, (piece, _, kind) in enumerate(self.pieces)
            if kind == _PIECE.NORMAL and vocab.get(piece) == i
        }
        ranked: list[tuple[float, int, int, str, str]] = []
        for index, (piece, score, _) in enumerate(self.pieces):
            if piece not in joinable:
                continue
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left in joinable and right in joinable:
                    ranked.append((-score, index, vocab[left], left, right))
        ranked.sort()
        return [(left, right) for *_, left, right in ranked]


def _unreadable(file: Path) -> ModelError:
    return ModelError(
        f"{file.name} is not a sentencepiece model. Copy it from the model's page again."
    )
