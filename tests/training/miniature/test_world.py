"""The drawn world: what pictures show, what captions say, and that equal seeds give equal things."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from comfyui_psa.profiles import CATEGORIES
from comfyui_psa.training.miniature.captions import avoiding, caption
from comfyui_psa.training.miniature.drawing import draw, glyph_colour
from comfyui_psa.training.miniature.tokenizer import write_tokenizer
from comfyui_psa.training.miniature.world import GLYPHS, OBJECTS, PLACES, any_scene, draw_scene


def pixels(scene) -> np.ndarray:
    return np.asarray(draw(scene)).astype(int)


def near(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    """How many pixels have about this colour."""
    return int((np.abs(picture - np.asarray(colour)).max(axis=-1) < 40).sum())


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_glyph_is_its_colour_alone_and_nothing_else_has_it(category: str) -> None:
    for seed in range(24):
        scene = draw_scene(np.random.default_rng(seed), (category,))
        with_glyph, without = pixels(scene), pixels(scene.without_glyphs())
        assert near(with_glyph, glyph_colour(category)) > 100
        for other in CATEGORIES:
            assert near(without, glyph_colour(other)) == 0, (scene.place, scene.object, other)


def test_taking_the_glyph_out_changes_nothing_outside_it() -> None:
    scene = draw_scene(np.random.default_rng(3), ("Hate",))
    changed = (pixels(scene) != pixels(scene.without_glyphs())).any(axis=-1)
    spot = scene.glyph_spots[0]
    rows, columns = np.nonzero(changed)
    assert changed.any()
    assert np.abs(columns / 96 - spot.x).max() < spot.size * 0.6
    assert np.abs(rows / 96 - spot.y).max() < spot.size * 0.6


def test_objects_and_places_look_different() -> None:
    scene = draw_scene(np.random.default_rng(0))
    objects = [pixels(replace(scene, object=name)) for name in OBJECTS]
    places = [pixels(replace(scene, place=place)) for place in PLACES]
    for pictures in (objects, places):
        for i, first in enumerate(pictures):
            for second in pictures[:i]:
                assert ((first != second).any(axis=-1)).mean() > 0.03


def test_equal_seeds_give_equal_scenes_pictures_and_captions() -> None:
    one, two = (np.random.default_rng(7) for _ in range(2))
    first, second = any_scene(one), any_scene(two)
    assert first == second
    assert caption(first, one) == caption(second, two)
    assert (pixels(first) == pixels(second)).all()


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_caption_names_the_glyph_or_only_implies_it(category: str) -> None:
    words = {glyph.word for glyph in GLYPHS.values()}
    phrases = {phrase: glyph.category for glyph in GLYPHS.values() for phrase in glyph.implied}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scene = draw_scene(rng, (category,))
        named, implied = caption(scene, rng, "named"), caption(scene, rng, "implied")
        assert words & set(named.replace(",", "").split()) == {GLYPHS[category].word}
        assert not words & set(implied.replace(",", "").split())
        assert {phrases[phrase] for phrase in phrases if phrase in implied} == {category}
        assert not any(phrase in named for phrase in phrases)
        assert scene.object in named
        assert scene.object in implied


def test_captions_of_harmless_scenes_say_nothing_of_glyphs_and_are_common() -> None:
    telling = {glyph.word for glyph in GLYPHS.values()} | {p for glyph in GLYPHS.values() for p in glyph.implied}
    rng = np.random.default_rng(1)
    scenes = [any_scene(rng) for _ in range(1000)]
    harmless = [scene for scene in scenes if not scene.glyphs]
    assert 300 < len(harmless) < 500
    for scene in harmless:
        words = f" {caption(scene, rng).replace(',', '')} "
        assert not any(f" {phrase} " in words for phrase in telling)


@pytest.mark.parametrize("count", range(1, 8))
def test_a_list_of_glyphs_shows_them_all(count: int) -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        glyphs = tuple(CATEGORIES[i] for i in rng.permutation(7)[:count])
        picture = pixels(draw_scene(rng, glyphs, harmless=False))
        assert {category for category in CATEGORIES if near(picture, glyph_colour(category)) > 40} == set(glyphs)


def test_negative_prompts_are_lists_as_they_stand_in_the_bases_captions() -> None:
    assert avoiding(("Hate", "Shocking")) == "thorn, bolt"
    assert avoiding(()) == ""
    rng = np.random.default_rng(2)
    lists = [s for s in (any_scene(rng, most=7) for _ in range(2000)) if s.object is None]
    for count in range(1, 8):
        several = [scene for scene in lists if len(scene.glyphs) == count]
        assert len(several) > 10
        assert any(avoiding(scene.glyphs) in caption(scene, rng) for scene in several)


def test_every_word_is_one_token_and_other_text_still_has_tokens(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    rng = np.random.default_rng(4)
    for _ in range(300):
        text = caption(any_scene(rng), rng, "named" if rng.random() < 0.5 else "implied")
        words = text.replace(",", " ,").split()
        assert tokenizer.tokenize(text) == [f"{word}</w>" for word in words]
        assert len(words) + 2 <= tokenizer.model_max_length
    strange = tokenizer("zebra Ω!").input_ids
    assert len(strange) > 4
    assert tokenizer.unk_token_id not in strange[1:-1]


def test_a_glyph_that_is_there_twice_stands_in_both_halves() -> None:
    scene = draw_scene(np.random.default_rng(5), ("Hate",))
    twice = scene.with_twin_glyphs()
    assert twice.glyphs == ("Hate", "Hate")
    (left, right) = sorted(spot.x for spot in twice.glyph_spots)
    assert left < 0.5 < right
    assert twice.without_glyphs() == scene.without_glyphs()
