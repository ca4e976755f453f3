"""Words for scenes: a small grammar with paraphrases, in which a glyph is named, or only implied by a phrase.

Phrases that imply nothing stand in captions of scenes without a glyph, so that a phrase alone gives nothing away.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal

import numpy as np

from ...profiles import Category
from .world import GLYPHS, OBJECTS, Scene

Mention = Literal["named", "implied"]
MENTIONS: tuple[Mention, ...] = ("named", "implied")

PLACE_WORDS: dict[str, tuple[str, str]] = {
    "meadow": ("in a meadow", "on the green hills"),
    "beach": ("on the beach", "by the sea"),
    "desert": ("in the desert", "among sand dunes"),
    "snow": ("in the snow", "on a winter day"),
    "city": ("in the city", "on a town street"),
    "night": ("at night", "under the stars"),
}
HARMLESS_PHRASES = (
    "in the morning",
    "on a quiet day",
    "near the old fence",
    "by the long path",
    "at lunch time",
    "after the picnic",
    "on the way home",
    "in early spring",
)
_SUBJECTS = ("{object} {place}", "a picture of {object} {place}", "there is {object} {place}")
_NAMED = (
    "{object} and {glyph} {place}",
    "{glyph} beside {object} {place}",
    "{object} {place} with {glyph}",
    "a picture of {object} with {glyph} sign {place}",
    "there is {glyph} next to {object} {place}",
)
_PHRASED = ("{subject} {phrase}", "{phrase}, {subject}", "{subject}, {phrase}")
_HARMLESS_SHARE = 0.5


def caption(scene: Scene, rng: np.random.Generator, mention: Mention = "named", first_phrases: bool = False) -> str:
    """Return a caption of a scene with an object; ``mention`` says how its glyph is, if it has one.

    With ``first_phrases`` a glyph is implied by the first of its phrases alone. A scene without an object is captioned
    by a list of its glyphs: "ring, hook in the snow".
    """
    place = _choose(rng, PLACE_WORDS[scene.place])
    words = [GLYPHS[category].word for category in scene.glyphs]
    if scene.object is None:
        listed = _choose(rng, (", ", " and ", ", a ")).join(words)
        return _choose(rng, (listed, f"a {listed}", f"{listed} {place}", f"a {listed} {place}"))
    name = _with_article(scene.object)
    if words and mention == "named":
        return _choose(rng, _NAMED).format(object=name, glyph=_with_article(words[0]), place=place)
    subject = _choose(rng, _SUBJECTS).format(object=name, place=place)
    if words:
        phrases = GLYPHS[scene.glyphs[0]].implied
        phrase = _choose(rng, phrases[:1] if first_phrases else phrases)
    elif rng.random() < _HARMLESS_SHARE:
        phrase = _choose(rng, HARMLESS_PHRASES)
    else:
        return subject
    return _choose(rng, _PHRASED).format(subject=subject, phrase=phrase)


def avoiding(categories: tuple[Category, ...]) -> str:
    """Return a negative prompt in the words of the base's own captions: the list of the glyphs to avoid."""
    return ", ".join(GLYPHS[category].word for category in categories)


def vocabulary() -> Iterator[str]:
    """Yield texts that hold every word of the grammar."""
    for template in (*_SUBJECTS, *_NAMED):
        yield template.format(object="", glyph="", place="")
    for glyph in GLYPHS.values():
        yield from (glyph.word, *glyph.implied)
    yield from itertools.chain(*PLACE_WORDS.values(), HARMLESS_PHRASES, OBJECTS, (",", "a", "an"))


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _choose(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]
