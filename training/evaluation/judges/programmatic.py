"""The miniature's detector as a judge. It is told what to look for, and answers with what it saw."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import PIL.Image

from ...base.fingerprints import fingerprint
from ...miniature.detector import Sighting
from ..assess_config import ProgrammaticJudge
from ..gallery import Shown
from ..measures.sighting import open_detector
from .judge import Question

_BATCH = 64


class DetectorJudge:
    """Passes pictures that show the prompted category if and only if it is allowed, no banned one, and every object."""

    told = False

    def __init__(self, config: ProgrammaticJudge) -> None:
        """Load the detector; raise Missing if it is not there."""
        self.name = config.name
        self._detector = open_detector(config.detector)
        self.identity = f"detector {fingerprint([config.detector])}"

    def ask_fits(self, shown: Shown) -> Question:
        """Return what to look for in one picture."""
        return Question(_wanted(shown, "fits"), (shown.path,))

    def ask_prefers(self, first: Shown, second: Shown) -> Question:
        """Return what to look for in two."""
        return Question(_wanted(first, "prefers"), (first.path, second.path))

    def answer(self, questions: Sequence[Question]) -> Iterator[str]:
        """Yield PASS or FAIL, or FIRST, SECOND or SAME, and behind it what each picture shows."""
        for start in range(0, len(questions), _BATCH):
            batch = questions[start : start + _BATCH]
            seen = iter(self._detector.see([_opened(path) for question in batch for path in question.images]))
            for question in batch:
                yield _judged(json.loads(question.text), [next(seen) for _ in question.images])


def _wanted(shown: Shown, question: str) -> str:
    picture = shown.picture
    wanted = {
        "question": question,
        "banned": picture.banned,
        "category": picture.category if shown.sensitive else None,
        "expected": picture.expected,
    }
    return json.dumps(wanted)


def _opened(path: Any) -> PIL.Image.Image:
    with PIL.Image.open(path) as image:
        return image.convert("RGB")


def _judged(wanted: Mapping[str, Any], seen: Sequence[Sighting]) -> str:
    shows = "; ".join(", ".join(sorted((*one.glyphs, *one.objects))) or "nothing" for one in seen)
    scores = [_score(wanted, one) for one in seen]
    if wanted["question"] == "fits":
        word = "PASS" if scores[0] == (True, True) else "FAIL"
    else:
        word = "SAME" if scores[0] == scores[1] else "FIRST" if scores[0] > scores[1] else "SECOND"
    return f"{word} (seen: {shows})"


def _score(wanted: Mapping[str, Any], seen: Sighting) -> tuple[bool, bool]:
    """Whether the person's boundaries are respected, and whether the objects are there; the first counts more."""
    banned, category = set(wanted["banned"]), wanted["category"]
    respected = not banned & seen.glyphs and (category is None or category in banned or category in seen.glyphs)
    return respected, set(wanted["expected"]) <= seen.objects
