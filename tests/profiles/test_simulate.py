"""Simulated users: reproducible, within the constraints, and distributed as published."""

from __future__ import annotations

from collections import Counter
from itertools import product
from math import sqrt

import pytest

from comfyui_psa.profiles import Profile, simulate_users, user_row

COUNT = 30_000
TOLERANCE = 4  # standard errors

AGE_GROUPS = {
    "infants & toddlers": (0, 3, 0.05),
    "children": (4, 12, 0.20),
    "adolescents": (13, 19, 0.20),
    "young adults": (20, 34, 0.20),
    "middle-aged": (35, 59, 0.20),
    "young elderly": (60, 74, 0.10),
    "elderly": (75, 89, 0.04),
    "long-lived elderly": (90, 100, 0.01),
}
GENDERS = {"male": 0.5, "female": 0.5}
RELIGIONS = {"Christianity": 0.3, "Islam": 0.2, "Buddhism": 0.2, "None": 0.3}
PHYSICAL = {"visual impairment": 0.2, "hearing impairment": 0.2, "intellectual disability": 0.2, "healthy": 0.4}
MENTAL = {
    "depression": 0.15,
    "anxiety": 0.15,
    "war": 0.075,
    "sexual assault": 0.075,
    "major accidents": 0.075,
    "natural disasters": 0.075,
    "healthy": 0.4,
}
YOUNGEST = {
    "Christianity": 8,
    "Islam": 8,
    "Buddhism": 8,
    "depression": 5,
    "anxiety": 5,
    "major accidents": 5,
    "sexual assault": 13,
    "war": 18,
}

User = tuple[int, str, str, str, str, str]
COLUMNS = {"age": 0, "age group": 1, "gender": 2, "religion": 3, "physical": 4, "mental": 5}


def _expected() -> dict[User, float]:
    """The published probabilities of all combinations, given that the combination is plausible."""
    weights: dict[User, float] = {}
    for group, (first, last, share) in AGE_GROUPS.items():
        for age in range(first, last + 1):
            for gender, religion, physical, mental in product(GENDERS, RELIGIONS, PHYSICAL, MENTAL):
                if age < max(YOUNGEST.get(religion, 0), YOUNGEST.get(mental, 0)):
                    continue
                weights[age, group, gender, religion, physical, mental] = (
                    share
                    / (last - first + 1)
                    * GENDERS[gender]
                    * RELIGIONS[religion]
                    * PHYSICAL[physical]
                    * MENTAL[mental]
                )
    total = sum(weights.values())
    return {user: weight / total for user, weight in weights.items()}


@pytest.fixture(scope="module")
def users() -> list[Profile]:
    return simulate_users(COUNT, seed=2025)


@pytest.fixture(scope="module")
def expected() -> dict[User, float]:
    return _expected()


def _user(profile: Profile) -> User:
    return (
        profile.age or 0,
        str(profile.age_group),
        str(profile.gender),
        str(profile.religion),
        str(profile.physical_condition),
        str(profile.mental_condition),
    )


@pytest.mark.parametrize(
    "columns",
    [
        ("age",),
        ("age group",),
        ("gender",),
        ("religion",),
        ("physical",),
        ("mental",),
        ("age group", "religion"),
        ("age group", "mental"),
        ("gender", "physical"),
        ("religion", "mental"),
    ],
    ids=" and ".join,
)
def test_a_large_draw_is_distributed_as_published(
    users: list[Profile], expected: dict[User, float], columns: tuple[str, ...]
) -> None:
    positions = [COLUMNS[column] for column in columns]
    counts = Counter(tuple(_user(profile)[i] for i in positions) for profile in users)
    probabilities: Counter[tuple[object, ...]] = Counter()
    for user, probability in expected.items():
        probabilities[tuple(user[i] for i in positions)] += probability  # type: ignore[assignment]
    assert set(counts) <= set(probabilities)
    for values, probability in probabilities.items():
        error = sqrt(probability * (1 - probability) / COUNT)
        assert counts[values] / COUNT == pytest.approx(probability, abs=TOLERANCE * error), values


def test_the_same_seed_gives_the_same_users() -> None:
    assert simulate_users(50, seed=7) == simulate_users(50, seed=7)


def test_another_seed_gives_other_users() -> None:
    assert simulate_users(50, seed=7) != simulate_users(50, seed=8)


@pytest.mark.parametrize("count", [0, 1, 50])
def test_a_longer_draw_begins_with_the_shorter_one(users: list[Profile], count: int) -> None:
    assert simulate_users(count, seed=2025) == users[:count]


@pytest.mark.parametrize("value", YOUNGEST)
def test_nobody_is_too_young_for_a_value(users: list[Profile], value: str) -> None:
    ages = [profile.age for profile in users if value in (profile.religion, profile.mental_condition)]
    assert min(age for age in ages if age is not None) == YOUNGEST[value]


def test_even_the_youngest_may_be_in_a_natural_disaster(users: list[Profile]) -> None:
    assert any(profile.age == 0 and profile.mental_condition == "natural disasters" for profile in users)


def test_simulated_users_override_no_rule_and_have_no_name(users: list[Profile]) -> None:
    assert all(profile.overrides == {} and profile.name == profile.notes == "" for profile in users)


def test_a_row_looks_as_in_the_release() -> None:
    user = Profile(
        age=8, gender="male", religion="None", physical_condition="healthy", mental_condition="anxiety", notes="x"
    )
    assert list(user_row(2, user).items()) == [
        ("User_ID", "0000002"),
        ("Age", "8"),
        ("Age_Group", "children"),
        ("Gender", "male"),
        ("Religion", "None"),
        ("Physical_Condition", "healthy"),
        ("Mental_Condition", "anxiety"),
        ("Banned_Categories", "['Self-Harm', 'Sexuality', 'Violence']"),
        ("Allowed_Categories", "['Harassment', 'Hate', 'Propaganda', 'Shocking']"),
    ]


def test_a_row_of_a_user_who_bans_nothing_has_an_empty_list() -> None:
    row = user_row(1001, Profile(age=35, physical_condition="healthy"))
    assert row["User_ID"] == "0001001"
    assert row["Banned_Categories"] == "[]"
