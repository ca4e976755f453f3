"""Image grids of a report: the same cases for all methods, and the same prompts for all levels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from ...safe_files import replacing
from ..picture_grid import picture_grid
from .compliance import drawn
from .gallery import Gallery, Shown, is_level, levels

_ROWS, _COLUMNS, _LEVEL_GRIDS = 8, 8, 6
_TILE = 192  # pixels


@dataclass(frozen=True)
class Grid:
    """A sheet of pictures."""

    path: Path
    title: str


def draw_grids(gallery: Gallery, folder: Path) -> list[Grid]:
    """Write the grids into ``folder``; cases are chosen by a hash of their names, and not by what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    grids = _of_methods(gallery, folder)
    personal = [label for label in gallery.labels if label != gallery.base and _knows_levels(gallery.of(label))]
    for number, label in enumerate(personal[:_LEVEL_GRIDS], start=1):
        grid = _of_levels(gallery, label, folder / f"levels-{number}.png")
        grids += [grid] if grid else []
    return grids


def _knows_levels(pictures: Sequence[Shown]) -> bool:
    """Whether a method draws a level other pictures than another one; those that know nobody share their files."""
    files: dict[tuple[str, int, int], set[str]] = {}
    for shown in pictures:
        if is_level(shown.people):
            case = (shown.picture.prompt_id, shown.picture.seed, shown.picture.run)
            files.setdefault(case, set()).add(shown.picture.image)
    return any(len(found) > 1 for found in files.values())


def _of_methods(gallery: Gallery, folder: Path) -> list[Grid]:
    """One sheet for every eight methods, each with the base."""
    others = [label for label in gallery.labels if label != gallery.base]
    rows = _chosen(gallery)
    found = []
    for start in range(0, len(others), _COLUMNS - 1):
        labels = [label for label in gallery.labels if label == gallery.base] + others[start : start + _COLUMNS - 1]
        cases = {label: _first_by_case(gallery.of(label)) for label in labels}
        sheet = [[_image(cases[label].get(shown.picture.case)) for label in labels] for shown in rows]
        path = folder / f"methods-{start // (_COLUMNS - 1) + 1}.png"
        _write(path, sheet, labels, [_caption(shown) for shown in rows])
        found.append(Grid(path, "The same prompts, people and noise for all methods"))
    return found


def _of_levels(gallery: Gallery, label: str, path: Path) -> Grid | None:
    pictures = gallery.of(label)
    names = levels(pictures)
    by_prompt: dict[tuple[str, int], dict[str, Shown]] = {}
    for shown in reversed(pictures):
        if shown.people in names:
            by_prompt.setdefault((shown.picture.prompt_id, shown.picture.seed), {})[shown.people] = shown
    complete = [found for found in by_prompt.values() if len(found) == len(names)]
    # Prompts about different things, if there are.
    complete.sort(key=lambda found: drawn(found[names[0]].picture.prompt_id))
    rows = _in_turns(complete, names[0])[:_ROWS]
    if not rows:
        return None
    bases = [next((found[name].base for name in names if found[name].base is not None), None) for found in rows]
    with_base = any(base is not None for base in bases)
    sheet = [
        ([_image(base)] if with_base else []) + [_image(found[name]) for name in names]
        for base, found in zip(bases, rows, strict=True)
    ]
    captions = [
        f"{found[names[0]].picture.prompt} ({found[names[0]].picture.category or 'category unknown'})" for found in rows
    ]
    _write(path, sheet, ([gallery.base] if with_base else []) + names, captions)
    return Grid(path, f"{label}: the same prompts and noise for all levels")


def _in_turns(rows: Sequence[dict[str, Shown]], name: str) -> list[dict[str, Shown]]:
    """Return the rows so that their categories take turns."""
    turns: Counter[str | None] = Counter()
    order = []
    for row in rows:
        category = row[name].picture.category
        order.append(turns[category])
        turns[category] += 1
    return [row for _, row in sorted(zip(order, rows, strict=True), key=lambda pair: pair[0])]


def _chosen(gallery: Gallery) -> list[Shown]:
    """Return cases of different cells in turn, only those that most methods have."""
    cases: dict[str, set[str]] = {}
    for shown in gallery.pictures:
        cases.setdefault(shown.picture.case, set()).add(shown.label)
    most = max(len(found) for found in cases.values())
    cells: dict[tuple[str, ...], dict[str, Shown]] = {}
    for shown in gallery.pictures:
        if len(cases[shown.picture.case]) == most:
            cell = (shown.asked, shown.people, shown.seen)
            cells.setdefault(cell, {}).setdefault(shown.picture.case, shown)
    queues = [
        sorted(found.values(), key=lambda shown: drawn(shown.picture.case))
        for _, found in sorted(cells.items(), key=lambda item: drawn("".join(item[0])))
    ]
    turns = [queue[turn] for turn in range(_ROWS) for queue in queues if turn < len(queue)]
    return sorted(turns[:_ROWS], key=lambda shown: (shown.asked, shown.people))


def _first_by_case(pictures: Sequence[Shown]) -> dict[str, Shown]:
    return {shown.picture.case: shown for shown in reversed(pictures)}


def _caption(shown: Shown) -> str:
    about = f"{shown.picture.category}, {shown.asks}" if shown.sensitive else shown.asks
    return f"{shown.picture.prompt} ({about}; {shown.people})"


def _image(shown: Shown | None) -> PIL.Image.Image | None:
    return None if shown is None else shown.image()


def _write(
    path: Path, rows: Sequence[Sequence[PIL.Image.Image | None]], labels: Sequence[str], captions: Sequence[str]
) -> None:
    with replacing(path) as aside:
        picture_grid(rows, labels, captions, _TILE).save(aside, "PNG")
