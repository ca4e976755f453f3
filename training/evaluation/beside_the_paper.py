"""The chapter in which the paper's numbers stand beside ours."""

from __future__ import annotations

from collections.abc import Iterator

from .gallery import is_level
from .parts import Part, Text, View, percent
from .published import INAPPROPRIATE, passes, published, wins
from .results import Results, pass_name
from .tables import ALL, EITHER, EVERYONE, Cell


def beside_the_paper(results: Results) -> Iterator[Part]:
    """Yield what is published about the data set that the settings state, and ours, each marked as what it is."""
    section = results.settings.published
    if section is None:
        return
    theirs = published(section.data_set, section.base)
    columns = list(dict.fromkeys(name for _, found in theirs for name in found))
    rows = []
    for label in results.gallery.labels:
        groups = sorted({shown.people for shown in results.gallery.of(label)})
        for people in (EVERYONE, *groups):
            found = {name: _ours(results, label, people, name) for name in columns}
            if any(found.values()):
                rows.append([f"{label}, {people}", *(found[name] for name in columns), "measured here"])
    rows += [[method, *(found.get(name, "") for name in columns), "published"] for method, found in theirs]
    yield View(["method", *columns, "source"], rows, f"{section.base}, {section.data_set}")
    yield Text(
        "Published: arXiv 2508.01151, as printed. Its judge saw the names of the methods and always its own picture "
        "second, and its own method alone had a negative prompt about quality; ours judges blind, ties count half. "
        "Inappropriate there: by Q16 or NudeNet. Where ours is by one of them alone, it says so, and is no more than a "
        "lower bound."
    )
    if _of_people(results):
        yield Text(
            "Rows of Sage say nothing of what their people ban: unless they have Banned_Categories, this pack's rules "
            "decide it from the profiles. Ours and theirs may differ in that."
        )


def _ours(results: Results, label: str, people: str, column: str) -> str:
    if column in (INAPPROPRIATE, "FID", "CLIPScore"):
        return _measured(results, label, people, column)
    for seen in ("seen", "unseen"):
        if column == passes(seen):
            words = {
                judged.judge: results.find(pass_name(judged.judge), _cell(results, label, people, seen))
                for judged in results.judged
            }
            return _by_judge(words)
        if column == wins(seen):
            return _by_judge(dict(_rates(results, label, people, seen)))
    return ""


def _measured(results: Results, label: str, people: str, column: str) -> str:
    names: tuple[str, ...] = (column,)
    if column == INAPPROPRIATE:
        names = (EITHER,) if EITHER in results.tables else ("inappropriate (Q16)", "inappropriate (NudeNet)")
    for name in names:
        prompts = ALL if column == INAPPROPRIATE or name not in results.about else results.about[name].prompts
        words = results.find(name, Cell(label, people, _population(results, people), prompts))
        if words:
            return words if name in (EITHER, column) else f"{words} {name.removeprefix('inappropriate ')} alone"
    return ""


def _of_people(results: Results) -> bool:
    """Return whether the published data set has people of its own."""
    section = results.settings.published
    return section is not None and section.data_set.startswith("Sage")


def _population(results: Results, people: str) -> str:
    """Return which people's pictures are of the published data set, for all of them or a group.

    Sage has people of its own, and prompts of the other sets belong to nobody: where there are both, each stands beside
    its own. Levels stand beside Sage if they were asked for what its people ask for.
    """
    known = {shown.seen for shown in results.gallery.pictures}
    if _of_people(results) and not (is_level(people) and _levels_ask_the_same(results)):
        return "unseen" if "unseen" in known else ""
    return "" if "" in known else "unseen"


def _levels_ask_the_same(results: Results) -> bool:
    pictures = results.gallery.pictures
    theirs = {shown.picture.prompt_id for shown in pictures if shown.seen == "unseen"}
    return {shown.picture.prompt_id for shown in pictures if is_level(shown.people)} <= theirs


def _cell(results: Results, label: str, people: str, seen: str) -> Cell:
    """Return the cell of seen or unseen people; where nobody said so of anybody, that of all."""
    known = any(shown.seen or shown.picture.level for shown in results.gallery.pictures)
    return Cell(label, people, seen if known else "", ALL)


def _rates(results: Results, label: str, people: str, seen: str) -> Iterator[tuple[str, str]]:
    for judged in results.judged:
        for one in judged.compared:
            share = one.table.get(_cell(results, label, people, seen))
            if share is not None and (one.method, one.against) == (label, results.gallery.base):
                yield judged.judge, percent(share)


def _by_judge(words: dict[str, str]) -> str:
    found = {judge: text for judge, text in words.items() if text}
    return "; ".join(text if len(found) == 1 else f"{text} ({judge})" for judge, text in found.items())
