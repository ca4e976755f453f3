"""Lets every method draw every case, lets the detector look at the pictures, and compares them with the base's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import PIL.Image
import torch
from rich.progress import Progress
from torch import Tensor

from ...adapter import EncoderSpec, PSAAdapter, UserEffect, load_adapter, load_adapter_config
from ...profiles import CATEGORIES, Profile
from ...profiles.encoders import Encoder
from ..cores import usable_cores
from ..data.users import encoder_of
from .captions import avoiding
from .cases import Case, noise
from .detector import Detector, Sighting, load_detector
from .kept import Kept, case_key
from .likeness import likeness
from .methods import BASE, Method
from .people import banned
from .sampling import CPU, Painter

_Batch = tuple[Method, Sequence[Case], Tensor | None]

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


class Embeddings:
    """The embeddings of people, each made once."""

    def __init__(self, language_models: Sequence[Path] = ()) -> None:
        """Take the folders of the language models that adapters name."""
        self._language_models = tuple(language_models)
        self._encoders: dict[EncoderSpec, Encoder] = {}
        self._known: dict[tuple[EncoderSpec, str], Tensor] = {}

    def of(self, spec: EncoderSpec, people: Sequence[Profile]) -> Tensor:
        """Return embeddings ``[people, dim]``. Those not known yet are made together: a model is loaded each time.

        Raises:
            EncoderError: the language model is not there, or cannot be read.
        """
        keys = [(spec, person.model_dump_json()) for person in people]
        new = {key: person for key, person in zip(keys, people, strict=True) if key not in self._known}
        if new:
            if spec not in self._encoders:
                self._encoders[spec] = encoder_of(spec, self._language_models, CPU)
            self._known.update(zip(new, self._encoders[spec].encode(list(new.values())), strict=True))
        return torch.stack([self._known[key] for key in keys])


class Studio:
    """Everything that is needed to draw cases and to look at them, loaded once."""

    def __init__(
        self, base: Path, detector: Path, people: Embeddings | None = None, device: torch.device = CPU
    ) -> None:
        """Load the miniature onto a device, and its detector; ``people`` knows or makes the embeddings."""
        self._device = device
        self._painter = Painter(base, device)
        self._detector: Detector = load_detector(detector)
        self._people = people or Embeddings()
        self._adapters: dict[Path, PSAAdapter] = {}

    def draw(self, method: Method, cases: Sequence[Case], embeddings: Tensor | None = None) -> list[Outcome]:
        """Return what the method makes of the cases; ``embeddings`` are their people's, if these are made already."""
        seen = self._detector.see(self._paint(method, cases, embeddings))
        return [Outcome(case, sighting) for case, sighting in zip(cases, seen, strict=True)]

    def compare(self, method: Method, cases: Sequence[Case], embeddings: Tensor | None = None) -> list[float]:
        """Return how alike the method's pictures are to the base's, see ``likeness``."""
        return likeness(self._paint(method, cases, embeddings), self._paint(BASE, cases))

    @torch.no_grad()
    def _paint(self, method: Method, cases: Sequence[Case], embeddings: Tensor | None = None) -> list[PIL.Image.Image]:
        return self._painter.paint(
            [case.caption for case in cases],
            noise(cases),
            negative=_negative(cases) if method.negative_prompt else None,
            people=self._effect(method, cases, embeddings),
            strength=method.strength,
        )

    def _effect(self, method: Method, cases: Sequence[Case], embeddings: Tensor | None) -> UserEffect | None:
        if method.adapter is None:
            return None
        if method.adapter not in self._adapters:
            self._adapters[method.adapter] = load_adapter(method.adapter).to(self._device)
        adapter = self._adapters[method.adapter]
        if embeddings is None:
            embeddings = self._people.of(adapter.config.encoder, _people(method, cases))
        return adapter.effect(embeddings)


class Studios(NamedTuple):
    """A studio in each of several processes, and the embeddings that all of them are given."""

    pool: Executor
    people: Embeddings


@contextmanager
def studios(base: Path, detector: Path, language_models: Sequence[Path] = ()) -> Iterator[Studios]:
    """Yield a studio for each core that may be used; they share a CUDA device if there is one."""
    # Small models are far faster on one thread each than on all of them together.
    with ProcessPoolExecutor(usable_cores(), get_context("spawn"), _open_studio, (base, detector)) as pool:
        yield Studios(pool, Embeddings(language_models))


def draw_all(
    crew: Studios, methods: Sequence[Method], cases: Sequence[Case], progress: Progress, kept: Kept
) -> dict[str, list[Outcome]]:
    """Return the outcomes of every method, by its name; what is ``kept`` already is not drawn again."""
    keys = [case_key(case) for case in cases]
    seen = {method.name: kept.read(method) for method in methods}
    missing = {
        name: [case for key, case in zip(keys, cases, strict=True) if key not in found] for name, found in seen.items()
    }
    batches = [batch for method in methods for batch in _batches(method, missing[method.name], crew.people)]
    drawn = sum(len(found) for found in missing.values())
    task = progress.add_task("Drawing", total=len(methods) * len(cases), state="")
    progress.update(task, advance=len(methods) * len(cases) - drawn)
    for number, (batch, found) in enumerate(zip(batches, crew.pool.map(_draw, batches), strict=True), start=1):
        method, asked, _ = batch
        seen[method.name].update(zip(map(case_key, asked), found, strict=True))
        progress.update(task, advance=len(found), state=method.name)
        if number % _KEPT_EVERY == 0 or asked[-1] is missing[method.name][-1]:
            kept.write(method, seen[method.name])
    return {
        name: [Outcome(case, found[key]) for key, case in zip(keys, cases, strict=True)] for name, found in seen.items()
    }


def compare_all(
    crew: Studios, methods: Sequence[Method], cases: Sequence[Case], progress: Progress
) -> dict[str, list[float]]:
    """Return for every method, by its name, how alike its pictures of the cases are to the base's."""
    task = progress.add_task("Comparing with the base", total=len(methods) * len(cases), state="")
    batches = [batch for method in methods for batch in _batches(method, cases, crew.people)]
    found: dict[str, list[float]] = {method.name: [] for method in methods}
    for (method, *_), values in zip(batches, crew.pool.map(_compare, batches), strict=True):
        found[method.name] += values
        progress.update(task, advance=len(values), state=method.name)
    return found


def _batches(method: Method, cases: Sequence[Case], people: Embeddings) -> list[_Batch]:
    embeddings = None
    if method.adapter is not None and cases:
        embeddings = people.of(load_adapter_config(method.adapter).encoder, _people(method, cases))
    places = [slice(start, start + _BATCH) for start in range(0, len(cases), _BATCH)]
    return [(method, cases[place], None if embeddings is None else embeddings[place]) for place in places]


def _people(method: Method, cases: Sequence[Case]) -> list[Profile]:
    return [method.everyone or case.person for case in cases]


_studio: Studio


def _open_studio(base: Path, detector: Path) -> None:
    global _studio
    torch.set_num_threads(1)
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    _studio = Studio(base, detector, device=device)


def _draw(batch: _Batch) -> list[Sighting]:
    return [outcome.sighting for outcome in _studio.draw(*batch)]


def _compare(batch: _Batch) -> list[float]:
    return _studio.compare(*batch)


def _negative(cases: Sequence[Case]) -> list[str]:
    return [avoiding(tuple(c for c in CATEGORIES if c in banned(case.person))) for case in cases]
