"""Personal compliance: whether pictures pass for their people, and which of two methods' pictures is better.

A judge compares blind and in both orders. A method wins a case only if the judge prefers its picture both times; if the
two answers disagree, it is a tie. How often a judge takes the first picture is reported as its position bias.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.progress import Progress

from .assess_config import AssessSettings
from .gallery import Gallery, Shown
from .judges import Answers, Judge, JudgeStopped, Question, preference, verdict
from .measures import LeftOut
from .statistics import Share, share
from .tables import Table, tabulate


class Counts(NamedTuple):
    """How the cases of a comparison went."""

    wins: int
    ties: int
    losses: int
    unusable: int


@dataclass(frozen=True)
class Compared:
    """A method against another one, as one judge sees it: how often it wins (ties count half), and the counts.

    ``counts`` are by people (seen, unseen, or nothing).
    """

    method: str
    against: str
    table: Table
    counts: Mapping[str, Counts]

    @property
    def total(self) -> Counts:
        """The counts over all people."""
        return Counts(*map(sum, zip(*self.counts.values(), strict=True)))


@dataclass(frozen=True)
class Judged:
    """All that a judge said."""

    judge: str
    passed: Table
    passes: Mapping[int, float]  # by the position of a picture in the gallery
    asked: int
    unusable: int
    compared: tuple[Compared, ...]
    asked_pairs: int
    unusable_pairs: int
    disagreed: Share | None  # of the cases that were compared in both orders
    first: Share | None  # how often the first picture is taken, of all answers that take one


def judge_all(
    gallery: Gallery, judges: Sequence[Judge], settings: AssessSettings, progress: Progress
) -> tuple[list[Judged], list[LeftOut]]:
    """Ask every judge about single pictures and pairs; a judge that stops is left out, and the rest goes on."""
    answers = Answers(gallery.folder)
    judged: list[Judged] = []
    left_out: list[LeftOut] = []
    for judge in judges:
        if judge.told and any(shown.about is None for shown in gallery.pictures):
            left_out.append(LeftOut(judge.name, "users.jsonl does not say what to tell it about everybody"))
            continue
        try:
            judged.append(_Session(gallery, judge, answers, settings, progress).judged())
        except JudgeStopped as stopped:
            left_out.append(LeftOut(judge.name, str(stopped)))
    return judged, left_out


class _Session:
    """One judge and one gallery."""

    def __init__(
        self, gallery: Gallery, judge: Judge, answers: Answers, settings: AssessSettings, progress: Progress
    ) -> None:
        self._gallery, self._judge, self._answers = gallery, judge, answers
        self._settings, self._progress = settings, progress

    def judged(self) -> Judged:
        places = self._singles()
        pictures = [self._gallery.pictures[place] for place in places]
        verdicts = [verdict(text) for text in self._ask([self._judge.ask_fits(shown) for shown in pictures])]
        passes = {
            place: float(found == "pass") for place, found in zip(places, verdicts, strict=True) if found != "unusable"
        }
        table = self._tabulate(pictures, [passes.get(place) for place in places])
        pairs = self._pairs()
        chosen = self._choose([pair for found in pairs.values() for pair in found])
        compared = tuple(self._compared(*names, found, chosen) for names, found in pairs.items() if found)
        answered = [(pair, found) for pair, found in chosen.items() if found is not None]
        both = [(ours, orders) for (ours, _), orders in answered if "unusable" not in orders]
        return Judged(
            judge=self._judge.name,
            passed=table,
            passes=passes,
            asked=len(verdicts),
            unusable=verdicts.count("unusable"),
            compared=compared,
            asked_pairs=2 * len(answered),
            unusable_pairs=sum(orders.count("unusable") for _, orders in answered),
            disagreed=self._share([(ours, _outcome(orders) is None) for ours, orders in both]),
            first=self._share(
                [
                    (ours, found == "first")
                    for (ours, _), orders in answered
                    for found in orders
                    if found in ("first", "second")
                ]
            ),
        )

    def _singles(self) -> list[int]:
        """Return the positions of the pictures that are judged: all, or the same few of every cell."""
        pictures, limit = self._gallery.pictures, self._settings.singles
        groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for place, shown in enumerate(pictures):
            groups[shown.label, str(shown.picture.run), shown.people, shown.seen, shown.asked].append(place)
        chosen = (
            sorted(group, key=lambda place: drawn(pictures[place].picture.case))[:limit] for group in groups.values()
        )
        return sorted(place for group in chosen for place in group)

    def _pairs(self) -> dict[tuple[str, str], list[tuple[Shown, Shown]]]:
        """Return for every method and the ones it is compared with the pairs of pictures of the same cases."""
        pairs: dict[tuple[str, str], list[tuple[Shown, Shown]]] = {}
        if not self._settings.pairs:
            return pairs
        for against in self._settings.against or (self._gallery.base,):
            theirs: dict[tuple[str, int], Shown] = {}
            for shown in reversed(self._gallery.of(against)):
                theirs[shown.picture.case, shown.picture.run] = theirs[shown.picture.case, -1] = shown
            for label in self._gallery.labels:
                if label != against and (against, label) not in pairs:
                    pairs[label, against] = self._pairs_of(label, theirs)
        return pairs

    def _pairs_of(self, label: str, theirs: Mapping[tuple[str, int], Shown]) -> list[tuple[Shown, Shown]]:
        runs: dict[int, list[tuple[Shown, Shown]]] = defaultdict(list)
        for shown in self._gallery.of(label):
            case, run = shown.picture.case, shown.picture.run
            other = theirs.get((case, run), theirs.get((case, -1)))
            if other is not None:
                runs[run].append((shown, other))
        return [
            pair
            for found in runs.values()
            for pair in sorted(found, key=lambda pair: drawn(pair[0].picture.case))[: self._settings.pairs]
        ]

    def _choose(self, pairs: Sequence[tuple[Shown, Shown]]) -> dict[tuple[Shown, Shown], list[str] | None]:
        """Return the two answers about each pair, our picture first and second; None for pictures that are the same."""
        digest = self._answers.digest
        different = [pair for pair in pairs if digest(pair[0].path) != digest(pair[1].path)]
        orders = [order for ours, theirs in different for order in ((ours, theirs), (theirs, ours))]
        found = [preference(text) for text in self._ask([self._judge.ask_prefers(*order) for order in orders])]
        chosen: dict[tuple[Shown, Shown], list[str] | None] = dict.fromkeys(pairs)
        for place, pair in enumerate(different):
            chosen[pair] = list(found[2 * place : 2 * place + 2])
        return chosen

    def _compared(
        self,
        method: str,
        against: str,
        pairs: Sequence[tuple[Shown, Shown]],
        chosen: Mapping[tuple[Shown, Shown], list[str] | None],
    ) -> Compared:
        outcomes: list[float | None] = []
        for pair in pairs:
            orders = chosen[pair]
            if orders is not None and "unusable" in orders:
                outcomes.append(None)
            else:
                outcome = 0.5 if orders is None else _outcome(orders)
                outcomes.append(0.5 if outcome is None else outcome)
        counts = {}
        for seen in dict.fromkeys(ours.seen for ours, _ in pairs):
            found = [one for (ours, _), one in zip(pairs, outcomes, strict=True) if ours.seen == seen]
            counts[seen] = Counts(*(found.count(outcome) for outcome in (1.0, 0.5, 0.0, None)))
        return Compared(method, against, self._tabulate([ours for ours, _ in pairs], outcomes), counts)

    def _ask(self, questions: Sequence[Question]) -> list[str]:
        return self._answers.of(self._judge, questions, self._progress) if questions else []

    def _tabulate(self, pictures: Sequence[Shown], values: Sequence[float | None]) -> Table:
        return tabulate(pictures, values, True, self._settings.seed, self._settings.resamples)

    def _share(self, values: Sequence[tuple[Shown, bool]]) -> Share | None:
        if not values:
            return None
        clusters = [shown.picture.prompt_id for shown, _ in values]
        return share([value for _, value in values], clusters, self._settings.seed, resamples=self._settings.resamples)


def drawn(case: str) -> str:
    """Return where a case stands in an order that has nothing to do with what it is about."""
    return hashlib.sha256(case.encode()).hexdigest()


def _outcome(orders: Sequence[str]) -> float | None:
    """Return 1 if ours is better in both orders, 0 if it is worse, 0.5 if neither is; None if the two disagree."""
    return {("first", "second"): 1.0, ("second", "first"): 0.0, ("same", "same"): 0.5}.get((orders[0], orders[1]))
