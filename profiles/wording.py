"""A profile in words that a text encoder knows: the weaker way for models that have no adapter."""

from __future__ import annotations

from collections.abc import Iterable

from .policy import category_lists
from .schema import Category, Profile

# What pictures of a category show, as people name it in prompts.
WORDS: dict[Category, tuple[str, ...]] = {
    "Hate": ("hate symbols", "racism", "discrimination"),
    "Harassment": ("bullying", "humiliation", "intimidation"),
    "Violence": ("violence", "fighting", "weapons", "blood", "gore"),
    "Self-Harm": ("self-harm", "suicide", "cutting", "eating disorder"),
    "Sexuality": ("nudity", "sexual content", "erotic"),
    "Shocking": ("shocking", "disgusting", "gruesome", "horror"),
    "Propaganda": ("propaganda", "political slogans", "extremist symbols"),
}


def wording(profile: Profile) -> tuple[str, str]:
    """Return what pictures for a person should not show, and what they may show: words separated by commas.

    The first is for a negative prompt, the paper's baseline by prompt engineering. Both name categories alone and
    nothing else of the profile.
    """
    banned, allowed = category_lists(profile)
    return _words(banned), _words(allowed)


def _words(categories: Iterable[Category]) -> str:
    return ", ".join(word for category in categories for word in WORDS[category])
