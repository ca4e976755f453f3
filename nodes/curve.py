"""Strength over a sampling run, as a curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..adapter import AdapterError

CONSTANT = "constant"
_SHAPES: dict[str, Callable[[float], float]] = {
    CONSTANT: lambda place: 1.0,
    "linear": lambda place: 1 - place,
    "cosine": lambda place: (1 + math.cos(math.pi * place)) / 2,
}
SHAPES = tuple(_SHAPES)


@dataclass(frozen=True)
class Curve:
    """What the strength is multiplied with, from where PSA begins to act (0) to where it stops (1).

    A named shape, or ``points``: numbers at equal distances, with straight lines between them.

    Raises:
        AdapterError: there are points, and one is negative or no number.
    """

    shape: str = CONSTANT
    points: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check the points."""
        if wrong := [point for point in self.points if not math.isfinite(point) or point < 0]:
            raise AdapterError(
                f"The strengths for Apply PSA hold {wrong[0]:g}: expected numbers from 0 on, 1 being the strength that "
                "is set. Correct the list."
            )

    @property
    def is_flat(self) -> bool:
        """Whether the strength never changes."""
        return len(set(self.points)) == 1 if self.points else self.shape == CONSTANT

    @property
    def peak(self) -> float:
        """The largest factor."""
        return max(self.points, default=1.0)

    def at(self, place: float) -> float:
        """Return the factor at a place from 0 to 1."""
        if not self.points:
            return _SHAPES[self.shape](place)
        position = place * (len(self.points) - 1)
        below = min(int(position), len(self.points) - 1)
        above = min(below + 1, len(self.points) - 1)
        return self.points[below] + (position - below) * (self.points[above] - self.points[below])


FLAT = Curve()


def points_of(strengths: Sequence[float] | float | None) -> tuple[float, ...]:
    """Return what a node got as strengths: a list, one number for the whole run, or nothing.

    Raises:
        AdapterError: it is no list of numbers, or an empty one.
    """
    if strengths is None:
        return ()
    listed = [strengths] if isinstance(strengths, (int, float)) else strengths
    try:
        points = tuple(float(point) for point in listed)
    except (TypeError, ValueError):
        points = ()
    if not points:
        raise AdapterError(
            f"Apply PSA got {strengths!r:.60} as strengths: expected a list of at least one number. Connect such a "
            "list, or nothing."
        )
    return points
