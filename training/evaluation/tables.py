"""From one value for each picture to a table: means with intervals by method, people and what was asked."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ..data.categories import HARMLESS
from .gallery import SOME, Gallery, Shown
from .statistics import RESAMPLES, Share, Values

EVERYONE, ALL = "everyone", "all"
SENSITIVE = "sensitive"  # banned or allowed: what asks for one of the seven categories

# What was asked besides, so it should be there in any picture.
OBJECTS = "expected objects there"
# What the paper calls inappropriate.
EITHER = "inappropriate (Q16 or NudeNet)"

# Fewer sets of bans than this say little about people with other sets.
_ENOUGH_SETS = 10


class Cell(NamedTuple):
    """What is reported together. ``run`` is None for all runs of a method."""

    method: str
    people: str  # a level, how much is banned, or EVERYONE
    seen: str  # seen, unseen, or nothing
    asked: str  # "banned, named", ..., or "banned", "allowed", "harmless", "unknown", SENSITIVE, ALL
    run: int | None = None


Table = dict[Cell, Share]


def prompts_for(aspect: str, name: str, gallery: Gallery) -> str:
    """Return over which prompts a measure is reported: safety over sensitive ones, quality over harmless ones.

    Where no prompt is known to be of that kind it is all of them. What is counted in nothing but banned or allowed
    prompts is reported over those.
    """
    if aspect in ("banned", "allowed"):
        return aspect
    if aspect == "safety" and any(shown.sensitive for shown in gallery.pictures):
        return SENSITIVE
    if aspect == "quality" and name != OBJECTS and any(shown.asks == HARMLESS for shown in gallery.pictures):
        return HARMLESS
    return ALL


def belongs(shown: Shown, prompts: str) -> bool:
    """Return whether a picture counts among HARMLESS, SENSITIVE or ALL prompts."""
    return prompts == ALL or (shown.sensitive if prompts == SENSITIVE else shown.asks == prompts)


def cells(shown: Shown) -> Iterator[Cell]:
    """Yield the cells of all runs that a picture counts in."""
    for people in (shown.people, EVERYONE):
        for asked in dict.fromkeys((shown.asked, shown.asks, *([SENSITIVE] if shown.sensitive else []), ALL)):
            yield Cell(shown.label, people, shown.seen, asked)


def tabulate(
    pictures: Iterable[Shown],
    values: Iterable[float | None],
    proportions: bool,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Table:
    """Return the mean of every cell, over all runs, and of each run where a method has several.

    Args:
        pictures: what was measured.
        values: one for each picture; None where there is nothing to measure.
        proportions: whether values are yes or no, see ``share``.
        seed: of the bootstrap.
        resamples: of the bootstrap.
    """
    found: dict[Cell, list[tuple[Shown, float]]] = {}
    for shown, value in zip(pictures, values, strict=True):
        if value is not None:
            for cell in cells(shown):
                found.setdefault(cell, []).append((shown, value))
    table: Table = {}
    for cell, members in found.items():
        runs = sorted({shown.picture.run for shown, _ in members})
        # The numbers of single runs are in those of all; intervals of their own have only the cells of everyone.
        for run in [None, *runs] if len(runs) > 1 and cell.people == EVERYONE else [None]:
            kept = [(shown, value) for shown, value in members if run is None or shown.picture.run == run]
            table[cell._replace(run=run)] = _widest(kept, len(runs) if run is None else 1, proportions, seed, resamples)
    return table


def _widest(members: Sequence[tuple[Shown, float]], runs: int, proportions: bool, seed: int, resamples: int) -> Share:
    """Return the mean with the wider interval of two: whole prompts drawn again, or whole sets of bans.

    All people may share a prompt, and many people a set; neither alone tells how much a mean is worth.
    """
    enough_sets = len({_bans(shown) for shown, _ in members if shown.people == SOME}) >= _ENOUGH_SETS
    found = []
    for cluster in (_prompt, _bans) if enough_sets else (_prompt,):
        kept = Values()
        for shown, value in members:
            kept.add(float(value), cluster(shown), shown.picture.run)
        found.append(kept.share(runs, proportions, seed, resamples))
    return max(found, key=lambda share: share.high - share.low)


def _prompt(shown: Shown) -> Hashable:
    return shown.picture.prompt_id


def _bans(shown: Shown) -> Hashable:
    """The set of bans where there are many; everything, nothing and a level are one set each, and say no more."""
    return frozenset(shown.picture.banned) if shown.people == SOME else _prompt(shown)


def rows(measure: str, table: Table) -> list[dict[str, Any]]:
    """Return a table as rows of numbers."""
    return [{"measure": measure, **cell._asdict(), **share._asdict()} for cell, share in table.items()]
