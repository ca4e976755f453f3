"""Lets every method draw every case, and the detector look at the pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

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
from .kept import Kept
from .methods import Method
from .people import banned
from .sampling import CPU, Painter

_BATCH = 32
_KEPT_EVERY = 20 * _BATCH


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

    @torch.no_grad()
    def draw(self, method: Method, cases: Sequence[Case]) -> list[Outcome]:
        """Return what the method makes of the cases."""
        images = self._painter.paint(
            [case.caption for case in cases],
            noise(cases),
            negative=_negative(cases) if method.negative_prompt else None,
            people=self._effect(method, cases),
        )
        return [Outcome(case, sighting) for case, sighting in zip(cases, self._detector.see(images), strict=True)]

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


def draw_all(
    methods: Sequence[Method],
    cases: Sequence[Case],
    base: Path,
    detector: Path,
    progress: Progress,
    language_models: Sequence[Path] = (),
    work: Path | None = None,
) -> dict[str, list[Outcome]]:
    """Return the outcomes of every method, by its name.

    Each core of the machine draws for itself; they share a CUDA device if there is one. What is found is kept in
    ``work``, and what is found there already is not drawn again.
    """
    task = progress.add_task("Drawing", total=len(methods) * len(cases), state="")
    kept = Kept(work, base, detector, cases) if work else None
    seen = {method.name: kept.read(method) if kept else [] for method in methods}
    progress.update(task, advance=sum(map(len, seen.values())))
    batches = [
        (method, cases[start : start + _BATCH])
        for method in methods
        for start in range(len(seen[method.name]), len(cases), _BATCH)
    ]
    for method, found in _drawn(batches, (base, detector, tuple(language_models))):
        sightings = seen[method.name]
        sightings += found
        progress.update(task, advance=len(found), state=method.name)
        if kept and (len(sightings) == len(cases) or len(sightings) % _KEPT_EVERY == 0):
            kept.write(method, sightings)
    return {name: list(map(Outcome, cases, sightings)) for name, sightings in seen.items()}


def _drawn(
    batches: Sequence[tuple[Method, Sequence[Case]]], files: tuple[Path, Path, tuple[Path, ...]]
) -> Iterator[tuple[Method, list[Sighting]]]:
    # Small models are far faster on one thread each than on all of them together.
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _open_studio, files) as pool:
        yield from pool.map(_draw, batches)


_studio: Studio


def _open_studio(base: Path, detector: Path, language_models: tuple[Path, ...]) -> None:
    global _studio
    torch.set_num_threads(1)
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    _studio = Studio(base, detector, language_models, device)


def _draw(batch: tuple[Method, Sequence[Case]]) -> tuple[Method, list[Sighting]]:
    return batch[0], [outcome.sighting for outcome in _studio.draw(*batch)]


def _negative(cases: Sequence[Case]) -> list[str]:
    return [avoiding(tuple(c for c in CATEGORIES if c in banned(case.person))) for case in cases]
