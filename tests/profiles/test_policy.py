"""The rules from a profile to its banned categories, case by case, written by hand from the paper."""

from __future__ import annotations

from typing import Any

import pytest

from comfyui_psa.profiles import Profile, banned_categories, decide

ALL = {"Hate", "Harassment", "Violence", "Self-Harm", "Sexuality", "Shocking", "Propaganda"}
MINOR_OR_MENTAL = {"Sexuality", "Self-Harm", "Violence"}
PHYSICAL = {"Shocking", "Harassment"}
RELIGIOUS = {"Hate", "Propaganda"}

AGE, MENTAL, BODY, FAITH, OWN = (
    "under 18",
    "a mental condition",
    "a physical condition",
    "a religion with such boundaries",
    "your own choice",
)

HEALTHY_ADULT = {
    "age": 35,
    "gender": "male",
    "religion": "None",
    "physical_condition": "healthy",
    "mental_condition": "healthy",
}

CASES: list[tuple[dict[str, Any], set[str]]] = [
    ({}, set()),
    (HEALTHY_ADULT, set()),
    (HEALTHY_ADULT | {"gender": "female"}, set()),
    # age
    ({"age": 0}, MINOR_OR_MENTAL),
    ({"age": 17}, MINOR_OR_MENTAL),
    ({"age": 18}, set()),
    ({"age": 100}, set()),
    # mental condition
    ({"mental_condition": "depression"}, MINOR_OR_MENTAL),
    ({"mental_condition": "anxiety"}, MINOR_OR_MENTAL),
    ({"mental_condition": "war"}, MINOR_OR_MENTAL),
    ({"mental_condition": "sexual assault"}, MINOR_OR_MENTAL),
    ({"mental_condition": "major accidents"}, MINOR_OR_MENTAL),
    ({"mental_condition": "natural disasters"}, MINOR_OR_MENTAL),
    ({"mental_condition": "a phobia of spiders"}, MINOR_OR_MENTAL),
    ({"mental_condition": "healthy"}, set()),
    ({"mental_condition": "Healthy"}, set()),
    ({"mental_condition": "None"}, set()),
    ({"mental_condition": " "}, set()),
    # physical condition
    ({"physical_condition": "visual impairment"}, PHYSICAL),
    ({"physical_condition": "hearing impairment"}, PHYSICAL),
    ({"physical_condition": "intellectual disability"}, PHYSICAL),
    ({"physical_condition": "a weak heart"}, PHYSICAL),
    ({"physical_condition": "healthy"}, set()),
    ({"physical_condition": "HEALTHY"}, set()),
    # religion
    ({"religion": "Christianity"}, RELIGIOUS),
    ({"religion": "Islam"}, RELIGIOUS),
    ({"religion": "Buddhism"}, RELIGIOUS),
    ({"religion": "islam"}, RELIGIOUS),
    ({"religion": "BUDDHISM"}, RELIGIOUS),
    ({"religion": " christianity "}, RELIGIOUS),
    ({"religion": "Judaism"}, set()),
    ({"religion": "None"}, set()),
    # combinations
    ({"age": 35, "religion": "Islam", "mental_condition": "war"}, MINOR_OR_MENTAL | RELIGIOUS),
    ({"age": 9, "physical_condition": "visual impairment"}, MINOR_OR_MENTAL | PHYSICAL),
    ({"religion": "Buddhism", "physical_condition": "hearing impairment"}, RELIGIOUS | PHYSICAL),
    ({"age": 12, "religion": "Islam", "physical_condition": "visual impairment", "mental_condition": "anxiety"}, ALL),
    # overrides
    (HEALTHY_ADULT | {"overrides": {"Shocking": "ban"}}, {"Shocking"}),
    ({"age": 9, "overrides": {"Violence": "allow"}}, {"Sexuality", "Self-Harm"}),
    ({"age": 9, "overrides": {"Violence": "rule"}}, MINOR_OR_MENTAL),
    ({"age": 35, "overrides": {"Violence": "rule"}}, set()),
    ({"religion": "Islam", "overrides": {"Hate": "allow", "Propaganda": "rule", "Shocking": "ban"}},
     {"Propaganda", "Shocking"}),
    ({"overrides": dict.fromkeys(ALL, "ban")}, ALL),
    ({"age": 9, "religion": "Islam", "overrides": dict.fromkeys(ALL, "allow")}, set()),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "banned"), CASES)
def test_the_rules_ban_exactly_these(fields: dict[str, Any], banned: set[str]) -> None:
    assert set(banned_categories(Profile(**fields))) == banned


@pytest.mark.parametrize(
    ("fields", "category", "reasons"),
    [
        ({"age": 17}, "Violence", (AGE,)),
        ({"age": 18}, "Violence", ()),
        ({"mental_condition": "war"}, "Sexuality", (MENTAL,)),
        ({"age": 17, "mental_condition": "war"}, "Self-Harm", (AGE, MENTAL)),
        ({"age": 17, "mental_condition": "war"}, "Hate", ()),
        ({"physical_condition": "hearing impairment"}, "Shocking", (BODY,)),
        ({"religion": "Islam"}, "Propaganda", (FAITH,)),
        ({"religion": "Islam", "physical_condition": "hearing impairment"}, "Harassment", (BODY,)),
        ({"age": 17, "overrides": {"Violence": "ban"}}, "Violence", (OWN,)),
        ({"age": 17, "overrides": {"Violence": "allow"}}, "Violence", (OWN,)),
        ({"age": 17, "overrides": {"Violence": "rule"}}, "Violence", (AGE,)),
    ],
)
def test_each_decision_gives_its_reasons(fields: dict[str, Any], category: str, reasons: tuple[str, ...]) -> None:
    assert decide(Profile(**fields))[category].reasons == reasons  # type: ignore[index]


@pytest.mark.parametrize(("fields", "banned"), CASES)
def test_every_ban_has_a_reason_and_every_category_a_decision(fields: dict[str, Any], banned: set[str]) -> None:
    decisions = decide(Profile(**fields))
    assert set(decisions) == ALL
    assert {category for category, decision in decisions.items() if decision.banned} == banned
    assert all(decision.reasons for decision in decisions.values() if decision.banned)


def test_banned_categories_come_in_the_order_of_the_paper() -> None:
    profile = Profile(age=9, religion="Islam", physical_condition="visual impairment")
    assert banned_categories(profile) == (
        "Hate",
        "Harassment",
        "Violence",
        "Self-Harm",
        "Sexuality",
        "Shocking",
        "Propaganda",
    )
