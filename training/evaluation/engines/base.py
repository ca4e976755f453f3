"""What an engine is: orders in, pictures out, and what decides about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import PIL.Image

from ..cases import Case
from ..methods import Run
from ..people import Person


@dataclass(frozen=True)
class Order:
    """One picture to be drawn: by which run, for which case, with which negative prompt."""

    run: Run
    case: Case
    negative_prompt: str


class Engine(Protocol):
    """Draws. Everything that can be found out before the first picture is refused by ``check``."""

    width: int
    height: int
    title: str  # the engine and its sampler, for the manifest

    def check(self, runs: Sequence[Run], people: Sequence[Person]) -> None:
        """Look at all files, and get ready for these people.

        Raises:
            TrainingError, AdapterError, EncoderError, ComfyUIError: something is missing or does not fit.
        """

    def base_of(self, run: Run) -> str:
        """Return what a run draws with: its name and a hash of its weights."""

    def adapter_of(self, run: Run) -> str | None:
        """Return the same of its adapter or LoRA."""

    def person_key(self, run: Run, person: Person) -> str | None:
        """Return what a picture depends on of a person, besides the negative prompt; None: on nothing."""

    def group(self, run: Run) -> object:
        """Return what has to be loaded for a run: those that share it are drawn one after the other."""

    def draw(self, run: Run, orders: Sequence[Order]) -> list[PIL.Image.Image]:
        """Return one picture for each order of one run."""

    def close(self) -> None:
        """Let go of everything."""
