"""Prompt templates: every placeholder, the look of the release's lists, and what never enters a prompt."""

from __future__ import annotations

import pytest

from comfyui_psa.profiles import EncoderError, Profile, default_template, fill_template

PLACEHOLDERS = ("AGE", "AGE_GROUP", "GENDER", "RELIGION", "PHYSICAL", "MENTAL", "BANNED", "ALLOWED")


def test_every_placeholder_is_filled() -> None:
    profile = Profile(
        age=35,
        gender="female",
        religion="Islam",
        physical_condition="hearing impairment",
        mental_condition="war",
        overrides={"Hate": "allow", "Self-Harm": "allow", "Harassment": "allow"},
    )
    template = "<<AGE>>|<<AGE_GROUP>>|<<GENDER>>|<<RELIGION>>|<<PHYSICAL>>|<<MENTAL>>|<<BANNED>>|<<ALLOWED>>"
    assert fill_template(template, profile) == (
        "35|middle-aged|female|Islam|hearing impairment|war|"
        "['Propaganda', 'Sexuality', 'Shocking', 'Violence']|['Harassment', 'Hate', 'Self-Harm']"
    )


def test_a_repeated_placeholder_is_filled_everywhere() -> None:
    assert fill_template("<<AGE>> and <<AGE>>", Profile(age=7)) == "7 and 7"


def test_lists_are_alphabetical() -> None:
    profile = Profile(overrides={"Violence": "ban", "Hate": "ban"})
    assert fill_template("<<BANNED>>", profile) == "['Hate', 'Violence']"


def test_an_empty_list_looks_like_one() -> None:
    assert fill_template("<<BANNED>>", Profile()) == "[]"


def test_what_is_unsaid_is_not_specified() -> None:
    template = "<<AGE>>, <<AGE_GROUP>>, <<GENDER>>, <<RELIGION>>, <<PHYSICAL>>, <<MENTAL>>"
    assert fill_template(template, Profile()) == ", ".join(["not specified"] * 6)


def test_age_0_is_said() -> None:
    assert fill_template("<<AGE>> (<<AGE_GROUP>>)", Profile(age=0)) == "0 (infants & toddlers)"


def test_a_value_that_looks_like_a_placeholder_is_left_alone() -> None:
    profile = Profile(age=44, gender="<<AGE>>", religion="<<UNKNOWN>>", mental_condition=r"\1 \g<0>")
    assert fill_template("<<GENDER>> <<RELIGION>> <<MENTAL>>", profile) == r"<<AGE>> <<UNKNOWN>> \1 \g<0>"


def test_a_placeholder_in_the_template_that_nobody_knows_is_refused() -> None:
    with pytest.raises(EncoderError) as refused:
        fill_template("<<AGE>> <<USER_DATA>>", Profile(age=5))
    assert "<<USER_DATA>>" in str(refused.value)
    assert "<<AGE_GROUP>>" in str(refused.value)


@pytest.mark.parametrize("template", ["", "no placeholder", "<AGE> {AGE} <<>>"])
def test_a_template_without_placeholders_is_refused(template: str) -> None:
    with pytest.raises(EncoderError, match="none"):
        fill_template(template, Profile(age=5))


def test_a_refusal_says_nothing_of_the_profile() -> None:
    with pytest.raises(EncoderError) as refused:
        fill_template("<<ZORK>>", Profile(age=87, religion="Zorblax"))
    assert "Zorblax" not in str(refused.value)
    assert "87" not in str(refused.value)


def test_name_and_notes_never_enter() -> None:
    template = " ".join(f"<<{name}>>" for name in PLACEHOLDERS)
    assert fill_template(template, Profile(name="Zorblax", notes="Zorblax")) == fill_template(template, Profile())


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
def test_the_default_template_has_every_placeholder(placeholder: str) -> None:
    assert f"<<{placeholder}>>" in default_template()


def test_the_default_template_leaves_no_placeholder_behind() -> None:
    text = fill_template(default_template(), Profile(age=5, gender="female"))
    assert "<<" not in text
    assert "5 (children)" in text
