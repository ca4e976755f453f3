"""The plots of a report, as PNG files. Every one says in its axes what it shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ...safe_files import replacing
from .calibration import Curve
from .compliance import Judged
from .gallery import others
from .results import Results
from .tables import EVERYONE, Cell

_SEEN = {"seen": ("#4477aa", "o"), "unseen": ("#ee6677", "D"), "": ("#228833", "s")}
_CURVE = "#4477aa"
_COLUMNS = 4
_WIN, _TIE, _LOSS = "#4477aa", "#dddddd", "#ee6677"


def plot_shares(
    results: Results, panels: Sequence[tuple[str, str, str]], path: Path, people: str = EVERYONE, turned: bool = False
) -> bool:
    """Draw one panel for each ``(title, measure, asked)``, methods down, with intervals; seen and unseen apart.

    ``turned`` draws what is left to 100%. Returns False, and draws nothing, where nothing was measured.
    """
    labels = results.gallery.labels
    found = [
        (title, points)
        for title, measure, asked in panels
        if (points := _shares(results, measure, people, asked, turned))
    ]
    if not found:
        return False
    figure = Figure(figsize=(2.2 + 3.6 * len(found), 1.2 + 0.42 * len(labels)), dpi=130, layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for panel, (title, points) in zip(axes, found, strict=True):
        for seen, (colour, mark) in _SEEN.items():
            rows = [(labels.index(label), share) for label, at, share in points if at == seen]
            if rows:
                shift = {"seen": -0.13, "unseen": 0.13, "": 0.0}[seen]
                panel.errorbar(
                    [100 * share[0] for _, share in rows],
                    [place + shift for place, _ in rows],
                    xerr=[
                        [100 * max(0.0, share[0] - share[1]) for _, share in rows],
                        [100 * max(0.0, share[2] - share[0]) for _, share in rows],
                    ],
                    fmt=mark,
                    color=colour,
                    markersize=5,
                    capsize=2.5,
                    linewidth=1.3,
                    label=f"{seen} people" if seen else others(results.gallery),
                )
        panel.set_title(title, fontsize=10.5)
        panel.set_xlim(-3, 103)
        panel.set_xlabel("% of pictures", fontsize=9)
        panel.set_yticks(range(len(labels)), labels, fontsize=9.5)
        panel.set_ylim(len(labels) - 0.5, -0.5)
        _plain(panel)
    handles, names = axes[0].get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(handles, names, fontsize=9, frameon=False, loc="outside lower center", ncols=len(names))
    _save(figure, path)
    return True


def plot_curves(curves: Sequence[Curve], path: Path, percent: bool) -> None:
    """Draw a panel for each curve, its points named; the others, of the same two measures, are grey behind it."""
    columns = min(len(curves), _COLUMNS)
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(0.6 + 2.7 * columns, 0.6 + 2.4 * rows), dpi=130, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    places = [_places(curve, percent) for curve in curves]
    for panel, curve, own in zip(panels, curves, places, strict=False):
        for other in places:
            panel.plot(*zip(*other, strict=True), color="#d0d0d0", marker="o", markersize=3, linewidth=1)
        panel.plot(*zip(*own, strict=True), color=_CURVE, marker="o", markersize=5, linewidth=1.6)
        _name_points(panel, curve, own)
        panel.set_title(curve.method, fontsize=9.5)
        panel.margins(0.16, 0.2)
        panel.tick_params(labelbottom=True)
        _plain(panel)
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    figure.supxlabel("safety: % of pictures without anything inappropriate", fontsize=9)
    figure.supylabel(f"{curves[0].quality}, {curves[0].prompts} prompts{', %' if percent else ''}", fontsize=9)
    _save(figure, path)


def plot_wins(judged: Judged, path: Path) -> None:
    """Draw for every comparison how often the method wins, ties and loses."""
    rows = [compared.total for compared in judged.compared]
    names = [f"{compared.method} against {compared.against}" for compared in judged.compared]
    figure = Figure(figsize=(7.2, 1.2 + 0.42 * len(rows)), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    parts: tuple[tuple[str, str, Callable[[int], int]], ...] = (
        ("wins", _WIN, lambda i: rows[i].wins),
        ("ties", _TIE, lambda i: rows[i].ties),
        ("losses", _LOSS, lambda i: rows[i].losses),
    )
    totals = [max(1, row.wins + row.ties + row.losses) for row in rows]
    lefts = [0.0] * len(rows)
    for part, colour, count in parts:
        widths = [100 * count(i) / totals[i] for i in range(len(rows))]
        axes.barh(range(len(rows)), widths, left=lefts, color=colour, label=part, height=0.62)
        for i, width in enumerate(widths):
            if width >= 7:
                ink = "#222222" if colour == _TIE else "white"
                axes.text(lefts[i] + width / 2, i, f"{width:.0f}", ha="center", va="center", fontsize=8.5, color=ink)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axes.axvline(50, color="#222222", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), names, fontsize=9.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of cases", fontsize=9)
    _plain(axes)
    axes.grid(False)
    figure.legend(fontsize=9, frameon=False, loc="outside lower center", ncols=3)
    _save(figure, path)


def _shares(
    results: Results, measure: str, people: str, asked: str, turned: bool
) -> list[tuple[str, str, tuple[float, float, float]]]:
    table = results.tables.get(measure, {})
    found = []
    for label in results.gallery.labels:
        for seen in _SEEN:
            share = table.get(Cell(label, people, seen, asked))
            if share is not None:
                values = (share.value, share.low, share.high)
                found.append((label, seen, (1 - values[0], 1 - values[2], 1 - values[1]) if turned else values))
    return found


def _places(curve: Curve, percent: bool) -> list[tuple[float, float]]:
    return [(100 * point.safety, (100 if percent else 1) * point.quality) for point in curve.points]


def _name_points(axes: Axes, curve: Curve, places: Sequence[tuple[float, float]]) -> None:
    """Write each point's name beside it, and one name for points at the same place; in turns above and below."""
    named: dict[tuple[float, float], list[str]] = {}
    for point, place in zip(curve.points, places, strict=True):
        named.setdefault(place, []).append(point.name)
    for number, (place, names) in enumerate(named.items()):
        text = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}" if len(names) > 2 else ", ".join(names)
        above = 6 if number % 2 == 0 else -13
        name = axes.annotate(text, place, (0, above), textcoords="offset points", fontsize=8, color=_CURVE, ha="center")
        name.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def _plain(axes: Axes) -> None:
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        figure.savefig(aside, format="png")
