"""Adapters for the miniature: trained with this package's trainer, and measured against what else could be done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ...profiles import find_level
from ...safe_files import replacing
from ..config import load_config
from ..train import train
from .cases import draw_cases
from .evaluation import Method, draw_all
from .pairs import draw_folder
from .recipe import DETECTOR, SEED
from .results import tabulate, to_json, to_markdown

PEOPLE = 1200
PAIRS = 6000


def train_adapter(
    base: Path, work: Path, static: bool, overrides: Sequence[str], console: Console, progress: Progress
) -> Path:
    """Train an adapter as ``configs/miniature.toml`` says, on pairs that are drawn if they are not there yet.

    Pairs are the same for every seed of the training: people and pictures come from the miniature's own.

    Raises:
        TrainingError: see ``train``.
    """
    name = "static" if static else "psa"
    pairs = work / f"{name}-pairs"
    if not (pairs / "metadata.jsonl").is_file():
        draw_folder(pairs, PAIRS, PEOPLE, SEED, static, progress)
    progress.stop()  # the training has bars of its own
    settings = (
        f"model.base={base}",
        f"data.train={pairs}",
        f"data.cache={work / 'cache'}",
        f"run.output={work / name}",
        f"adapter.name={name}_miniature",
    )
    return train(load_config(Path("miniature"), (*settings, *overrides)), console)


def evaluate(
    base: Path,
    adapters: Sequence[tuple[str, Path]],
    static: Path | None,
    per_cell: int,
    language_models: Sequence[Path],
    progress: Progress,
) -> dict[str, Any]:
    """Return tables of the base, a negative prompt, a static adapter and the adapters, as rows and as Markdown.

    Adapters of the same name are trainings with other seeds: the table takes their pictures together, and the rows
    have each of them besides.
    """
    methods = [Method("base"), Method("negative prompt", negative_prompt=True)]
    if static is not None:
        methods.append(Method("static", adapter=static, everyone=find_level("L5").profile))
    names = [name for name, _ in adapters]
    runs = [
        Method(name if names.count(name) == 1 else f"{name}, run {names[: i + 1].count(name)}", adapter=path)
        for i, (name, path) in enumerate(adapters)
    ]
    cases = draw_cases(per_cell, PEOPLE, SEED)
    outcomes = draw_all([*methods, *runs], cases, base, base / DETECTOR, progress, language_models)
    together = {method.name: outcomes[method.name] for method in methods}
    for name, run in zip(names, runs, strict=True):
        together[name] = together.get(name, []) + outcomes[run.name]
    tables = {name: tabulate(found) for name, found in together.items()}
    single = {run.name: tabulate(outcomes[run.name]) for run in runs if run.name not in tables}
    return {"rows": to_json({**tables, **single}), "markdown": to_markdown(tables)}


def write_results(results: Mapping[str, Any], output: Path) -> None:
    """Write the rows of results as JSON and the tables as Markdown beside it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as aside:
        aside.write_text(json.dumps(results["rows"], indent=1) + "\n", encoding="utf-8")
    with replacing(output.with_suffix(".md")) as aside:
        aside.write_text(results["markdown"], encoding="utf-8")
