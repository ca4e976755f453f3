"""The last chapters of a report: what is missing, who judged, how the pictures were made, and every number."""

from __future__ import annotations

from collections.abc import Iterator

from .parts import Part, Text, View, count, few, part_of
from .results import Results


def left_out(results: Results) -> Iterator[Part]:
    """Yield what has no number, and which pictures could not be read."""
    rows = [[left.name, left.reason] for left in results.left_out]
    unreadable = results.gallery.unreadable
    if rows:
        yield View(["left out", "why"], rows)
    if unreadable:
        shown = [[name, reason] for name, reason in sorted(unreadable.items())]
        yield Text(
            f"{count(len(unreadable), 'picture')} could not be read and count nowhere. Delete what is damaged: "
            "`psa evaluate` draws what is not there."
        )
        yield View(["picture", "why"], shown, "Unreadable pictures", folded=len(shown) > 10)
    if not rows and not unreadable:
        yield Text("Nothing.")


def judges(results: Results) -> Iterator[Part]:
    """Yield how much judges were asked and how much of it was unusable."""
    rows = [
        [
            one.judge,
            f"{one.asked:,}",
            part_of(one.unusable, one.asked),
            f"{one.asked_pairs:,}",
            part_of(one.unusable_pairs, one.asked_pairs),
        ]
        for one in results.judged
    ]
    if rows:
        yield View(["judge", "pictures", "unusable answers", "comparisons", "unusable answers"], rows)
        yield Text(
            "Unusable answers count neither as pass nor as fail. All answers are in answers.jsonl, as they came."
        )
    if results.detector:
        yield Text(results.detector)


def settings(results: Results) -> Iterator[Part]:
    """Yield how the pictures were made, as the manifest has it."""
    rows = [[name, value] for name, value in results.settings.facts.items()]
    pictures = [shown.picture for shown in results.gallery.pictures]
    for name in ("base", "engine", "steps", "guidance_scale", "width", "height"):
        found = sorted({str(getattr(picture, name)) for picture in pictures})
        # A method may be called "base", too.
        rows.append(["base model" if name == "base" else name.replace("_", " "), few(found)])
    rows.append(["seeds", f"{min(p.seed for p in pictures)} to {max(p.seed for p in pictures)}"])
    for label in results.gallery.labels:
        made = [shown.picture for shown in results.gallery.of(label)]
        adapters = sorted({picture.adapter for picture in made if picture.adapter})
        written = sorted({f'"{picture.negative_prompt}"' for picture in made if picture.negative_prompt})
        details = [f"{len(made):,} pictures"]
        details += [f"adapter {few(adapters)}", f"strength {made[0].strength:g}"] if adapters else []
        details += [f"everybody is taken for {made[0].everyone}"] if made[0].everyone else []
        details += [f'degree {made[0].degree}, away from "{made[0].concept}"'] if made[0].degree else []
        details += [f"negative prompts such as {few(written, 1)}"] if written else []
        rows.append([label, "; ".join(details)])
    yield View(["setting", "value"], rows)


def everything(results: Results) -> Iterator[Part]:
    """Yield a table of every measure."""
    yield Text("results.json has all of them as numbers, those of single runs as well.")
    for name, table in results.tables.items():
        rows = [
            [cell.method, cell.people, cell.seen, cell.asked, results.about[name].words(share), f"{share.pictures:,}"]
            + ([", ".join(results.about[name].number(run, share.value) for run in share.runs)] if share.runs else [""])
            for cell, share in table.items()
            if cell.run is None
        ]
        yield View(["method", "people", "seen", "asked for", "mean", "pictures", "runs"], rows, name, folded=True)
