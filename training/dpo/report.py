"""``training_report.md``: what a run did, as curves, tables and pictures, with how to read them.

Written from ``metrics.jsonl`` alone, so it is the same for an interrupted run. It knows no users, only counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...safe_files import replacing
from ..config import TrainConfig
from ..errors import TrainingError
from .metrics import METRICS, QUARTERS, read_metrics
from .plan import to_toml

REPORT = "training_report.md"
PLOTS = "report"
GRIDS = "grids"

_TRAINING, _GREEN, _RED = "#4477aa", "#228833", "#cc6677"
_SPLITS = {"": ("training", _TRAINING), "seen/": ("held-out pairs", _GREEN), "unseen/": ("unseen users", _RED)}
_FEW = 40  # points; so many are drawn as dots

Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One pair of axes: the curves ``{metric: (label, colour)}``, and a dashed line with its meaning, if any.

    ``noisy`` curves get a running mean if they have many points.
    """

    title: str
    curves: Mapping[str, tuple[str, str]]
    mark: tuple[float, str] | None = None
    noisy: bool = True
    log: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class Chapter:
    """A picture of some panels, and how to read it."""

    name: str
    title: str
    panels: tuple[Panel, ...]
    reading: str


def write_report(output: Path, config: TrainConfig, facts: Mapping[str, str]) -> Path:
    """Write ``training_report.md`` and its plots into ``output``, and return its path.

    ``facts`` are shown as they are: numbers of pairs and users, the base, devices; nothing about any one user.

    Raises:
        TrainingError: the files cannot be written; an earlier report is as it was.
    """
    lines = read_metrics(output)
    try:
        (output / PLOTS).mkdir(parents=True, exist_ok=True)
        chapters = [chapter for chapter in _chapters(config) if _plot(output, chapter, lines)]
        with replacing(output / REPORT) as aside:
            aside.write_text("\n".join(_report(output, config, facts, lines, chapters)) + "\n", encoding="utf-8")
    except OSError as error:
        raise TrainingError(
            f"The report cannot be written to {output} ({error}). Make room there, or make the folder writable; "
            f"{METRICS} holds all of its numbers."
        ) from None
    return output / REPORT


def _report(
    output: Path, config: TrainConfig, facts: Mapping[str, str], lines: Lines, chapters: Sequence[Chapter]
) -> Iterator[str]:
    yield f"# Training report: {config.adapter.name}\n"
    yield f"{_summary(config, lines)}\n"
    if facts:
        yield from _table(("", ""), facts.items())
    yield from _grids(output)
    for chapter in chapters:
        yield f"## {chapter.title}\n"
        yield f"![{chapter.title}]({PLOTS}/{chapter.name}.png)\n"
        yield f"{chapter.reading}\n"
    if lines:
        yield "## First and last values\n"
        yield from _table(("metric", "first", "at step", "last", "at step"), _first_and_last(lines))
    yield "## Configuration\n"
    yield f"```toml\n{to_toml(config)}```"


def _summary(config: TrainConfig, lines: Lines) -> str:
    if not lines:
        return (
            f"**Nothing was logged:** `{METRICS}` is missing or empty, so there are no curves. A run writes its first "
            f"line when it is validated before step 1, and then every {config.tracking.every} steps and at its end."
        )
    step, steps = lines[-1]["step"], config.run.steps
    done = f"All {steps:,} steps were done" if step >= steps else f"Logged up to step {step:,} of {steps:,}"
    return f"{done}. Judge an adapter by its pictures; the curves only tell whether the optimisation is in order."


def _grids(output: Path) -> Iterator[str]:
    paths = sorted((output / GRIDS).glob("step-*.png"))
    if not paths:
        return
    yield "## Pictures\n"
    yield f"![The last grid]({GRIDS}/{paths[-1].name})\n"
    links = ", ".join(f"[{int(path.stem.removeprefix('step-')):,}]({GRIDS}/{path.name})" for path in paths)
    yield f"Step {links}.\n"
    yield (
        "Rows are prompts, columns users, and all pictures of a row start from the same noise. Users who ban what a "
        "prompt shows should part from `base`; harmless prompts should look alike in all columns. If every column "
        "changes in the same way, the adapter has learned a style and not its users.\n"
    )


def _first_and_last(lines: Lines) -> Iterator[tuple[str, ...]]:
    points: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step":
                points.setdefault(name, []).append((line["step"], value))
    for name, found in sorted(points.items(), key=lambda item: (item[0].startswith(tuple(filter(None, _SPLITS))),)):
        (first_step, first), (last_step, last) = found[0], found[-1]
        yield f"`{name}`", f"{first:.4g}", f"{first_step:,}", f"{last:.4g}", f"{last_step:,}"


