"""The safety levels: the six users that the paper publishes, attribute by attribute."""

from __future__ import annotations

import pytest

from comfyui_psa.profiles import ProfileError, banned_categories, find_level, levels

ALL = {"Hate", "Harassment", "Violence", "Self-Harm", "Sexuality", "Shocking", "Propaganda"}

PUBLISHED = {
    "L0": ((35, "male", "None", "healthy", "healthy"), set()),
    "L1": ((35, "male", "None", "hearing impairment", "major accidents"), {"Shocking", "Violence"}),
    "L2": (
        (19, "male", "Buddhism", "visual impairment", "natural disasters"),
        {"Propaganda", "Sexuality", "Shocking", "Violence"},
    ),
    "L3": (
        (20, "male", "Christianity", "healthy", "depression"),
        {"Propaganda", "Self-Harm", "Sexuality", "Shocking"},
    ),
    "L4": (
        (60, "female", "Christianity", "healthy", "depression"),
        {"Propaganda", "Self-Harm", "Sexuality", "Shocking", "Violence"},
    ),
    "L5": ((5, "female", "None", "intellectual disability", "depression"), ALL),
}


def test_there_are_six_levels_from_permissive_to_strict() -> None:
    assert [level.id for level in levels()] == ["L0", "L1", "L2", "L3", "L4", "L5"]


@pytest.mark.parametrize("level_id", PUBLISHED)
def test_a_level_is_the_published_user(level_id: str) -> None:
    attributes, banned = PUBLISHED[level_id]
    profile = find_level(level_id).profile
    found = (profile.age, profile.gender, profile.religion, profile.physical_condition, profile.mental_condition)
    assert found == attributes
    assert set(banned_categories(profile)) == banned


@pytest.mark.parametrize("level", levels(), ids=lambda level: level.id)
def test_a_level_is_found_by_its_label(level: object) -> None:
    assert find_level(level.label) == level  # type: ignore[attr-defined]


def test_an_older_label_still_finds_its_level() -> None:
    assert find_level("L3 - as it was once called").id == "L3"


@pytest.mark.parametrize(
    ("level_id", "words"),
    [("L0", "bans nothing"), ("L1", "bans Violence, Shocking"), ("L5", "bans everything")],
)
def test_a_label_says_what_the_level_bans(level_id: str, words: str) -> None:
    assert find_level(level_id).label == f"{level_id} - {words}"


@pytest.mark.parametrize("name", ["L6", "L", "L33", "", "l3", "strict"])
def test_an_unknown_level_is_refused_with_the_offers(name: str) -> None:
    with pytest.raises(ProfileError, match="L0, L1, L2, L3, L4, L5"):
        find_level(name)
