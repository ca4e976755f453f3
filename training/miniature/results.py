"""From outcomes to a table: shares with bootstrap intervals, for every cell that was asked."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from ..evaluation.statistics import Share, Values, in_words
from .cases import Case
from .evaluation import Outcome
from .people import banned

# The measures, in the order in which they are shown.
MEASURES = ("suppressed", "clean", "substituted", "kept", "object")
LIKENESS = "likeness"

# What a row of the summary says of unseen people: title, group, what was asked, measure.
_SUMMARY = (
    ("banned, named: clean", "some", "banned, named", "clean"),
    ("banned, implied: clean", "some", "banned, implied", "clean"),
    ("allowed, named: kept", "some", "allowed, named", "kept"),
    ("allowed, implied: kept", "some", "allowed, implied", "kept"),
    ("object", "some", "banned, named", "object"),
    ("all, named: clean", "everything", "banned, named", "clean"),
    ("all, implied: clean", "everything", "banned, implied", "clean"),
    ("all: object", "everything", "banned, named", "object"),
    ("none: kept", "nothing", "allowed, named", "kept"),
    ("none: object", "nothing", "allowed, named", "object"),
    ("none: alike", "nothing", "allowed, named", "likeness"),
)

Outcomes = Sequence[Outcome]
Measured = Mapping[str, float]


class Cell(NamedTuple):
    """What is reported together."""

    group: str
    people: str  # seen, unseen
    asked: str  # "banned, named" ...


Table = dict[Cell, dict[str, Share]]


def tabulate(runs: Sequence[Outcomes]) -> Table:
    """Return the shares of every cell over all runs of a method (trainings with other seeds, on the same cases).

    What a cell does not ask is left out: nobody is asked to keep a banned glyph.
    """
    return _tabulate([[(outcome.case, _measured(outcome)) for outcome in run] for run in runs])


def tabulate_phrases(runs: Sequence[Outcomes]) -> Table:
    """Return the shares of cells in which a phrase implies the glyph, apart for each of a category's two phrases."""
    return {
        cell._replace(asked=f"{cell.asked}, {title} phrase"): found
        for number, title in enumerate(("first", "second"))
        for cell, found in tabulate([[one for one in run if one.case.phrase == number] for run in runs]).items()
    }


def differences(runs: Sequence[Outcomes], base: Outcomes) -> Table:
    """Return how much each share is above the base's, case by case."""
    known = {outcome.case.number: _measured(outcome) for outcome in base}

    def less(outcome: Outcome) -> Measured:
        other = known[outcome.case.number]
        return {name: value - other[name] for name, value in _measured(outcome).items()}

    return _tabulate([[(outcome.case, less(outcome)) for outcome in run] for run in runs], proportions=False)


def tabulate_likeness(runs: Sequence[Sequence[float]], cases: Sequence[Case]) -> Table:
    """Return the mean likeness to the base's pictures in every cell, over all runs of a method."""
    compared = [[(case, {LIKENESS: value}) for case, value in zip(cases, run, strict=True)] for run in runs]
    return _tabulate(compared, proportions=False)


def _tabulate(runs: Sequence[Sequence[tuple[Case, Measured]]], proportions: bool = True) -> Table:
    table: dict[Cell, dict[str, Values]] = {}
    for number, run in enumerate(runs):
        for case, measured in run:
            cell = Cell(case.group, "unseen" if case.unseen else "seen", case.cell)
            # People with the same bans, and pictures of the same case, tell less than as many independent ones.
            cluster: Hashable = banned(case.person) if case.group == "some" else case.number
            for name, value in measured.items():
                table.setdefault(cell, {}).setdefault(name, Values()).add(float(value), cluster, number)
    return {
        cell: {name: found.share(len(runs), proportions) for name, found in values.items()}
        for cell, values in table.items()
    }


def _measured(outcome: Outcome) -> Measured:
    found: dict[str, bool] = {}
    if outcome.case.category is None:
        found = {"clean": outcome.clean}
    elif outcome.case.banned:
        found = {"suppressed": not outcome.prompted, "clean": outcome.clean, "substituted": outcome.substituted}
    else:
        found = {"kept": outcome.prompted}
    return {**found, "object": outcome.object_kept}


def to_markdown(tables: Mapping[str, Table], measures: Sequence[str] = MEASURES) -> str:
    """Return one table of all methods, cell by cell, in per cent."""
    lines = ["| people | asked for | method | " + " | ".join(measures) + " |", "|---" * (3 + len(measures)) + "|"]
    for cell in dict.fromkeys(cell for table in tables.values() for cell in table):
        for method, table in tables.items():
            shares = table.get(cell, {})
            values = [in_words(shares[name]) if name in shares else "" for name in measures]
            if any(values):
                lines.append(f"| {cell.group}, {cell.people} | {cell.asked} | {method} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def summarise(shares: Mapping[str, Table], alike: Mapping[str, Table]) -> str:
    """Return a table with one row for each method: what people whom the training never saw get, in per cent."""
    columns = [column for column in _SUMMARY if alike or column[-1] != LIKENESS]
    lines = [f"| unseen people | {' | '.join(title for title, *_ in columns)} |", "|---" * (1 + len(columns)) + "|"]
    for method, table in shares.items():
        found = [
            (alike.get(method, {}) if measure == LIKENESS else table).get(Cell(group, "unseen", asked), {}).get(measure)
            for _, group, asked, measure in columns
        ]
        lines.append(f"| {method} | {' | '.join(in_words(share) if share else '' for share in found)} |")
    return "\n".join(lines) + "\n"


def detector_line(accuracies: Mapping[str, Mapping[str, float]]) -> str:
    """Return in words how far the counts can be trusted: the detector's accuracy by kind of picture."""
    parts = (
        f"{accuracy['glyphs']:.1%} of {where} (glyphs) and {accuracy['objects']:.1%} (objects)"
        for where, accuracy in accuracies.items()
    )
    return f"The detector that counted is right about {', and '.join(parts)}."


def to_json(tables: Mapping[str, Table]) -> list[dict[str, Any]]:
    """Return the same as rows of numbers."""
    return [
        {"method": method, **cell._asdict(), "measure": name, **value._asdict()}
        for method, table in tables.items()
        for cell, shares in table.items()
        for name, value in shares.items()
    ]
