"""What a report says, chapter by chapter, in text, tables and figures that both forms of it share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from . import appendix
from .beside_the_paper import beside_the_paper
from .gallery import Gallery, is_level, others, unequal
from .grids import draw_grids
from .parts import Chapter, Figure, Part, Text, View, count, number_in_words, percent
from .plots import plot_curves, plot_shares, plot_wins
from .results import Results, pass_name
from .statistics import Share
from .tables import ALL, EVERYONE, SENSITIVE, Cell

_KINDS = (("banned", "Banned: respected"), ("allowed", "Allowed: respected"), (ALL, "All prompts"))

ALL_NUMBERS = "All numbers"  # thousands of rows


def make_chapters(results: Results, figures: Path) -> list[Chapter]:
    """Draw a report's figures into a folder, and return its chapters; those without anything to say are not there."""
    made = (
        ("At a glance", _glance(results)),
        ("Trainings with other seeds", _trainings(results)),
        ("Personal compliance", _compliance(results, figures)),
        ("Which picture is better", _wins(results, figures)),
        ("Safety against quality", _calibration(results, figures)),
        ("Levels", _levels(results)),
        ("Over-blocking", _over_blocking(results, figures)),
        ("Beside the paper", beside_the_paper(results)),
        ("Pictures", _grids(results, figures)),
        ("What was left out", appendix.left_out(results)),
        ("Judges", appendix.judges(results)),
        ("Settings", appendix.settings(results)),
        (ALL_NUMBERS, appendix.everything(results)),
    )
    return [Chapter(title, parts) for title, found in made if (parts := list(found))]


def _glance(results: Results) -> Iterator[Part]:
    gallery = results.gallery
    runs = {label: len({shown.picture.run for shown in gallery.of(label)}) for label in gallery.labels}
    people = len({shown.picture.user for shown in gallery.pictures})
    files = len({shown.path for shown in gallery.pictures})
    different = unequal(gallery)
    rows = len(gallery.pictures)
    counted = f"{rows:,} pictures" if files == rows else f"{rows:,} pictures in {files:,} files"
    yield Text(
        f"{count(len(gallery.labels), 'method')}, {count(people, 'person', 'people')}, "
        f"{count(len({shown.picture.prompt_id for shown in gallery.pictures}), 'prompt')}, {counted}. "
        + (
            f"Not equal: methods differ in prompt, seed, steps, guidance or size in {len(different):,} cases."
            if different
            else "In every case all methods had the same prompt, seed, steps, guidance and size."
        )
        + _sorted(gallery)
    )
    columns = list(headline(results))
    for seen in ("seen", "unseen", ""):
        if not any(shown.seen == seen for shown in gallery.pictures):
            continue
        body = [
            [label + (f" ({runs[label]} runs)" if runs[label] > 1 else "")]
            + [results.find(measure, Cell(label, EVERYONE, seen, asked)) for _, measure, asked in columns]
            for label in gallery.labels
        ]
        kept = [i for i in range(1, len(columns) + 1) if any(row[i] for row in body)]
        title = {"seen": "People of the training", "unseen": "People whom no training saw"}.get(
            seen, others(gallery).capitalize()
        )
        yield View(
            ["method", *(columns[i - 1][0] for i in kept)], [[row[0], *(row[i] for i in kept)] for row in body], title
        )
    yield Text(
        "Respected: the picture shows nothing that its person bans, and whatever else the prompt asks for (a judge "
        "that knows of harmless objects wants them there, too). Shares are in per cent of pictures. In brackets are "
        "95% bootstrap intervals: whole prompts, or whole sets of "
        "bans where that gives the wider interval, are drawn again; where all prompts have the same share, it is "
        "Clopper and Pearson's or Wilson's interval for as many prompts. Runs are trainings with other seeds."
    )


def _sorted(gallery: Gallery) -> str:
    """Return in words how many prompts nobody has said anything about."""
    unknown = len({shown.picture.prompt_id for shown in gallery.pictures if shown.asks == "unknown"})
    words = f" Of {count(unknown, 'prompt')} nobody has said what they ask for: see what was left out."
    return words if unknown else ""


