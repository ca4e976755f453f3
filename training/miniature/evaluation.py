"""Lets every method draw every case, lets the detector look at the pictures, and compares them with the base's."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import PIL.Image
import torch
from rich.progress import Progress
from torch import Tensor

from ...adapter import EncoderSpec, PSAAdapter, UserEffect, load_adapter
from ...profiles import CATEGORIES, Profile
from ...profiles.encoders import Encoder
from ..data.users import encoder_of
from .captions import avoiding
from .cases import Case, noise
from .detector import Detector, Sighting, load_detector
from .kept import Kept, case_key
from .likeness import likeness
from .methods import BASE, Method
from .people import banned
from .sampling import CPU, Painter

_Batch = tuple[Method, Sequence[Case]]

_BATCH = 32
_KEPT_EVERY = 20  # batches


@dataclass(frozen=True)
class Outcome:
    """What a method made of a case."""

    case: Case
    sighting: Sighting

    @property
    def prompted(self) -> bool:
        """The prompted glyph is there."""
        return self.case.category in self.sighting.glyphs

    @property
    def clean(self) -> bool:
        """No glyph is there."""
        return not self.sighting.glyphs

    @property
    def substituted(self) -> bool:
        """The prompted glyph is not there, but another one is."""
        return not self.prompted and not self.clean

    @property
    def object_kept(self) -> bool:
        """The prompted object is there."""
        return self.case.object in self.sighting.objects


class Studio:
    """Everything that is needed to draw cases and to look at them, loaded once."""

    def __init__(
        self, base: Path, detector: Path, language_models: Sequence[Path] = (), device: torch.device = CPU
    ) -> None:
        """Load the miniature onto a device, and its detector.

        ``language_models`` are folders of those that adapters name.
        """
        self._device = device
        self._painter = Painter(base, device)
        self._detector: Detector = load_detector(detector)
        self._language_models = tuple(language_models)
        self._adapters: dict[Path, PSAAdapter] = {}
        self._encoders: dict[EncoderSpec, Encoder] = {}
        self._embeddings: dict[tuple[EncoderSpec, str], Tensor] = {}

    def draw(self, method: Method, cases: Sequence[Case]) -> list[Outcome]:
        """Return what the method makes of the cases."""
        seen = self._detector.see(self._paint(method, cases))
        return [Outcome(case, sighting) for case, sighting in zip(cases, seen, strict=True)]

    def compare(self, method: Method, cases: Sequence[Case]) -> list[float]:
        """Return how alike the method's pictures are to the base's, see ``likeness``."""
        return likeness(self._paint(method, cases), self._paint(BASE, cases))

    @torch.no_grad()
    def _paint(self, method: Method, cases: Sequence[Case]) -> list[PIL.Image.Image]:
        return self._painter.paint(
            [case.caption for case in cases],
            noise(cases),
            negative=_negative(cases) if method.negative_prompt else None,
            people=self._effect(method, cases),
            strength=method.strength,
        )

    def _effect(self, method: Method, cases: Sequence[Case]) -> UserEffect | None:
        if method.adapter is None:
            return None
        if method.adapter not in self._adapters:
            self._adapters[method.adapter] = load_adapter(method.adapter).to(self._device)
        adapter = self._adapters[method.adapter]
        people = [method.everyone or case.person for case in cases]
        return adapter.effect(torch.stack([self._embedding(adapter, person) for person in people]))

    def _embedding(self, adapter: PSAAdapter, person: Profile) -> Tensor:
        spec = adapter.config.encoder
        key = spec, person.model_dump_json()
        if key not in self._embeddings:
            if spec not in self._encoders:
                self._encoders[spec] = encoder_of(spec, self._language_models, torch.device("cpu"))
            self._embeddings[key] = self._encoders[spec].encode([person])[0]
        return self._embeddings[key]


@contextmanager
def studios(base: Path, detector: Path, language_models: Sequence[Path] = ()) -> Iterator[Executor]:
    """Yield a studio for each core of the machine; they share a CUDA device if there is one."""
    # Small models are far faster on one thread each than on all of them together.
    files = base, detector, tuple(language_models)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _open_studio, files) as pool:
        yield pool


def draw_all(
    pool: Executor, methods: Sequence[Method], cases: Sequence[Case], progress: Progress, kept: Kept
) -> dict[str, list[Outcome]]:
    """Return the outcomes of every method, by its name; what is ``kept`` already is not drawn again."""
    keys = [case_key(case) for case in cases]
    seen = {method.name: kept.read(method) for method in methods}
    missing = {
        name: [case for key, case in zip(keys, cases, strict=True) if key not in found] for name, found in seen.items()
    }
    batches = [batch for method in methods for batch in _batches(method, missing[method.name])]
    drawn = sum(len(found) for found in missing.values())
    task = progress.add_task("Drawing", total=len(methods) * len(cases), state="")
    progress.update(task, advance=len(methods) * len(cases) - drawn)
    for number, ((method, asked), found) in enumerate(zip(batches, pool.map(_draw, batches), strict=True), start=1):
        seen[method.name].update(zip(map(case_key, asked), found, strict=True))
        progress.update(task, advance=len(found), state=method.name)
        if number % _KEPT_EVERY == 0 or asked[-1] is missing[method.name][-1]:
            kept.write(method, seen[method.name])
    return {
        name: [Outcome(case, found[key]) for key, case in zip(keys, cases, strict=True)] for name, found in seen.items()
    }


def compare_all(
    pool: Executor, methods: Sequence[Method], cases: Sequence[Case], progress: Progress
) -> dict[str, list[float]]:
    """Return for every method, by its name, how alike its pictures of the cases are to the base's."""
    task = progress.add_task("Comparing with the base", total=len(methods) * len(cases), state="")
    batches = [batch for method in methods for batch in _batches(method, cases)]
    found: dict[str, list[float]] = {method.name: [] for method in methods}
    for (method, _), values in zip(batches, pool.map(_compare, batches), strict=True):
        found[method.name] += values
        progress.update(task, advance=len(values), state=method.name)
    return found


def _batches(method: Method, cases: Sequence[Case]) -> list[_Batch]:
    return [(method, cases[start : start + _BATCH]) for start in range(0, len(cases), _BATCH)]


_studio: Studio


def _open_studio(base: Path, detector: Path, language_models: tuple[Path, ...]) -> None:
    global _studio
    torch.set_num_threads(1)
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    _studio = Studio(base, detector, language_models, device)


def _draw(batch: _Batch) -> list[Sighting]:
    return [outcome.sighting for outcome in _studio.draw(*batch)]


def _compare(batch: _Batch) -> list[float]:
    return _studio.compare(*batch)


def _negative(cases: Sequence[Case]) -> list[str]:
    return [avoiding(tuple(c for c in CATEGORIES if c in banned(case.person))) for case in cases]
