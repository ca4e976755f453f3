"""Adapters for the miniature: trained with this package's trainer, and measured against what else could be done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ...adapter import find_sites, load_adapter
from ...profiles import find_level
from ...safe_files import DAMAGE, replacing
from ..base import open_base
from ..config import load_config
from ..errors import DataError, TrainingError
from ..train import train
from . import PAIRS, PEOPLE, SEED
from .cases import draw_cases
from .evaluation import compare_all, draw_all, studios
from .kept import Kept
from .methods import BASE, NEGATIVE_PROMPT, Method
from .pairs import DRAWN, Style, described, draw_folder
from .recipe import DETECTOR, read_figures
from .results import (
    LIKENESS,
    Table,
    detector_line,
    differences,
    summarise,
    tabulate,
    tabulate_likeness,
    tabulate_phrases,
    to_json,
    to_markdown,
)

_STATIC = "static"


@dataclass(frozen=True)
class Asked:
    """What adapters are asked: pictures in each cell, at which strengths, of seen people, unseen ones or both.

    ``likeness`` is the number of pictures in each cell that are compared with the base's; 0 for none. ``trial``: see
    ``draw_cases``.
    """

    per_cell: int = 300
    strengths: tuple[float, ...] = (1.0,)
    seen: bool = True
    unseen: bool = True
    likeness: int = 0
    trial: int = 0


def train_adapter(
    base: Path,
    work: Path,
    style: Style,
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
    name = name or style.name
    pairs = work / f"{style.name}-pairs"
    if not pairs.is_dir():
        draw_folder(pairs, PAIRS, PEOPLE, SEED, style, progress)
    _check_pairs(pairs, style)
    progress.stop()  # the training has bars of its own
    settings = (
        f"model.base={base}",
        f"data.train={pairs}",
        f"data.cache={work / 'cache'}",
        f"run.output={work / name}",
        f"adapter.name={Path(name).name}_miniature",
    )
    return train(load_config(Path("miniature"), (*settings, *overrides)), console)


def _check_pairs(folder: Path, style: Style) -> None:
    expected = described(PAIRS, PEOPLE, SEED, style)
    try:
        found = json.loads((folder / DRAWN).read_text(encoding="utf-8"))
    except DAMAGE:
        found = None
    if found != expected:
        raise DataError(
            f"{folder} holds other pairs than the miniature's ({folder / DRAWN} should say {json.dumps(expected)}; "
            "pairs that an earlier version drew have no such file). Delete it to have them drawn, name another one "
            "with --work, or use `psa train` for pairs of your own."
        )


def evaluate(
    base: Path,
    adapters: Sequence[tuple[str, Path]],
    static: Path | None,
    asked: Asked,
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
    if not (asked.seen or asked.unseen):
        raise TrainingError("Neither seen nor unseen people are to be asked. Leave out --no-seen or --no-unseen.")
    methods = {method.name: [method] for method in (BASE, NEGATIVE_PROMPT)}
    if static is not None:
        methods[_STATIC] = [Method(_STATIC, adapter=static, everyone=find_level("L5").profile)]
    for number, ((name, path), strength) in enumerate(product(adapters, asked.strengths)):
        title = name if len(asked.strengths) == 1 else f"{name}, strength {strength:g}"
        methods.setdefault(title, []).append(Method(f"{title}, run {number}", adapter=path, strength=strength))
    runs = [run for together in methods.values() for run in together]
    drawn_cases = draw_cases(asked.per_cell, PEOPLE, SEED, asked.trial)
    cases = [case for case in drawn_cases if (asked.seen, asked.unseen)[case.unseen]]
    compared_cases = draw_cases(asked.likeness, PEOPLE, SEED, asked.trial)
    free = [case for case in compared_cases if case.unseen == asked.unseen and not case.banned]
    with studios(base, base / DETECTOR, language_models) as crew:
        drawn = draw_all(crew, runs, cases, progress, Kept(work, base, base / DETECTOR))
        compared = compare_all(crew, runs, free, progress) if free else {}
    outcomes = {name: [drawn[run.name] for run in together] for name, together in methods.items()}
    shares = {name: tabulate(found) for name, found in outcomes.items()}
    phrases = {name: tabulate_phrases(found) for name, found in outcomes.items()}
    above = {name: differences(found, drawn[BASE.name]) for name, found in outcomes.items() if name != BASE.name}
    alike: dict[str, Table] = {}
    if free:
        alike = {
            name: tabulate_likeness([compared[run.name] for run in together], free)
            for name, together in methods.items()
        }
    summary = summarise(shares, alike) if asked.unseen else ""  # it is about unseen people
    parts = (
        *((summary,) if summary else ()),
        to_markdown(shares),
        "Against the base, case by case, in points:\n",
        to_markdown(above, ("kept", "object")),
        "By the phrase that implies; pairs drawn with `--first-phrases` have no second one:\n",
        to_markdown(phrases, ("clean", "kept")),
        *_likeness_part(alike),
        f"{detector_line(detector)}\n",
        *(
            [f"Trial {asked.trial}: other unseen people, prompts and noise than those of trial 0.\n"]
            if asked.trial
            else []
        ),
    )
    return {
        "shares": to_json(shares),
        "differences": to_json(above),
        "phrases": to_json(phrases),
        "likeness": to_json(alike),
        "detector": detector,
        "trial": asked.trial,
        "summary": summary,
        "markdown": "\n".join(parts),
    }


def _likeness_part(alike: Mapping[str, Table]) -> tuple[str, ...]:
    if not alike:
        return ()
    title = "How alike pictures are to the base's where nothing banned is asked for (SSIM; 100 is the same picture):\n"
    return title, to_markdown(alike, (LIKENESS,))


def _check_adapters(base: Path, adapters: Sequence[tuple[str, Path]], static: Path | None) -> None:
    """Refuse at once what would only be found after an hour."""
    reserved = sorted({name for name, _ in adapters} & {BASE.name, NEGATIVE_PROMPT.name, _STATIC})
    if reserved:
        raise TrainingError(f'"{reserved[0]}" is the name of a baseline. Choose another name for that adapter.')
    sites = find_sites(open_base(base).empty_unet())
    for path in (*(path for _, path in adapters), *([static] if static else [])):
        load_adapter(path).check_sites(sites)


def write_results(results: Mapping[str, Any], output: Path) -> None:
    """Write the rows of results as JSON and the tables as Markdown beside it."""
    rows = {name: value for name, value in results.items() if name not in ("summary", "markdown")}
    with replacing(output) as aside:
        aside.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    with replacing(output.with_suffix(".md")) as aside:
        aside.write_text(results["markdown"], encoding="utf-8")