def _table(header: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|---" * len(header) + "|"
    for row in rows:
        yield "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |"
    yield ""


def _chapters(config: TrainConfig) -> tuple[Chapter, ...]:
    quarters = tuple(
        Panel(
            f"Quarter {i}" + {1: " (little noise)", QUARTERS: " (almost only noise)"}.get(i, ""),
            {
                f"chosen_error/quarter{i}": ("chosen", _GREEN),
                f"rejected_error/quarter{i}": ("rejected", _RED),
            },
            (0.0, "reference"),
        )
        for i in range(1, QUARTERS + 1)
    )
    return (
        Chapter(
            "loss",
            "Loss, implicit accuracy and margin",
            (
                Panel("Loss", _by_split("loss"), (math.log(2), "ln 2")),
                Panel("Implicit accuracy", _by_split("implicit_accuracy"), (0.5, "chance")),
                Panel("Margin", _by_split("margin"), (0.0, "reference")),
                Panel("Anchor", _by_split("anchor"), (0.0, "reference")),
                Panel("Deviation where allowed", _by_split("deviation"), (0.0, "reference"), from_zero=True),
            ),
            "The loss starts at ln 2 = 0.693, the value of an adapter that does nothing, and falls slowly under much "
            "noise. Held-out pairs should follow the training curve; where they turn upwards, the run is too long. "
            "Unseen users may lie above them; a gap that keeps growing means that the adapter learns its users by "
            "heart. The margin grows without bound. Sudden jumps, or a loss that stays above ln 2, mean that "
            "`optimizer.learning_rate` or `loss.beta` is too high. **Implicit accuracy says nothing about the "
            "pictures**: it was about the same in runs that did what their users wanted and in runs that did not. It "
            "only has to leave 0.5. The anchor is there with `loss.winner_anchor`: chosen images should not get worse "
            "than in the base, so it belongs near 0 or below. The deviation is there with `loss.fidelity`: how far "
            "predictions for what users allow are from the base's, as a mean square. It rises at first and then falls; "
            "the other curves are then of pairs that are preferences.",
        ),
        Chapter(
            "errors",
            "Denoising errors against the base model, by timestep",
            quarters,
            "Errors with the adapter less those without it; 0 is the base model. Chosen should fall below rejected. "
            "Best is chosen below 0. If both rise and rejected only rises faster, the adapter wins its comparisons by "
            "ruining pictures: lower `optimizer.learning_rate`, or use an earlier checkpoint. What a picture shows is "
            "mostly decided in quarters 3 and 4.",
        ),
        Chapter(
            "optimizer",
            "Optimizer and weights",
            (
                Panel(
                    "Gradient norm",
                    {"gradient_norm": ("before clipping", _TRAINING)},
                    (config.optimizer.max_grad_norm, "clipped above"),
                    log=True,
                ),
                Panel("Learning rate", {"learning_rate": ("learning rate", _TRAINING)}, noisy=False),
                Panel("Norm of the projection", {"adapter/projection_norm": ("projection", _TRAINING)}, noisy=False),
                Panel("Norm of the user values", {"adapter/values_norm": ("values", _TRAINING)}, noisy=False),
            ),
            "The norm of the user values starts at 0 and grows steadily; a straight line that never bends has not "
            "converged yet. The projection moves little. A gradient norm that is always above the clipping line makes "
            "every step equally long; single peaks are harmless.",
        ),
        Chapter(
            "speed",
            "Speed and memory",
            (
                Panel("Pairs per second, all devices", {"pairs_per_second": ("pairs", _TRAINING)}, from_zero=True),
                Panel("Peak GPU memory (GB)", {"gpu_memory_gb": ("memory", _TRAINING)}, noisy=False, from_zero=True),
            ),
            "Both should be flat. Checkpoints, validation and grids do not count into the speed: dips are other work.",
        ),
    )


def _by_split(metric: str) -> dict[str, tuple[str, str]]:
    return {f"{prefix}{metric}": style for prefix, style in _SPLITS.items()}


def _plot(output: Path, chapter: Chapter, lines: Lines) -> bool:
    """Draw what there are numbers for; return False, and draw nothing, if there are none."""
    panels = [panel for panel in chapter.panels if any(name in line for line in lines for name in panel.curves)]
    if not panels:
        return False
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows), dpi=110, layout="constrained")
    for place, panel in enumerate(panels, start=1):
        _draw(figure.add_subplot(rows, columns, place), panel, lines)
    with replacing(output / PLOTS / f"{chapter.name}.png") as aside:
        figure.savefig(aside, format="png")
    return True


def _draw(axes: Axes, panel: Panel, lines: Lines) -> None:
    for name, (label, colour) in panel.curves.items():
        steps = [line["step"] for line in lines if name in line]
        values = [line[name] for line in lines if name in line]
        if len(steps) <= _FEW:
            axes.plot(steps, values, color=colour, label=label if steps else None, marker="o", markersize=3.5)
        elif panel.noisy:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, _running_mean(values), color=colour, label=label)
        else:
            axes.plot(steps, values, color=colour, label=label)
    if panel.mark is not None:
        axes.axhline(panel.mark[0], color="#888888", linestyle="--", linewidth=1, label=panel.mark[1])
    if panel.log:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=8.5, frameon=False)


def _running_mean(values: Sequence[float]) -> list[float]:
    """The mean over a 25th of all values to each side of every one, as far as there are that many."""
    reach = max(len(values) // 25, 1)
    windows = (values[max(i - reach, 0) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
