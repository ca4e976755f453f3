"""What a report is made of: paragraphs, figures and tables, in chapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .calibration import Number
from .statistics import Share, in_words


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Figure:
    """A picture in the report's folder."""

    path: Path
    alt: str
    kind: str = "figure"


@dataclass(frozen=True)
class View:
    """A table; ``folded`` ones are closed at first."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    folded: bool = False
    kind: str = "table"


Part = Text | Figure | View


@dataclass(frozen=True)
class Chapter:
    """A title and what is below it."""

    title: str
    parts: Sequence[Part]


def few(values: Sequence[str], most: int = 3) -> str:
    """Return the first ones, and how many more there are."""
    return ", ".join(values[:most]) + (f" and {len(values) - most} more" if len(values) > most else "")


def count(number: int, name: str, plural: str | None = None) -> str:
    """Return "1 picture", "2 pictures"."""
    return f"{number:,} {name if number == 1 else plural or name + 's'}"


def percent(share: Share) -> str:
    """Return a share and its interval in per cent."""
    return in_words(share._replace(runs=()))


def number_in_words(number: Number | None) -> str:
    """Return a number and its interval, nothing for none."""
    return "" if number is None else f"{number.value:.3f} ({number.low:.3f} to {number.high:.3f})"


def part_of(part: int, whole: int) -> str:
    """Return a count and its share of the whole."""
    return f"{part:,} ({100 * part / whole:.1f}%)" if whole else "0"
