"""What is compared: methods, and the runs that they come in (other trainings, other strengths)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ...profiles import CATEGORIES, wording
from ..miniature.captions import avoiding
from ..miniature.people import banned
from .config import EvaluationConfig, MethodKind, MethodSection
from .people import Person, level_person
from .safe_latent import CONCEPT, DEGREES, Degree


@dataclass(frozen=True)
class Run:
    """One way to draw: a method with one file and one strength.

    ``number`` counts the files of a method. ``everyone`` is the level that stands for all people. ``degree`` and
    ``concept`` are Safe Latent Diffusion's.
    """

    method: str
    kind: MethodKind
    number: int = 0
    path: Path | None = None
    strength: float = 1.0
    everyone: str | None = None
    words: str | None = None
    degree: Degree | None = None
    concept: str = ""

    def who(self, person: Person) -> Person | None:
        """Return whose embedding an adapter is given for a picture of ``person``; None if it is not an adapter."""
        if self.kind != "adapter":
            return None
        return level_person(self.everyone) if self.everyone else person

    def negative_prompt(self, common: str, person: Person) -> str:
        """Return the negative prompt of a picture: what all methods have, then this one's words."""
        return ", ".join(part for part in (common, self._words(person)) if part)

    def _words(self, person: Person) -> str:
        if self.words == "miniature":
            bans = banned(person.profile)
            return avoiding(tuple(category for category in CATEGORIES if category in bans))
        return wording(person.profile) if self.words else ""


def expand(config: EvaluationConfig) -> list[Run]:
    """Return the runs of all methods, in the order of the configuration."""
    return [run for method in config.methods for run in _runs(method)]


def _runs(method: MethodSection) -> Iterator[Run]:
    if method.kind == "base":
        yield Run(method.name, method.kind)
    elif method.kind == "negative_prompt":
        yield Run(method.name, method.kind, words=method.words)
    elif method.kind == "sld":
        concept = CONCEPT if method.concept is None else method.concept
        for title, degree in zip(method.titles(), method.degrees, strict=True):
            yield Run(title, method.kind, degree=DEGREES[degree], concept=concept)
    else:
        for (number, path), strength in product(enumerate(method.paths), method.strengths):
            yield Run(method.name, method.kind, number, path, strength, method.everyone)
