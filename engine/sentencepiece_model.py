"""Reads a sentencepiece tokenizer.model: its pieces, and how it treats spaces.

The file is a small protobuf message (sentencepiece_model.proto); only the fields below are read, so
neither protobuf nor sentencepiece has to be installed. BPE models only: every family that ships a
tokenizer.model without a tokenizer.json is one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ModelError

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # SentencePiece.Type
_BPE = 2  # TrainerSpec.ModelType


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
            return cls._parse(file.read_bytes())
        except (ValueError, IndexError, struct.error, AttributeError, TypeError) as error:
            raise ModelError(
                f"{file.name} is not a sentencepiece model. Copy it from the model's page again."
            ) from error

    @classmethod
    def _parse(cls, data: bytes) -> SentencePieceModel:
        pieces: list[tuple[str, float, int]] = []
        trainer: dict[int, Any] = {}
        normalizer: dict[int, Any] = {}
        for field, value in _fields(data):
            if field == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]
                pieces.append((piece[1].decode("utf-8"), score, piece.get(3, 1)))
            elif field == 2:
                trainer = dict(_fields(value))
            elif field == 3:
                normalizer = dict(_fields(value))
        if not pieces:
            raise ValueError("no pieces")
        if trainer.get(3, 1) != _BPE:
            raise ModelError(
                "tokenizer.model is not a BPE sentencepiece model, the only kind that is read without "
                "a tokenizer.json. Save the tokenizer with transformers to get one."
            )

        def named(field: int, default: int) -> str | None:
            index = trainer.get(field, default)
            return pieces[index][0] if 0 <= index < len(pieces) else None

        return cls(
            pieces=tuple(pieces),
            add_dummy_prefix=bool(normalizer.get(3, 1)),
            unk_piece=named(40, 0),
            bos_piece=named(41, 1),
            eos_piece=named(42, 2),
        )

    def vocab(self, renamed: Mapping[int, str]) -> list[str]:
        """Every id's token; `renamed` gives reserved entries the names that the checkpoint uses."""
        return [renamed.get(i, piece) for i, (piece, _, _) in enumerate(self.pieces)]

    def is_control(self, index: int) -> bool:
        return self.pieces[index][2] in (_UNKNOWN, _CONTROL)

    def is_user_defined(self, index: int) -> bool:
        return self.pieces[index][2] == _USER_DEFINED

    def merges(self, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
        """The pairs that BPE may join, the best first: sentencepiece keeps scores of results only."""
        joinable = {
            piece
            for i, (piece, _, kind) in enumerate(self.pieces)
            if kind not in (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE) and vocab.get(piece) == i
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


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: int for varints, bytes for everything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            if value >= 2**63:
                value -= 2**64  # int32 and int64 are stored as two's complement
        else:
            if kind == 2:
                size, at = _varint(data, at)
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
            else:
                raise ValueError(f"wire type {kind}")
            value = data[at : at + size]
            if len(value) != size:
                raise ValueError("truncated")
            at += size
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("varint too long")
