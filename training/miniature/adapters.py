"""Adapters for the miniature: trained with this package's trainer, and measured against what else could be done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ...adapter import find_sites, load_adapter
from ...profiles import find_level
from ...safe_files import replacing
from ..base import open_base
from ..config import load_config
from ..errors import DataError, TrainingError
from ..train import train
from . import PAIRS, PEOPLE, SEED
from .cases import draw_cases
from .evaluation import draw_all
from .methods import Method
from .pairs import draw_folder
from .recipe import DETECTOR, read_figures
from .results import detector_line, differences, tabulate, to_json, to_markdown

_BASE, _NEGATIVE, _STATIC = "base", "negative prompt", "static"


def train_adapter(
    base: Path,
    work: Path,
    static: bool,
    name: str | None,
    overrides: Sequence[str],
    console: Console,
    progress: Progress,
) -> Path:
    """Train an adapter as ``configs/miniature.toml`` says, on pairs that are drawn if they are not there yet.

    Pairs are the same for every seed of the training: people and pictures come from the miniature's own.

    Raises:
        TrainingError, DataError: see ``train``; or the pairs that are there are others.
    """
    kind = "static" if static else "psa"
    name = name or kind
    pairs = work / f"{kind}-pairs"
    if not pairs.is_dir():
        draw_folder(pairs, PAIRS, PEOPLE, SEED, static, progress)
    _check_pairs(pairs)
    progress.stop()  # the training has bars of its own
    settings = (
        f"model.base={base}",
        f"data.train={pairs}",
        f"data.cache={work / 'cache'}",
        f"run.output={work / name}",
        f"adapter.name={name}_miniature",
    )
    return train(load_config(Path("miniature"), (*settings, *overrides)), console)


def _check_pairs(folder: Path) -> None:
    path = folder / "metadata.jsonl"
    found = len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0
    if found != PAIRS:
        raise DataError(
            f"{folder} holds {found} pairs, but the miniature's are {PAIRS}. Delete it to have them drawn, name "
            "another one with --work, or use `psa train` for pairs of your own."
        )


def evaluate(
    base: Path,
    adapters: Sequence[tuple[str, Path]],
    static: Path | None,
    per_cell: int,
    language_models: Sequence[Path],
    work: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Return tables of the base, a negative prompt, a static adapter and the adapters, as rows and as Markdown.

    Adapters of the same name are trainings with other seeds, reported together and by run. "Seen" is true of adapters
    that were trained on the people of ``train_adapter``. What was counted is kept in ``work``.

    Raises:
        TrainingError, AdapterError: something that is needed is missing, or does not fit the base.
    """
    detector = read_figures(base)["detector"]
    _check_adapters(base, adapters, static)
    baselines = [Method(_BASE), Method(_NEGATIVE, negative_prompt=True)]
    if static is not None:
        baselines.append(Method(_STATIC, adapter=static, everyone=find_level("L5").profile))
    runs = [Method(f"{name}, run {number}", adapter=path) for number, (name, path) in enumerate(adapters)]
    cases = draw_cases(per_cell, PEOPLE, SEED)
    outcomes = draw_all([*baselines, *runs], cases, base, base / DETECTOR, progress, language_models, work)
    together = {method.name: [outcomes[method.name]] for method in baselines}
    for (name, _), run in zip(adapters, runs, strict=True):
        together.setdefault(name, []).append(outcomes[run.name])
    shares = {name: tabulate(found) for name, found in together.items()}
    above = {name: differences(found, outcomes[_BASE]) for name, found in together.items() if name != _BASE}
    parts = (
        to_markdown(shares),
        "Against the base, case by case, in points:\n",
        to_markdown(above, ("kept", "object")),
        f"{detector_line(detector)}\n",
    )
    return {
        "shares": to_json(shares),
        "differences": to_json(above),
        "detector": detector,
        "markdown": "\n".join(parts),
    }


def _check_adapters(base: Path, adapters: Sequence[tuple[str, Path]], static: Path | None) -> None:
    """Refuse at once what would only be found after an hour."""
    reserved = sorted({name for name, _ in adapters} & {_BASE, _NEGATIVE, _STATIC})
    if reserved:
        raise TrainingError(f'"{reserved[0]}" is the name of a baseline. Choose another name for that adapter.')
    sites = find_sites(open_base(base).empty_unet())
    for path in (*(path for _, path in adapters), *([static] if static else [])):
        load_adapter(path).check_sites(sites)


def write_results(results: Mapping[str, Any], output: Path) -> None:
    """Write the rows of results as JSON and the tables as Markdown beside it."""
    rows = {name: value for name, value in results.items() if name != "markdown"}
    with replacing(output) as aside:
        aside.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    with replacing(output.with_suffix(".md")) as aside:
        aside.write_text(results["markdown"], encoding="utf-8")
