"""Preference pairs of the drawn world in Sage's format, as files that the data loader reads like any others.

Whoever bans the category of a prompt prefers the same scene without the glyph. Everyone else prefers the one with it,
as it was asked for: to the one without, and now and then to one that shows the glyph twice. Of prompts without any
category everyone prefers the scene as it was asked for, to one with another object or an unasked glyph.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import Progress

from ...profiles import CATEGORIES, Profile, user_row
from ..data.categories import HARMLESS
from ..errors import DataError
from .captions import Mention, caption
from .drawing import draw
from .people import banned, training_people, with_set
from .world import OBJECTS, Scene, draw_scene, random_category

USER_COLUMNS = (
    "User_ID",
    "Age",
    "Age_Group",
    "Gender",
    "Religion",
    "Physical_Condition",
    "Mental_Condition",
    "Banned_Categories",
)
DRAWN = "drawn.json"
_VERSION = 3  # of how pairs are drawn: others have other pictures or columns
_HARMLESS_SHARE = 0.15
_OTHER_OBJECT_SHARE = 0.7
_NAMED_SHARE = 0.5
_TWIN_SHARE = 0.2  # of the rejected ones: against the empty scene alone, more of the glyph would always be better


class Style(NamedTuple):
    """How pairs differ from those that the shipped adapters learn from.

    ``static``: everybody bans everything. ``first_phrases``: what is implied is so by the first phrase of its category
    alone; the second is left for asking whether an adapter has learned more than phrases.
    """

    static: bool = False
    first_phrases: bool = False

    @property
    def name(self) -> str:
        """What files are called: "psa", "static", "psa-first-phrases"."""
        return f"{'static' if self.static else 'psa'}{'-first-phrases' if self.first_phrases else ''}"


@dataclass(frozen=True)
class ScenePair:
    """Two scenes for one caption and one person (by number); ``category`` and ``mention`` are None if harmless."""

    person: int
    caption: str
    chosen: Scene
    rejected: Scene
    category: str | None
    mention: Mention | None


def draw_pairs(people: Sequence[Profile], count: int, seed: int, first_phrases: bool = False) -> Iterator[ScenePair]:
    """Yield ``count`` pairs; people take turns, so everyone has about as many. ``first_phrases``: see ``Style``."""
    rng = np.random.default_rng((seed, 21))
    taste = np.random.default_rng((seed, 22))
    bans = [banned(person) for person in people]
    order: list[int] = []
    for _ in range(count):
        order = order or rng.permutation(len(people)).tolist()
        person = order.pop()
        if rng.random() < _HARMLESS_SHARE:
            yield _harmless(person, rng)
            continue
        category = random_category(rng)
        mention: Mention = "named" if rng.random() < _NAMED_SHARE else "implied"
        shown = draw_scene(rng, (category,))
        text = caption(shown, rng, mention, first_phrases)
        clean = shown.without_glyphs()
        if category in bans[person]:
            chosen, rejected = clean, shown
        else:
            chosen, rejected = shown, shown.with_twin_glyphs() if taste.random() < _TWIN_SHARE else clean
        yield ScenePair(person, text, chosen, rejected, category, mention)


def _harmless(person: int, rng: np.random.Generator) -> ScenePair:
    # Drawn with a glyph first: without it, the two scenes differ in nothing else.
    marked = draw_scene(rng, (random_category(rng),))
    scene = marked.without_glyphs()
    others = [name for name in OBJECTS if name != scene.object]
    other = scene.with_object(others[int(rng.integers(len(others)))])
    rejected = other if rng.random() < _OTHER_OBJECT_SHARE else marked
    return ScenePair(person, caption(scene, rng), scene, rejected, None, None)


def write_pairs(folder: Path, people: Sequence[Profile], pairs: Iterator[ScenePair], done: Callable[[], None]) -> None:
    """Write pairs as PNG files and ``metadata.jsonl`` into ``folder``; ``done`` hears of every pair."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as table:
        for number, pair in enumerate(pairs):
            names = {side: f"{number:06d}_{side}.png" for side in ("chosen", "rejected")}
            draw(pair.chosen).save(folder / names["chosen"])
            draw(pair.rejected).save(folder / names["rejected"])
            table.write(json.dumps(_row(pair, people[pair.person], names)) + "\n")
            done()


def _row(pair: ScenePair, person: Profile, names: dict[str, str]) -> dict[str, Any]:
    described = user_row(pair.person + 1, person)
    return {
        "file_name": names["chosen"],
        **names,
        "caption": pair.caption,
        "category": pair.category or HARMLESS,
        "mention": pair.mention,
        "user_data": {column: described[column] for column in USER_COLUMNS},
    }


def described(count: int, people: int, seed: int, style: Style) -> dict[str, Any]:
    """Return what decides the pairs of a folder, as its ``drawn.json`` says it."""
    phrases = {"first_phrases": True} if style.first_phrases else {}
    return {"version": _VERSION, "pairs": count, "people": people, "seed": seed, "static": style.static, **phrases}


def draw_folder(folder: Path, count: int, people: int, seed: int, style: Style, progress: Progress) -> None:
    """Write pairs of training people into a new folder.

    They are drawn beside it and come there together: a folder that is there is whole.

    Raises:
        DataError: the folder is not empty, or cannot be written.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty. Choose a new folder.")
    persons = training_people(people, seed)
    if style.static:
        persons = [with_set(person, frozenset(CATEGORIES)) for person in persons]
    task = progress.add_task("Drawing pairs", total=count, state="")
    aside = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        pairs = draw_pairs(persons, count, seed, style.first_phrases)
        write_pairs(aside, persons, pairs, lambda: progress.advance(task))
        (aside / DRAWN).write_text(json.dumps(described(count, people, seed, style)) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written ({error.strerror}). Make room, or choose another folder."
        ) from None
