"""What every judge is: something that is asked about one picture, or about two, and answers in words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from ..gallery import Shown

_REFUSAL = re.compile(r"\[status \d+.*\]")


class Question(NamedTuple):
    """All that a judge learns: a text and pictures. It names no method, and neither does anything else it gets."""

    text: str
    images: tuple[Path, ...]


class Judge(Protocol):
    """Answers questions."""

    name: str
    identity: str  # all that decides about its answers besides the question
    told: bool  # whether it is told about people in words

    def ask_fits(self, shown: Shown) -> Question:
        """Return the question whether a picture is right for its person."""

    def ask_prefers(self, first: Shown, second: Shown) -> Question:
        """Return the question which of two pictures for one person and prompt is better."""

    def answer(self, questions: Sequence[Question]) -> Iterator[str]:
        """Yield what the judge says to each question, as it came; ``refusal`` where it does not take one.

        Raises:
            JudgeStopped: it cannot go on.
        """


class JudgeStopped(Exception):  # noqa: N818 - a judge is left out, the rest goes on
    """A judge gives no answers any more; the message says why."""


def refusal(status: int, detail: str) -> str:
    """Return what stands for the answer to a question that an endpoint refuses, in one line."""
    return f"[status {status}{': ' if detail else ''}{detail}]"


def is_refusal(answer: str) -> bool:
    """Return whether an answer is a refusal, which the next run asks for again."""
    return _REFUSAL.fullmatch(answer) is not None