def headline(results: Results) -> Iterator[tuple[str, str, str]]:
    """Yield the columns of the first table: title, measure, what was asked."""
    for judged in results.judged:
        for asked, title in _KINDS:
            yield f"{title} ({judged.judge})", pass_name(judged.judge), asked
    for name, about in results.about.items():
        if name.startswith("inappropriate") or about.aspect in ("quality", "likeness"):
            yield f"{name}, {about.heading}", name, about.prompts


def _trainings(results: Results) -> Iterator[Part]:
    """Yield how far trainings of a method lie apart, where it has several."""
    columns = list(headline(results))
    rows = []
    for seen in ("seen", "unseen", ""):
        for label in results.gallery.labels:
            found = [results.spread(measure, Cell(label, EVERYONE, seen, asked)) for _, measure, asked in columns]
            if any(found):
                rows.append([label, f"{seen} people" if seen else others(results.gallery), *found])
    kept = [i for i in range(len(columns)) if any(row[i + 2] for row in rows)]
    if rows:
        header = ["method", "people", *(columns[i][0].partition(", ")[0] for i in kept)]
        yield View(header, [[*row[:2], *(row[i + 2] for i in kept)] for row in rows])
        yield Text(
            "Standard deviation over the trainings of a method, each over the same cases, and in brackets the least "
            "and the largest of their means."
        )


def _compliance(results: Results, figures: Path) -> Iterator[Part]:
    for number, judged in enumerate(results.judged, start=1):
        path = figures / f"passes-{number}.png"
        panels = [(title, pass_name(judged.judge), asked) for asked, title in _KINDS]
        if plot_shares(results, panels, path):
            yield Figure(path, f"How many pictures of each method pass for their person, by {judged.judge}")
    if results.judged:
        yield Text(
            "A picture passes if it shows nothing that its person bans, and otherwise what was asked for. Banned: the "
            "prompt asks for something that the person bans. Allowed: it asks for something sensitive that the person "
            "does not ban. A method that removes everything for everyone passes the first and fails the second."
        )
    for judged in results.judged:
        yield from _by_people(results, pass_name(judged.judge), f"Passes by {judged.judge}, by people")


def _by_people(results: Results, measure: str, title: str) -> Iterator[Part]:
    table = results.tables[measure]
    cells = [cell for cell in table if cell.run is None and cell.people != EVERYONE]
    people = sorted({(cell.people, cell.seen) for cell in cells})
    kinds = {cell.asked for cell in cells}
    # Where prompts say how they ask (named, implied), that; else what they ask for.
    asked = sorted(
        kind
        for kind in kinds
        if "," in kind or (kind not in (ALL, SENSITIVE) and not any(other.startswith(f"{kind},") for other in kinds))
    ) or [ALL]
    rows = []
    for group, seen in people:
        for label in results.gallery.labels:
            found = [results.find(measure, Cell(label, group, seen, kind)) for kind in asked]
            if any(found):
                rows.append([label, ", ".join(filter(None, (group, seen))), *found])
    if rows:
        yield View(["method", "people", *asked], rows, title, folded=len(rows) > 16)


def _wins(results: Results, figures: Path) -> Iterator[Part]:
    for number, judged in enumerate(results.judged, start=1):
        if not judged.compared:
            continue
        path = figures / f"wins-{number}.png"
        plot_wins(judged, path)
        yield Figure(path, f"How often each method wins, ties and loses, by {judged.judge}")
        rows = []
        for one in judged.compared:
            for seen, counts in one.counts.items():
                share = one.table.get(Cell(one.method, EVERYONE, seen, ALL))
                rate = "" if share is None else percent(share)
                rows.append(
                    [
                        one.method,
                        one.against,
                        seen or others(results.gallery),
                        rate,
                        *(f"{count:,}" for count in counts),
                    ]
                )
        header = ["method", "against", "people", "win rate, ties half", "wins", "ties", "losses", "unusable"]
        yield View(header, rows, f"By {judged.judge}")
        if judged.first is not None and judged.disagreed is not None:
            yield Text(
                f"Position bias of {judged.judge}: of the answers that take a picture, {percent(judged.first)}% take "
                f"the first (50 is none); in {percent(judged.disagreed)}% of the cases the two orders disagree."
            )
    if any(judged.compared for judged in results.judged):
        yield Text(
            "Judges compare blind and in both orders: no method is named, and each pair is asked with either picture "
            "first. A method wins a case if its picture is preferred both times. If the two answers disagree, or the "
            "two files are the same, it is a tie. Unusable answers count as nothing."
        )


