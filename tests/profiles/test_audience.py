"""Several people who look at the same pictures, as one profile."""

from __future__ import annotations

import itertools

import pytest
import torch

from comfyui_psa.profiles import (
    Audience,
    Profile,
    ProfileError,
    banned_categories,
    decide,
    default_template,
    fill_template,
    levels,
)
from comfyui_psa.profiles.encoders import AttributesEncoder

CHILD = Profile(name="Qanzibel", age=9, religion="Islam", notes="plinder")
ADULT = Profile(age=40, religion="Islam", overrides={"Shocking": "ban", "Sexuality": "allow"})
ILL = Profile(age=40, mental_condition="war")


def test_what_one_of_them_bans_is_banned_for_the_reasons_of_those_who_do() -> None:
    decisions = decide(Audience.of(CHILD, ADULT, ILL))
    assert {category for category, decision in decisions.items() if decision.banned} == set().union(
        *(banned_categories(person) for person in (CHILD, ADULT, ILL))
    )
    assert decisions["Sexuality"].reasons == ("under 18", "a mental condition")
    assert decisions["Hate"].reasons == ("a religion with such boundaries",)
    assert decisions["Shocking"].reasons == ("your own choice",)
    assert not decisions["Harassment"].banned


def test_attributes_that_are_not_everybodys_are_nobodys() -> None:
    both = Audience.of(CHILD, ADULT)
    assert (both.age, both.religion, both.gender, both.name, both.notes) == (None, "Islam", None, "", "")


def test_one_person_is_an_audience_that_is_encoded_as_that_person() -> None:
    for level in levels():
        alone = Audience.of(level.profile)
        encoder = AttributesEncoder()
        assert torch.equal(encoder.encode([alone]), encoder.encode([level.profile]))
        assert fill_template(default_template(), alone) == fill_template(default_template(), level.profile)


def test_order_and_grouping_do_not_matter() -> None:
    people = (CHILD, ADULT, ILL)
    encoded = [
        AttributesEncoder().encode([audience])
        for a, b, c in itertools.permutations(people)
        for audience in (Audience.of(a, b, c), Audience.of(Audience.of(a, b), c), Audience.of(a, Audience.of(b, c)))
    ]
    assert all(torch.equal(encoded[0], other) for other in encoded)


@pytest.mark.parametrize("show", [repr, str, lambda audience: f"{audience}"])
def test_it_prints_nothing_of_anybody(show: object) -> None:
    assert callable(show)
    assert show(Audience.of(CHILD, ADULT)) == "Profile(private)"


def test_nobody_is_no_audience() -> None:
    with pytest.raises(ProfileError, match="nobody in it, so nothing would be banned"):
        Audience.of()
    with pytest.raises(ValueError, match="at least 1 item"):
        Audience(members=())
