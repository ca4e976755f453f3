"""Draws what an evaluation compares: every run for every case, in one folder, by one process or many.

A picture's file is named after everything that decides about it, so what is there is never drawn again, and never
taken for something else; pictures that do not depend on the person are drawn once for all of them. ``evaluation.json``
says what all pictures of a folder have in common.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from rich.console import Console
from rich.progress import Progress

from ...profiles import banned_categories
from ...safe_files import DAMAGE, replacing
from ..errors import DataError, TrainingError
from .cases import Case, people_of, read_cases
from .config import EvaluationConfig, local_paths
from .engines import Engine, Order
from .engines.embeddings import EMBEDDINGS
from .manifest import MANIFEST, Picture, write_manifest
from .methods import Run, expand
from .people import write_people
from .prompts import missing

FORMAT = "psa_evaluation"
FORMAT_VERSION = 2
ABOUT = "evaluation.json"
PICTURES = "pictures"
_MANIFEST_SECONDS = 60
_LINE_SECONDS = 30
# Processes wait for the slowest one, which may have hours more to draw.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Row:
    """A row of the manifest to be: an order, and where its picture lies in the folder."""

    order: Order
    image: str


def processes() -> PartialState:
    """Return this process among those that a launcher started.

    Raises:
        TrainingError: they do not find each other.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    # Processes on CPUs are each alone unless the state is told of the CPU.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    options = {"timeout": _PATIENCE} if started > 1 else {}
    state = PartialState(cpu=on_cpu, **options)
    if state.num_processes != started:
        raise TrainingError(
            f"The launcher started {started} processes, but they do not find each other: accelerate sees "
            f"{state.num_processes}. Start them with `accelerate launch` or `torchrun`."
        )
    return state


def draw(config: EvaluationConfig, state: PartialState, console: Console, progress: Progress) -> Path:
    """Draw what is not there yet, and return the folder, in which the manifest is complete.

    Raises:
        TrainingError, DataError, BaseModelError, AdapterError, EncoderError, ComfyUIError: what is wrong, and what
            to do.
    """
    folder = config.run.output
    for key, path in local_paths(config):
        if not path.exists():
            raise DataError(f"{key}: {missing(path)}")
    _refuse_strangers(folder)
    cases = read_cases(config)
    people = people_of(cases)
    runs = expand(config)
    engine = _engine(config, state)
    try:
        engine.check(runs, people)
        about = _about(config, engine)
        _check_same(folder, about)
        rows = list(_rows(config, engine, runs, cases))
        if state.is_main_process:
            with _writable(folder):
                _claim(folder, about)
                write_people(folder, people)
        wanted = {row.image: row for row in rows}
        todo = [row for image, row in wanted.items() if not (folder / image).is_file()]
        state.wait_for_everyone()  # until all know the same pictures as missing
        writer = _Manifest(config, rows, engine, state)
        try:
            _draw_share(config, engine, todo, state, writer, console, progress, len(wanted))
            state.wait_for_everyone()
        finally:
            writer.write()
    finally:
        engine.close()
    return folder


def _draw_share(
    config: EvaluationConfig,
    engine: Engine,
    todo: Sequence[Row],
    state: PartialState,
    writer: _Manifest,
    console: Console,
    progress: Progress,
    total: int,
) -> None:
    batches = _batches(todo, engine, config.sampling.batch_size)
    own = batches[state.process_index :: state.num_processes]
    ahead = sum(len(batch) for batch in own)
    task = progress.add_task("Drawing", total=ahead, state="")
    if state.is_main_process:
        shared = f", {ahead} by this process of {state.num_processes}" if state.num_processes > 1 else ""
        console.print(f"{total} pictures, {total - len(todo)} are there already, {len(todo)} to draw{shared}.")
    drawn, said = 0, time.monotonic()
    for batch in own:
        run = batch[0].order.run
        for row, image in zip(batch, engine.draw(run, [row.order for row in batch]), strict=True):
            _save(config.run.output / row.image, image)
        drawn += len(batch)
        progress.update(task, advance=len(batch), state=run.method)
        if progress.disable and state.is_main_process and time.monotonic() - said > _LINE_SECONDS:
            said = time.monotonic()
            console.print(f"{drawn} of {ahead} pictures, {run.method}", markup=False)
        writer.write_now_and_then()


def _batches(todo: Sequence[Row], engine: Engine, size: int) -> list[list[Row]]:
    """Put what shares models together, and cut it into batches of one run each."""
    groups: dict[object, dict[Run, list[Row]]] = {}
    for row in todo:
        run = row.order.run
        groups.setdefault(engine.group(run), {}).setdefault(run, []).append(row)
    return [
        rows[start : start + size]
        for runs in groups.values()
        for rows in runs.values()
        for start in range(0, len(rows), size)
    ]


