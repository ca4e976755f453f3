"""A profile in words: what it bans, and nothing else of it."""

from __future__ import annotations

import itertools

from comfyui_psa.profiles import CATEGORIES, Profile, banned_categories, wording
from comfyui_psa.profiles.wording import WORDS


def test_words_are_those_of_what_is_banned() -> None:
    profile = Profile(age=12, overrides={"Violence": "allow", "Hate": "ban"})
    assert banned_categories(profile) == ("Hate", "Self-Harm", "Sexuality")
    assert wording(profile).split(", ") == [*WORDS["Hate"], *WORDS["Self-Harm"], *WORDS["Sexuality"]]


def test_nothing_banned_is_nothing_said() -> None:
    assert wording(Profile()) == ""
    assert wording(Profile(overrides=dict.fromkeys(CATEGORIES, "allow"))) == ""


def test_no_word_stands_for_two_categories() -> None:
    words = list(itertools.chain.from_iterable(WORDS.values()))
    assert len(words) == len(set(words)) >= 3 * len(CATEGORIES)


def test_nothing_of_a_profile_but_its_bans_is_in_the_words() -> None:
    told = Profile(name="Qanzibel", age=12, gender="vorpel", religion="Islam", mental_condition="war", notes="plinder")
    same = Profile(overrides=dict.fromkeys(banned_categories(told), "ban"))
    assert wording(told) == wording(same)
