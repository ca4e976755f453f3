"""The words of the nodes in other languages. English is what the schemas say, and has no file of its own."""

from __future__ import annotations

import re

import pytest
from languages import LANGUAGES, read_words
from schemas import SCHEMAS

TRANSLATIONS = tuple(language for language in LANGUAGES if language != "en")
TAB = "psa.tab"


@pytest.fixture(scope="module")
def english() -> dict[str, str]:
    """The schemas' words, by the keys under which the frontend looks for others."""
    words = {}
    for schema in SCHEMAS.values():
        words[f"{schema.node_id}.display_name"] = schema.display_name
        words[f"{schema.node_id}.description"] = schema.description
        for given in schema.inputs:
            words[f"{schema.node_id}.inputs.{given.id}.name"] = given.id
            words[f"{schema.node_id}.inputs.{given.id}.tooltip"] = given.tooltip
        for index, output in enumerate(schema.outputs):
            if output.display_name != output.io_type:  # the names of types are ComfyUI's to translate
                words[f"{schema.node_id}.outputs.{index}.name"] = output.display_name
            words[f"{schema.node_id}.outputs.{index}.tooltip"] = output.tooltip
    return words


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_every_language_has_the_words_of_the_schemas(language: str, english: dict[str, str]) -> None:
    found = read_words(language, "nodeDefs")
    assert found.keys() == english.keys()
    for key, text in found.items():
        assert text.strip(), key
        assert not re.search(r"[{}@|]", text), f"{key}: the frontend takes these signs for placeholders and plurals"
    assert sum(found[key] == english[key] for key in found) < len(found) / 5


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_a_text_calls_nodes_and_the_tab_what_they_are_called(language: str, english: dict[str, str]) -> None:
    found = read_words(language, "nodeDefs")
    names = {english[key]: found[key] for key in english if key.endswith(".display_name")}
    names[read_words("en", "main")[TAB]] = read_words(language, "main")[TAB]
    texts = {**english, **read_words("en", "settings")}
    translated = {**found, **read_words(language, "settings")}
    called = re.compile("|".join(sorted(map(re.escape, names), key=len, reverse=True)))  # not a part of a longer name
    mentions = [(key, name) for key, text in texts.items() for name in called.findall(text)]
    assert len(mentions) > 2 * len(names)
    assert [key for key, name in mentions if names[name] not in translated[key]] == []


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_what_has_one_name_in_all_languages_keeps_it(language: str, english: dict[str, str]) -> None:
    """Folders, files, levels, values of widgets and the names of other projects."""
    found = read_words(language, "nodeDefs")
    fixed = (
        r"models/\w+|psa_adapter\.bin|\.npy|\.safetensors|\bL\d\b|\bactive\b(?=\")|IPAdapter|ControlNet|LoRA|UNet|GPU"
    )
    kept = [(key, name) for key, text in english.items() for name in re.findall(fixed, text)]
    assert len(kept) > 15
    assert [(key, name) for key, name in kept if name not in found[key]] == []