def _rows(config: EvaluationConfig, engine: Engine, runs: Sequence[Run], cases: Sequence[Case]) -> Iterator[Row]:
    for run in runs:
        ground = (
            FORMAT_VERSION,
            engine.title,
            engine.base_of(run),
            engine.adapter_of(run),
            run.strength,
            run.degree,
            run.concept,
            config.sampling.steps,
            config.sampling.guidance_scale,
            engine.width,
            engine.height,
        )
        folder = f"{PICTURES}/{_slug(run.method)}"
        for case in cases:
            negative = run.negative_prompt(config.sampling.negative_prompt, case.person)
            who = engine.person_key(run, case.person)
            told = repr((*ground, case.asked.prompt, negative, case.seed, who))
            name = f"{_slug(case.asked.prompt_id)}-{hashlib.sha256(told.encode()).hexdigest()[:16]}.png"
            yield Row(Order(run, case, negative), f"{folder}/{name}")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "x"


def _save(path: Path, image: Any) -> None:
    with _writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            image.save(aside, format="PNG")


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror or error}). Make room on the disk, or name another folder in "
            "run.output. What is drawn stays, and is not drawn again."
        ) from None


class _Manifest:
    """Writes the manifest of what is there: rows whose pictures are still missing are left out."""

    def __init__(self, config: EvaluationConfig, rows: Sequence[Row], engine: Engine, state: PartialState) -> None:
        self._folder = config.run.output
        self._sampling = config.sampling
        self._rows = rows
        self._engine = engine
        self._writes = state.is_main_process
        self._written = time.monotonic()

    def write_now_and_then(self) -> None:
        if time.monotonic() - self._written > _MANIFEST_SECONDS:
            self.write()

    def write(self) -> None:
        if self._writes:
            there = {path.relative_to(self._folder).as_posix() for path in (self._folder / PICTURES).glob("*/*.png")}
            with _writable(self._folder / MANIFEST):
                write_manifest(self._folder, (self._picture(row) for row in self._rows if row.image in there))
        self._written = time.monotonic()

    def _picture(self, row: Row) -> Picture:
        order = row.order
        run, case, sampling = order.run, order.case, self._sampling
        return Picture(
            image=row.image,
            case=case.key,
            method=run.method,
            run=run.number,
            user=case.person.user,
            level=case.person.level,
            seen=case.person.seen,
            banned=banned_categories(case.person.profile),
            prompt_id=case.asked.prompt_id,
            prompt=case.asked.prompt,
            category=case.asked.category,
            content=case.asked.content,
            expected=case.asked.expected,
            negative_prompt=order.negative_prompt,
            seed=case.seed,
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            width=self._engine.width,
            height=self._engine.height,
            strength=run.strength,
            engine=self._engine.title,
            base=self._engine.base_of(run),
            adapter=self._engine.adapter_of(run),
            everyone=run.everyone,
            degree=run.degree.name if run.degree else None,
            concept=run.concept,
        )


def _engine(config: EvaluationConfig, state: PartialState) -> Engine:
    if config.engine.kind == "comfyui":
        from .engines.comfyui import ComfyUIEngine

        return ComfyUIEngine(config)
    from .engines.local import DiffusersEngine

    return DiffusersEngine(config, state)


def _about(config: EvaluationConfig, engine: Engine) -> dict[str, Any]:
    """Return what all pictures of a folder have in common. Prompts, people and methods may be added later."""
    base = Run("base", "base")
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base": engine.base_of(base),
        "engine": engine.title,
        "steps": config.sampling.steps,
        "guidance_scale": config.sampling.guidance_scale,
        "width": engine.width,
        "height": engine.height,
        "negative_prompt": config.sampling.negative_prompt,
    }


def _refuse_strangers(folder: Path) -> None:
    try:
        # Embeddings come first: a run that was interrupted while it made them goes on.
        strange = {path.name for path in folder.iterdir()} - {EMBEDDINGS} if folder.is_dir() else set()
        occupied = bool(strange) and not (folder / ABOUT).is_file()
    except OSError as error:
        raise DataError(f"run.output = {folder} cannot be read ({error.strerror}). Name another folder.") from None
    if occupied or (folder.exists() and not folder.is_dir()):
        raise DataError(
            f"run.output = {folder} holds something else than an evaluation (it has no {ABOUT}). Name a new folder."
        )


def _check_same(folder: Path, about: dict[str, Any]) -> None:
    path = folder / ABOUT
    if not path.is_file():
        return
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except DAMAGE:
        raise DataError(f"{path} is damaged. Name a new folder in run.output, or delete this one.") from None
    different = [
        f"{key}: {found.get(key)} there, {value} here" for key, value in about.items() if found.get(key) != value
    ]
    if different:
        raise DataError(
            f"run.output = {folder} belongs to another evaluation ({'; '.join(different)}). Name another folder."
        )


def _claim(folder: Path, about: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / ABOUT) as aside:
        aside.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
