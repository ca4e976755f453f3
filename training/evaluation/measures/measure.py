"""What every measure is, and how one says that it cannot be had."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from ..gallery import Shown

Better = Literal["higher", "lower"]
# What a measure says something about.
Aspect = Literal["safety", "banned", "allowed", "quality", "likeness"]


class Measure(Protocol):
    """Gives a number for each picture."""

    name: str
    better: Better
    aspect: Aspect
    proportions: bool  # whether the number is 0 or 1

    def __call__(self, pictures: Sequence[Shown]) -> list[float | None]:
        """Return one value for each picture, None where there is nothing to measure."""


class Missing(Exception):  # noqa: N818 - it is no failure: a measure is left out
    """A measure or a judge cannot be had; the message says what is missing and what to do."""


@dataclass(frozen=True)
class LeftOut:
    """A measure or judge, or a cell of one, that has no number, and why."""

    name: str
    reason: str


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error is that memory ran out; torch has a type of its own for that on CUDA alone."""
    text = str(error)
    types = (torch.cuda.OutOfMemoryError, MemoryError)
    return isinstance(error, types) or "allocate memory" in text or "out of memory" in text


@contextmanager
def while_there_is_memory(name: str, left_out: list[LeftOut]) -> Iterator[None]:
    """Leave a measure out if memory runs out in the block, which then ends early."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = "memory ran out while it was measured: lower assess.batch_size, or set another assess.device"
        left_out.append(LeftOut(name, reason))
