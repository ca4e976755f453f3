"""A profile in words that a text encoder knows: the weaker way for models that have no adapter."""

from __future__ import annotations

from .policy import banned_categories
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


def wording(profile: Profile) -> str:
    """Return what pictures for a person should not show, as words separated by commas.

    For a negative prompt: the paper's baseline by prompt engineering. They name categories and nothing else of the
    profile.
    """
    return ", ".join(word for category in banned_categories(profile) for word in WORDS[category])
