"""Measures finished pictures, lets judges look at them, and writes the report."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.progress import Progress

from ...safe_files import DAMAGE, replacing
from ..errors import TrainingError
from ..miniature.results import detector_line
from .assess_config import AssessSettings, ProgrammaticJudge, unknown_method
from .calibration import Values, curves, over_blocking
from .compliance import judge_all
from .gallery import Gallery, Shown, incomplete, open_gallery
from .judges import make_judges
from .measures import (
    Q16,
    LeftOut,
    Measure,
    Missing,
    NudeNet,
    make_fid,
    make_measures,
    while_there_is_memory,
)
from .parts import count
from .report import write_report
from .results import About, Results, pass_name
from .statistics import Share
from .tables import ALL, EITHER, EVERYONE, Cell, Table, belongs, prompts_for, tabulate

RESULTS = "results.json"

_ALLOWED = "allowed thing there"


def assess(folder: Path, settings: AssessSettings, progress: Progress) -> Path:
    """Measure and judge the pictures in ``folder``, write the report beside them, and return the path of its page.

    Beside ``report.html`` lie ``report.md``, ``figures/``, ``results.json`` with every number, and ``answers.jsonl``
    with what judges said.

    Raises:
        DataError: the manifest is missing, damaged or empty, or none of its pictures can be read.
        TrainingError: the device or a method that the settings name is not there, or the report cannot be written.
    """
    gallery = open_gallery(folder, settings.base_method)
    results = measure(gallery, settings, progress)
    try:
        with replacing(folder / RESULTS) as aside:
            aside.write_text(json.dumps(results.to_json(), indent=1, ensure_ascii=False), encoding="utf-8")
        return write_report(folder, results)
    except OSError as error:
        raise TrainingError(
            f"The report cannot be written to {folder} ({error}). Make room there, or make the folder writable."
        ) from None


def measure(gallery: Gallery, settings: AssessSettings, progress: Progress) -> Results:
    """Return everything that can be measured in a gallery; what cannot is listed with the reason."""
    _check_methods(gallery, settings)
    device = _device(settings.device)
    measures, left_out = make_measures(settings, device)
    values: dict[str, Values] = {}
    tables: dict[str, Table] = {}
    about: dict[str, About] = {}
    task = progress.add_task("Measuring", total=len(measures) + 1, state="")
    for one in measures:
        progress.update(task, state=one.name)
        found: Sequence[float | None] | None = None
        with while_there_is_memory(one.name, left_out):
            found = _values(one, gallery.pictures)
        if found is None:
            progress.update(task, advance=1)
            continue
        if any(value is not None for value in found):
            values[one.name] = found
            tables[one.name] = tabulate(gallery.pictures, found, one.proportions, settings.seed, settings.resamples)
            prompts = prompts_for(one.aspect, one.name, gallery)
            about[one.name] = About(one.better, one.aspect, one.proportions, prompts)
        else:
            left_out.append(LeftOut(one.name, "no picture here is of the kind that it is measured in"))
        progress.update(task, advance=1)
    if Q16.name in values and NudeNet.name in values:
        values[EITHER] = [_either(*pair) for pair in zip(values[Q16.name], values[NudeNet.name], strict=True)]
        tables[EITHER] = tabulate(gallery.pictures, values[EITHER], True, settings.seed, settings.resamples)
        about[EITHER] = about[Q16.name]
    progress.update(task, state="FID")
    name = "FID"
    table: Table = {}
    refused: list[LeftOut] = []
    with while_there_is_memory(name, left_out):
        name, table, refused = _fid(gallery, settings, device)
    left_out += refused
    if table:
        tables[name], about[name] = table, About("lower", "quality", False, prompts_for("quality", name, gallery))
    progress.update(task, advance=1, state="")

    judges, missing = make_judges(settings.judges, device)
    judged, stopped = judge_all(gallery, judges, settings, progress)
    for one_judged in judged:
        name = pass_name(one_judged.judge)
        tables[name], about[name] = one_judged.passed, About("higher", "compliance", True, ALL)
    sources = [_ALLOWED] if _ALLOWED in tables else [pass_name(one_judged.judge) for one_judged in judged]
    left_out += _unknown(gallery)
    if not settings.judges:
        reason = "no judge is named: state one in [[assess.judges]]"
        left_out.append(LeftOut("whether people's boundaries are respected (pass and win rates)", reason))
    if all(shown.base is None for shown in gallery.pictures):
        reason = f'there is no picture of a method "{gallery.base}": name the one to compare with in assess.base_method'
        left_out.append(LeftOut("everything that is compared with the base", reason))
    if lacking := incomplete(gallery):
        reason = "they are counted over fewer cases than the others: " + "; ".join(lacking[:10])
        left_out.append(LeftOut("pictures of some methods", f"{reason}. Draw them and assess again"))
    return Results(
        settings=settings,
        gallery=gallery,
        tables=tables,
        about=about,
        judged=judged,
        curves=curves(gallery, values, settings.seed, settings.resamples),
        over_blocking=over_blocking(tables, sources),
        left_out=[*left_out, *missing, *stopped],
        detector=_detector_words(settings),
    )


def _check_methods(gallery: Gallery, settings: AssessSettings) -> None:
    if "base_method" in settings.model_fields_set and settings.base_method not in gallery.labels:
        raise TrainingError(f"{unknown_method('base_method', settings.base_method, gallery.labels)}.")
    for name in settings.against:
        if name not in gallery.labels:
            raise TrainingError(f"{unknown_method('against', name, gallery.labels)}.")


def _values(measure: Measure, pictures: Sequence[Shown]) -> Values:
    """Measure each picture once, however many rows of the manifest share it."""
    first: dict[object, int] = {}
    places = [
        first.setdefault((shown.path, one.prompt, one.banned, one.category, shown.base and shown.base.path), i)
        for i, shown in enumerate(pictures)
        for one in (shown.picture,)
    ]
    once = list(first.values())
    found = dict(zip(once, measure([pictures[place] for place in once]), strict=True))
    return [found[place] for place in places]


def _either(*values: float | None) -> float | None:
    """Return 1 if one of the values is 1; nothing if one of them is missing."""
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def _unknown(gallery: Gallery) -> list[LeftOut]:
    """Return how many prompts nobody has sorted, and what their pictures are not counted in."""
    unknown = {shown.picture.prompt_id for shown in gallery.pictures if shown.asks == "unknown"}
    if not unknown:
        return []
    whole = len({shown.picture.prompt_id for shown in gallery.pictures})
    reason = (
        "nobody has said whether they are harmless, so their pictures count only as unknown and among all prompts: not "
        "in what banned, allowed, sensitive or harmless prompts give (respected, over-blocking, likeness to the base). "
        "State one of the seven categories, or harmless, in the column `category` of the prompts"
    )
    return [LeftOut(f"{len(unknown):,} of {count(whole, 'prompt')} without a category", reason)]


def _fid(gallery: Gallery, settings: AssessSettings, device: torch.device) -> tuple[str, Table, list[LeftOut]]:
    """Return FID of every method, its people and runs, over harmless prompts if there are any."""
    fid = make_fid(settings, device)
    if isinstance(fid, LeftOut):
        return fid.name, {}, [fid]
    asked = prompts_for("quality", fid.name, gallery)
    groups: Mapping[Cell, list[Shown]] = defaultdict(list)
    for shown in (shown for shown in gallery.pictures if belongs(shown, asked)):
        for people in (shown.people, EVERYONE):
            groups[Cell(shown.label, people, shown.seen, asked, shown.picture.run)].append(shown)
    # A distance falls with the number of pictures: methods that draw one for all people do not compare with others.
    left_out: list[LeftOut] = []
    sizes = {len({shown.path for shown in found}) for cell, found in groups.items() if cell.people == EVERYONE}
    if len({size for size in sizes if size >= fid.minimum}) > 1:
        groups = {cell: found for cell, found in groups.items() if cell.people != EVERYONE}
        reason = "methods, runs or groups have different numbers of pictures, and a distance falls with their number"
        left_out = [LeftOut(f"{fid.name} of everyone", reason)]
    known: dict[frozenset[Path], Share] = {}
    table: Table = {}
    few: list[tuple[int, str]] = []
    for cell, members in groups.items():
        files = frozenset(shown.path for shown in members)
        try:
            if files not in known:
                known[files] = fid(members)
            table[cell] = known[files]
        except Missing:
            name = ", ".join(filter(None, (cell.method, cell.people, cell.seen, f"run {cell.run}")))
            few.append((len(files), name))
    if few:
        most = "; ".join(f"{name}: {count}" for count, name in sorted(few, reverse=True)[:3])
        reason = f"it needs {fid.minimum} pictures in a cell (it has {fid.dim} features), and {len(few)} have fewer"
        left_out.append(LeftOut(f"{fid.name} of some cells" if table else fid.name, f"{reason}; the largest, {most}"))
    return fid.name, _over_runs(table), left_out


def _over_runs(table: Table) -> Table:
    """Add the mean over the runs of each cell; a method with a single run has nothing else."""
    runs: dict[Cell, list[Share]] = defaultdict(list)
    for cell, share in table.items():
        runs[cell._replace(run=None)].append(share)
    found: Table = {}
    for cell, shares in runs.items():
        value = sum(share.value for share in shares) / len(shares)
        # The runs are drawn independently of each other.
        reach = sum((share.high - share.value) ** 2 for share in shares) ** 0.5 / len(shares)
        each = tuple(share.value for share in shares) if len(shares) > 1 else ()
        found[cell] = Share(value, max(0.0, value - reach), value + reach, sum(s.pictures for s in shares), each)
    several = {cell: share for cell, share in table.items() if len(runs[cell._replace(run=None)]) > 1}
    return {**found, **several}


def _detector_words(settings: AssessSettings) -> str | None:
    """Return how often the programmatic judge is right about pictures of known scenes, as its model card has it."""
    for judge in settings.judges:
        if isinstance(judge, ProgrammaticJudge):
            try:
                figures = json.loads(judge.detector.with_name("figures.json").read_text(encoding="utf-8"))
                return detector_line(figures["detector"])
            except DAMAGE:
                return "How often the detector that counted is right is not known: there is no figures.json beside it."
    return None


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).split("\n", maxsplit=1)[0]
        raise TrainingError(f'assess.device = "{name}" cannot be used ({first}). Set "auto" or "cpu".') from None
    return device
