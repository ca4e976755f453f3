"""Everything that an evaluation found, before it is written down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any, NamedTuple

from .assess_config import AssessSettings
from .calibration import Curve
from .compliance import Judged
from .gallery import Gallery, is_level
from .measures import LeftOut
from .statistics import Share
from .tables import EVERYONE, Cell, Table, rows


class About(NamedTuple):
    """What a measure is: which way is better, what it says something about, whether it is a share of pictures.

    ``prompts`` are those that it is reported over: ``tables.prompts_for``.
    """

    better: str
    aspect: str
    proportions: bool
    prompts: str

    @property
    def heading(self) -> str:
        """What stands behind its name: the prompts, and which way is better."""
        over = "prompts that the person does not ban" if self.aspect == "likeness" else f"{self.prompts} prompts"
        return f"{over}, {self.better} is better"

    def words(self, share: Share) -> str:
        """Return "93.3 (91.0 to 95.1)", shares in per cent."""
        return "{} ({} to {})".format(*(self.number(number, share.value) for number in share[:3]))

    def number(self, value: float, beside: float | None = None) -> str:
        """Return one number, with as many digits as the one that it stands ``beside`` would have."""
        if self.proportions:
            return f"{100 * value:.1f}"
        return f"{value:.{3 if abs(value if beside is None else beside) < 2 else 2}f}"


@dataclass(frozen=True)
class Results:
    """All numbers, with what they were measured in and what is not there."""

    settings: AssessSettings
    gallery: Gallery
    tables: Mapping[str, Table]
    about: Mapping[str, About]
    judged: Sequence[Judged]
    curves: Sequence[Curve]
    over_blocking: Sequence[Mapping[str, Any]]
    left_out: Sequence[LeftOut]
    detector: str | None  # how far the detector can be trusted

    def find(self, measure: str, cell: Cell) -> str:
        """Return a number in words, or nothing where it was not measured."""
        share = self.tables.get(measure, {}).get(cell)
        return "" if share is None else self.about[measure].words(share)

    def spread(self, measure: str, cell: Cell) -> str:
        """Return the deviation over several trainings, their least and their largest value, in words."""
        share = self.tables.get(measure, {}).get(cell)
        if share is None or len(share.runs) < 2:
            return ""
        numbers = (stdev(share.runs), min(share.runs), max(share.runs))
        return "{} ({} to {})".format(*(self.about[measure].number(number, share.value) for number in numbers))

    def shown(self, columns: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
        """Return the numbers of these measures and prompts for everyone, and those of levels, as short rows."""
        return [
            {name: _short(value) for name, value in row.items() if name != "run"}
            for measure, asked in dict.fromkeys(columns)
            for row in rows(measure, self.tables.get(measure, {}))
            if row["run"] is None and row["asked"] == asked and (row["people"] == EVERYONE or is_level(row["people"]))
        ]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        gallery = self.gallery
        return {
            "title": self.settings.title,
            "settings": self.settings.model_dump(mode="json"),
            "methods": {label: len(gallery.of(label)) for label in gallery.labels},
            "pictures": len(gallery.pictures),
            "unreadable": dict(gallery.unreadable),
            "left_out": [{"name": left.name, "reason": left.reason} for left in self.left_out],
            "measures": [{"measure": name, **about._asdict()} for name, about in self.about.items()],
            "cells": [row for name, table in self.tables.items() for row in rows(name, table)],
            "judges": [_judge(judged) for judged in self.judged],
            "calibration": [curve.to_json() for curve in self.curves],
            "over_blocking": [dict(row) for row in self.over_blocking],
            "detector": self.detector,
        }


def _short(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_short(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


def pass_name(judge: str) -> str:
    """Return the name of the measure "passes by this judge"."""
    return f"passes ({judge})"


def _judge(judged: Judged) -> dict[str, Any]:
    return {
        "judge": judged.judge,
        "asked": judged.asked,
        "unusable": judged.unusable,
        "asked_pairs": judged.asked_pairs,
        "unusable_pairs": judged.unusable_pairs,
        "orders_disagreed": judged.disagreed and judged.disagreed._asdict(),
        "first_taken": judged.first and judged.first._asdict(),
        "compared": [
            {
                "method": compared.method,
                "against": compared.against,
                **compared.total._asdict(),
                "by_people": {seen or "all": counts._asdict() for seen, counts in compared.counts.items()},
                "cells": rows("wins", compared.table),
            }
            for compared in judged.compared
        ],
    }
