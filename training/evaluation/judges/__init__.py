"""Who judges pictures: a program, a model on this machine, or one behind an address."""

from .answers import Answers
from .judge import Judge, JudgeStopped, Question
from .questions import Preference, Verdict, preference, verdict
from .setup import make_judges

__all__ = [
    "Answers",
    "Judge",
    "JudgeStopped",
    "Preference",
    "Question",
    "Verdict",
    "make_judges",
    "preference",
    "verdict",
]
