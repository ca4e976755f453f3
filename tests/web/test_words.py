"""The words of the browser side, in every language."""

from __future__ import annotations

import re

import pytest
from languages import LANGUAGES, read_words

from comfyui_psa.training.comfyui import PACK


def words(language: str) -> dict[str, str]:
    main = {key.removeprefix("psa."): text for key, text in read_words(language, "main").items()}
    return {**main, **read_words(language, "settings")}


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
