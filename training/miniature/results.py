"""From outcomes to a table: shares with bootstrap intervals, for every cell that was asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import bootstrap

from .evaluation import Outcome

_RESAMPLES = 2000

# The measures, in the order in which they are shown: what is right about a picture.
MEASURES = ("suppressed", "clean", "substituted", "kept", "object")


class Share(NamedTuple):
    """A share of pictures with its 95% bootstrap interval."""

    value: float
    low: float
    high: float
    pictures: int


class Cell(NamedTuple):
    """What is reported together."""

    group: str
    people: str  # seen, unseen
    asked: str  # "banned, named" ...


def tabulate(outcomes: Iterable[Outcome], seed: int = 0) -> dict[Cell, dict[str, Share]]:
    """Return the shares of every cell. What a cell does not ask is left out: nobody is asked to keep a banned glyph."""
    cells: dict[Cell, dict[str, list[bool]]] = {}
    for outcome in outcomes:
        case = outcome.case
        cell = Cell(case.group, "unseen" if case.unseen else "seen", case.cell)
        values = cells.setdefault(cell, {})
        for name, value in _measured(outcome).items():
            values.setdefault(name, []).append(value)
    return {cell: {name: share(v, seed) for name, v in values.items()} for cell, values in cells.items()}


def _measured(outcome: Outcome) -> dict[str, bool]:
    found: dict[str, bool] = {}
    if outcome.case.category is None:
        found = {"clean": outcome.clean}
    elif outcome.case.banned:
        found = {"suppressed": not outcome.prompted, "clean": outcome.clean, "substituted": outcome.substituted}
    else:
        found = {"kept": outcome.prompted}
    return {**found, "object": outcome.object_kept}


def share(values: Sequence[bool], seed: int = 0) -> Share:
    """Return the share of true values and its 95% bootstrap interval (percentiles)."""
    array = np.asarray(values, dtype=float)
    mean = float(array.mean())
    if len(array) < 2 or mean in (0.0, 1.0):
        return Share(mean, mean, mean, len(array))
    interval = bootstrap(
        (array,),
        np.mean,
        n_resamples=_RESAMPLES,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Share(mean, float(interval.low), float(interval.high), len(array))


def to_markdown(tables: Mapping[str, Mapping[Cell, Mapping[str, Share]]]) -> str:
    """Return one table of all methods, cell by cell."""
    lines = ["| people | asked for | method | " + " | ".join(MEASURES) + " |", "|---" * (3 + len(MEASURES)) + "|"]
    cells = list(dict.fromkeys(cell for table in tables.values() for cell in table))
    for cell in cells:
        for method, table in tables.items():
            shares = table.get(cell)
            if shares is None:
                continue
            values = [_written(shares[name]) if name in shares else "" for name in MEASURES]
            lines.append(f"| {cell.group}, {cell.people} | {cell.asked} | {method} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def to_json(tables: Mapping[str, Mapping[Cell, Mapping[str, Share]]]) -> list[dict[str, Any]]:
    """Return the same as rows of numbers."""
    return [
        {"method": method, **cell._asdict(), "measure": name, **value._asdict()}
        for method, table in tables.items()
        for cell, shares in table.items()
        for name, value in shares.items()
    ]


def _written(value: Share) -> str:
    return f"{value.value:.2f} ({value.low:.2f}-{value.high:.2f})"