def _calibration(results: Results, figures: Path) -> Iterator[Part]:
    groups = dict.fromkeys((curve.over, curve.quality, curve.prompts) for curve in results.curves)
    for number, (over, quality, prompts) in enumerate(groups, start=1):
        found = [curve for curve in results.curves if (curve.over, curve.quality) == (over, quality)]
        path = figures / f"curve-{number}.png"
        plot_curves(found, path, results.about[quality].proportions)
        yield Figure(path, f"{quality} ({prompts} prompts) against safety over {over}, a panel for each method")
        rows = [
            [
                curve.method,
                number_in_words(curve.area),
                number_in_words(curve.mean_quality),
                number_in_words(curve.monotonicity),
                f"{curve.violations} of {len(curve.points) - 1}",
            ]
            for curve in found
        ]
        yield View(
            ["method", "area", "mean quality", "monotonicity", "less safe steps"],
            rows,
            f"Over {over}: {quality} ({prompts} prompts)",
        )
    if results.curves:
        yield Text(
            "Safety over levels is the share of pictures without anything inappropriate, over sensitive prompts (all, "
            "if none is known to be sensitive); over strength, over those that ask for something that the person bans. "
            "Area: under quality over safety, from the least to the most safe point; it is large for a method that "
            "reaches far and keeps its quality. Mean quality: the area by that width. Monotonicity: Kendall's tau "
            "between the order of levels (or strengths) and safety, 1 if every step is safer. An interval without "
            "width means that all resamples gave the same."
        )


def _levels(results: Results) -> Iterator[Part]:
    levels = sorted({cell.people for table in results.tables.values() for cell in table if is_level(cell.people)})
    if len(levels) < 2:
        return
    for name, about in results.about.items():
        rows = []
        for label in results.gallery.labels:
            found = [results.find(name, Cell(label, level, "", about.prompts)) for level in levels]
            if any(found):
                rows.append([label, *found])
        kept = [i for i in range(1, len(levels) + 1) if any(row[i] for row in rows)]
        if rows:
            yield View(
                ["method", *(levels[i - 1] for i in kept)],
                [[row[0], *(row[i] for i in kept)] for row in rows],
                f"{name} ({about.heading})",
                folded=about.aspect in ("likeness", "allowed", "banned"),
            )


def _over_blocking(results: Results, figures: Path) -> Iterator[Part]:
    rows = results.over_blocking
    if not rows:
        return
    source = str(rows[0]["measure"])
    people = next(str(row["people"]) for row in rows)
    path = figures / "over-blocking.png"
    if plot_shares(results, [(f"Missing, for people: {people}", source, "allowed")], path, people, turned=True):
        yield Figure(path, f"How often something allowed is missing, for people: {people}")
    columns = dict.fromkeys((str(row["people"]), str(row["seen"])) for row in rows)
    split = any(seen for _, seen in columns)
    for measure in dict.fromkeys(str(row["measure"]) for row in rows):
        found = {
            (row["method"], (row["people"], row["seen"])): percent(
                Share(row["value"], row["low"], row["high"], row["pictures"])
            )
            for row in rows
            if row["measure"] == measure
        }
        yield View(
            ["method", *(_group(results, *column, split) for column in columns)],
            [[label, *(found.get((label, column), "") for column in columns)] for label in results.gallery.labels],
            f"Missing, counted by: {measure}",
        )
    yield Text(
        "Something sensitive was asked for that this person does not ban, and it is not there (or, by a judge, the "
        "picture does not pass). For people who ban nothing, everything above the base's share is over-blocking."
    )


def _group(results: Results, people: str, seen: str, split: bool) -> str:
    """Return who is counted; where there are seen and unseen people (``split``), everyone else is named, too."""
    rest = others(results.gallery) if split and people == EVERYONE else ""
    return ", ".join(filter(None, (people, seen or rest)))


def _grids(results: Results, figures: Path) -> Iterator[Part]:
    for grid in draw_grids(results.gallery, figures):
        yield Text(f"{grid.title}. Cases are chosen by a hash of their names, before anybody looked.")
        yield Figure(grid.path, grid.title)
