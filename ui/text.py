"""Every sentence of the web page, read from `assets/texts/<locale>.json`, so that a locale is one file."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

TEXTS = Path(__file__).parent.parent / "assets" / "texts"


def text(key: str, **values: object) -> str:
    """The text under `key` with its {fields} filled in."""
    return _texts("en")[key].format(**values)


@cache
def _texts(locale: str) -> dict[str, str]:
    return json.loads((TEXTS / f"{locale}.json").read_text(encoding="utf-8"))
