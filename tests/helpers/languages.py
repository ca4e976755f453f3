"""The words in ``locales/``, by language and key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from comfyui_psa.training.comfyui import PACK

LOCALES = PACK / "locales"
LANGUAGES = tuple(sorted(folder.name for folder in LOCALES.iterdir() if folder.is_dir()))


def read_words(language: str, file: str) -> dict[str, str]:
    """The words of a file, by the keys that ComfyUI's frontend asks for."""
    return dict(flat(json.loads((LOCALES / language / f"{file}.json").read_text(encoding="utf-8"))))


def flat(place: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Keys and texts of nested objects; dots stand between the names of a key."""
    for name, value in place.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
