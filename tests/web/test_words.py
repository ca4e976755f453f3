"""The words of the browser side, in every language."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from comfyui_psa.training.comfyui import PACK

LANGUAGES = ("de", "en", "es", "fr", "ja", "zh")


def words(language: str) -> dict[str, str]:
    folder = PACK / "locales" / language
    content = json.loads((folder / "main.json").read_text(encoding="utf-8"))["psa"]
    content["settings"] = json.loads((folder / "settings.json").read_text(encoding="utf-8"))

    def flat(place: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
        for name, value in place.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    return dict(flat(content))


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_every_word(language: str) -> None:
    english, found = words("en"), words(language)
    assert found.keys() == english.keys()
    for key, text in found.items():
        assert text.strip()
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", english[key])), key
    if language != "en":
        assert sum(found[key] == english[key] for key in found) < len(found) / 5


def test_every_word_that_the_pages_use_is_there() -> None:
    used = {
        key
        for file in (PACK / "web" / "psa").glob("*.js")
        for key in re.findall(r"\bt\(\s*'([\w.]+)'", file.read_text(encoding="utf-8"))
    }
    assert len(used) > 40
    assert used <= words("en").keys()
