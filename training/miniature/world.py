"""What there is in the drawn world: places, harmless objects, seven glyphs, and what one picture shows.

A glyph is an abstract sign that stands for one of the seven categories; nothing sensitive is depicted. Its
colour and shape are its own. Drawing is in ``drawing.py``, words are in ``captions.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ...profiles import CATEGORIES, Category

PLACES = ("meadow", "beach", "desert", "snow", "city", "night")
OBJECTS = ("house", "tree", "car", "balloon", "flower", "umbrella", "mushroom", "cat")

LABELS = len(CATEGORIES) + len(OBJECTS)


class Glyph(NamedTuple):
    """The sign of a category: its word, and phrases that go with it without naming it."""

    category: Category
    word: str
    implied: tuple[str, str]


GLYPHS: dict[Category, Glyph] = {
    glyph.category: glyph
    for glyph in (
        Glyph("Hate", "thorn", ("by the bramble gate", "after the quarrel")),
        Glyph("Harassment", "hook", ("at the fishing pier", "among the whispers")),
        Glyph("Violence", "burst", ("on cannon hill", "at the drum roll")),
        Glyph("Self-Harm", "spiral", ("by the deep well", "in the hollow hour")),
        Glyph("Sexuality", "ring", ("at the dance hall", "under the red lamp")),
        Glyph("Shocking", "bolt", ("before the storm", "in the haunted lane")),
        Glyph("Propaganda", "banner", ("at the parade", "on speech day")),
    )
}


class Spot(NamedTuple):
    """Where something stands: the middle and the size, as shares of the picture."""

    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """All that a picture shows; equal scenes give equal pictures. ``seed`` decides about details of the place."""

    place: str
    object: str | None
    object_spot: Spot
    glyphs: tuple[Category, ...]
    glyph_spots: tuple[Spot, ...]
    seed: int

    def without_glyphs(self) -> Scene:
        """Return the same scene without any glyph."""
        return replace(self, glyphs=(), glyph_spots=())

    def with_twin_glyphs(self) -> Scene:
        """Return the same scene with each glyph a second time, in the other half of the picture."""
        twins = tuple(spot._replace(x=1 - spot.x) for spot in self.glyph_spots)
        return replace(self, glyphs=2 * self.glyphs, glyph_spots=self.glyph_spots + twins)

    def with_object(self, name: str) -> Scene:
        """Return the same scene with another object."""
        return replace(self, object=name)


def draw_scene(rng: np.random.Generator, glyphs: tuple[Category, ...] = (), harmless: bool = True) -> Scene:
    """Draw a scene at random that shows ``glyphs``, and an object if ``harmless``.

    One glyph stands beside the object; several share the picture, and more than four are smaller.
    """
    left = bool(rng.integers(2))
    object_x, glyph_x = (0.29, 0.73) if left else (0.71, 0.27)
    sizes = (0.34, 0.4)
    if harmless and len(glyphs) <= 1:
        centres = [(glyph_x, 0.42)]
    elif len(glyphs) <= 4:
        centres = _shuffled(rng, ((x, y) for y, x in itertools.product((0.3, 0.72), (0.27, 0.73))))
    else:
        centres = _shuffled(rng, itertools.product((0.18, 0.5, 0.82), (0.18, 0.5, 0.82)))
        sizes = (0.24, 0.28)
    return Scene(
        place=str(rng.choice(PLACES)),
        object=str(rng.choice(OBJECTS)) if harmless else None,
        object_spot=Spot(object_x + _jitter(rng), 0.74 + _jitter(rng), float(rng.uniform(0.42, 0.5))),
        glyphs=glyphs,
        glyph_spots=tuple(
            Spot(x + _jitter(rng), y + _jitter(rng), float(rng.uniform(*sizes))) for x, y in centres[: len(glyphs)]
        ),
        seed=int(rng.integers(2**31)),
    )


def _jitter(rng: np.random.Generator) -> float:
    return float(rng.uniform(-0.04, 0.04))


def _shuffled(rng: np.random.Generator, centres: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    found = list(centres)
    return [found[i] for i in rng.permutation(len(found))]


def random_category(rng: np.random.Generator) -> Category:
    """Return one of the seven categories, each as likely."""
    return CATEGORIES[int(rng.integers(len(CATEGORIES)))]


def labels(scenes: Iterable[Scene]) -> list[list[float]]:
    """Return for each scene whether it shows each of the seven glyphs and each object, 1 or 0."""
    return [
        [float(c in scene.glyphs) for c in CATEGORIES] + [float(name == scene.object) for name in OBJECTS]
        for scene in scenes
    ]


def any_scene(rng: np.random.Generator, most: int = 4) -> Scene:
    """Draw a scene with an object and no glyph or one, or, seldom, with one to ``most`` glyphs and no object."""
    kind = rng.random()
    if kind < 0.4:
        return draw_scene(rng)
    if kind < 0.9:
        return draw_scene(rng, (random_category(rng),))
    several = rng.permutation(len(CATEGORIES))[: int(rng.integers(1, most + 1))]
    return draw_scene(rng, tuple(CATEGORIES[i] for i in several), harmless=False)
