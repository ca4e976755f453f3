"""``psa miniature ablation``: which kind, which loss and which user, on the same pairs, for the same number of steps.

Trainings that are there are not made again, and pictures that were counted are not drawn again (those that are compared
with the base's are), so an interrupted ablation goes on where it was, and a variant more costs little but its own time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError
from rich.console import Console
from rich.progress import Progress

from ...safe_files import replacing
from ..base import open_base
from ..config import Section, load_config, read_toml
from ..errors import TrainingError
from . import PEOPLE, SEED
from .adapters import Asked, evaluate, train_adapter, write_results
from .cases import draw_cases
from .evaluation import Outcome, draw_all, studios
from .kept import Kept
from .methods import Method
from .pairs import Style
from .recipe import DETECTOR

# Paul Tol's bright scheme, told apart by people who see colours differently; then other marks and lines as well.
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#888888")
_MARKS = "osD^vPX*"
_LINES = ("-", "--", ":", "-.")  # one round of colours each

PLAN = Path(__file__).with_suffix(".toml")

_CURVES = (
    ("some banned: clean where a banned glyph is asked for", "some", True, "clean"),
    ("some banned: allowed glyphs kept", "some", False, "prompted"),
    ("everything banned: the object is there", "everything", True, "object_kept"),
)


class Variant(Section):
    """What differs from ``configs/miniature.toml``, as ``section.key=value``; and the pairs, see ``Style``."""

    set: tuple[str, ...]
    first_phrases: bool = False


class Ablation(Section):
    """What is trained and measured, see ``ablation.toml``; ``common`` is set for every variant, before its own."""

    steps: PositiveInt
    common: tuple[str, ...] = ()
    seeds: tuple[int, ...] = Field(min_length=1)
    per_cell: PositiveInt
    likeness: NonNegativeInt
    curve: NonNegativeInt
    checkpoints: PositiveInt
    variants: dict[str, Variant] = Field(min_length=1)

    @property
    def checkpoint_every(self) -> int:
        """Steps from one point of the curves to the next."""
        return max(1, self.steps // self.checkpoints)


def load_ablation(path: Path) -> Ablation:
    """Read a plan; raise TrainingError if it is missing or makes no sense."""
    try:
        return Ablation.model_validate(read_toml(path))
    except ValidationError as error:
        raise TrainingError(f"{path} is no plan of an ablation ({error}). See {PLAN.name} for one.") from None


def run_ablation(
    plan: Ablation,
    base: Path,
    work: Path,
    language_models: Sequence[Path],
    output: Path,
    console: Console,
    progress: Progress,
) -> str:
    """Train what is not there yet, measure all of it, write ``output`` (.json, .md and .png), and return the table.

    Raises:
        TrainingError, DataError, EncoderError: see ``train`` and ``evaluate``.
    """
    trained: dict[str, list[Path]] = {name: [] for name in plan.variants}
    for seed in plan.seeds:  # one of each variant first, so that an interrupted ablation can be compared already
        for name, variant in plan.variants.items():
            trained[name].append(_train(name, variant, seed, plan, base, work, console, progress))
    progress.start()  # trainings have bars of their own
    counted = work / "counted"
    asked = Asked(plan.per_cell, seen=False, likeness=plan.likeness)
    flat = [(name, path) for name, paths in trained.items() for path in paths]
    results = evaluate(base, flat, None, asked, language_models, counted, progress)
    curves: Mapping[str, Any] = {}
    if plan.curve:
        checkpoints = {name: _checkpoints(paths[0], plan.checkpoint_every) for name, paths in trained.items()}
        curves = _curves(checkpoints, plan, base, language_models, counted, progress)
        with replacing(output.with_suffix(".png")) as aside:
            _plot(curves).savefig(aside, format="png", dpi=120)
    write_results({**results, "curves": curves}, output)
    return str(results["summary"])


def _train(
    name: str,
    variant: Variant,
    seed: int,
    plan: Ablation,
    base: Path,
    work: Path,
    console: Console,
    progress: Progress,
) -> Path:
    settings = [
        f"run.steps={plan.steps}",
        f"run.seed={seed}",
        f"run.checkpoint_every={plan.checkpoint_every}",
        f"run.checkpoints_total_limit={2 * plan.checkpoints}",  # and those of interruptions
        "validation.grid_every=0",
        *plan.common,
        *variant.set,
    ]
    # Other settings, or another base, are another training, whatever it is called.
    style = Style(first_phrases=variant.first_phrases)
    pairs = (style.name,) if variant.first_phrases else ()
    made_of = repr((load_config(Path("miniature"), settings), open_base(base).fingerprint("unet"), *pairs))
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    run = f"{slug}-{seed}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"
    folder = work / "ablation" / run
    target = folder / f"{run}_miniature.safetensors"
    if not target.is_file():
        going_on = ["run.resume=latest"] if any(folder.glob("checkpoints/step-*")) else []
        console.print(f"{name}, seed {seed}", markup=False)
        train_adapter(base, work, style, f"ablation/{run}", [*settings, *going_on], console, progress)
    return target


def _checkpoints(adapter: Path, every: int) -> dict[int, Path]:
    """Return the adapters that a training wrote on its way, by their step."""
    found = sorted((adapter.parent / "checkpoints").glob("step-*/adapter.safetensors"))
    steps = {path.parent.name.removeprefix("step-"): path for path in found}
    return {int(step): path for step, path in steps.items() if step.isdigit() and int(step) % every == 0}


def _curves(
    checkpoints: Mapping[str, Mapping[int, Path]],
    plan: Ablation,
    base: Path,
    language_models: Sequence[Path],
    work: Path,
    progress: Progress,
) -> dict[str, list[dict[str, float]]]:
    """Return for each variant a row for each step: what is in pictures of people of the training."""
    cases = [case for case in draw_cases(plan.curve, PEOPLE, SEED, trial=1) if not case.unseen and case.category]
    methods = [
        Method(f"{name}, step {step}", adapter=path)
        for name, paths in checkpoints.items()
        for step, path in paths.items()
    ]
    detector = base / DETECTOR
    with studios(base, detector, language_models) as crew:
        seen = draw_all(crew, methods, cases, progress, Kept(work, base, detector))

    def row(step: int, outcomes: Sequence[Outcome]) -> dict[str, float]:
        found = {"step": float(step)}
        for title, group, banned, measure in _CURVES:
            values = [
                getattr(outcome, measure)
                for outcome in outcomes
                if outcome.case.group == group and outcome.case.banned == banned
            ]
            found[title] = sum(values) / len(values)
        return found

    return {name: [row(step, seen[f"{name}, step {step}"]) for step in paths] for name, paths in checkpoints.items()}


def _plot(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(12, 4.5), layout="constrained")
    for axes, (title, *_) in zip(figure.subplots(1, len(_CURVES), sharey=True), _CURVES, strict=True):
        for number, (name, rows) in enumerate(curves.items()):
            rounds, place = divmod(number, len(_COLOURS))
            colour, mark, line = _COLOURS[place], _MARKS[number % len(_MARKS)], _LINES[rounds % len(_LINES)]
            steps, values = [row["step"] for row in rows], [row[title] for row in rows]
            axes.plot(steps, values, color=colour, marker=mark, markersize=4, linestyle=line, linewidth=1.3, label=name)
        axes.set(title=title, xlabel="step", ylim=(-0.02, 1.02))
        axes.title.set_size(9)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure
