"""A checkpoint's JSON files, read with types checked: every complaint names the file and the key.

An explicit null counts as absent.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from engine.errors import ModelError

_MAX_JSON_BYTES = 16 << 20


def read_json(path: Path) -> dict:
    if not path.exists():
        raise ModelError(f"{path.parent} has no {path.name}; expected a Hugging Face checkpoint.")
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelError(f"{path.name} is larger than {_MAX_JSON_BYTES >> 20} MB.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} is not valid JSON: {error}.") from error
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} is {type(value).__name__}; expected a JSON object.")
    return value


class Keys:
    """One JSON object; path is where it lies in the file, as in "vision_config.".

    A method with a default returns it for an absent key; without one the key must be there.
    """

    def __init__(self, raw: dict, file: str, path: str = "") -> None:
        self.raw, self.file, self.path = raw, file, path

    def error(self, key: str, expected: str) -> ModelError:
        return ModelError(
            f"{self.file}: {self.path}{key} is {self.raw.get(key)!r:.200}; expected {expected}."
        )

    def has(self, key: str) -> bool:
        return self.raw.get(key) is not None

    def size(self, key: str, default: int | None = None, *, most: int = 2**31 - 1) -> int:
        """A whole number from 1 to most; an error if it is absent without a default."""
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise ModelError(
                    f"{self.file}: {self.path}{key} is missing; expected a whole number."
                )
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise self.error(key, f"a whole number from 1 to {most:,}")
        return value

    def number(self, key: str, default: float | None = None, *, above: float = 0.0) -> float:
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise ModelError(f"{self.file}: {self.path}{key} is missing; expected a number.")
            return default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= above:
            raise self.error(key, f"a number above {above:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise ModelError(f"{self.file}: {self.path}{key} is missing; expected a string.")
            return default
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def section(self, key: str) -> Keys:
        """A nested object; absent reads as empty."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "an object")
        return Keys(value or {}, self.file, f"{self.path}{key}.")

    def token_ids(self, key: str, default: int | None = None) -> tuple[int, ...]:
        """One token id or a list of them."""
        value = self.raw.get(key)
        if value is None:
            return () if default is None else (default,)
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.error(key, "a token id or a list of them")
        return tuple(ids)
