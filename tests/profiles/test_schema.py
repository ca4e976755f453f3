"""The profile: what it accepts, what it says when it refuses, and that it never shows itself."""

from __future__ import annotations

import json
import pprint
import traceback
from importlib import resources
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from rich.pretty import pretty_repr

from comfyui_psa.profiles import Profile, ProfileError, parse_profile

MARKER = "Zorblax"
ATTRIBUTES = ("gender", "religion", "physical_condition", "mental_condition")

WHOLE = {
    "name": "evening",
    "age": 35,
    "gender": "female",
    "religion": "Buddhism",
    "physical_condition": "healthy",
    "mental_condition": "anxiety",
    "overrides": {"Violence": "ban", "Self-Harm": "allow", "Hate": "rule"},
    "notes": "for myself",
}

DOCUMENTS: list[tuple[Any, bool]] = [
    ({}, True),
    (WHOLE, True),
    ({"age": None}, True),
    ({"age": 0}, True),
    ({"age": 130}, True),
    ({"age": -1}, False),
    ({"age": 131}, False),
    ({"age": "35"}, False),
    ({"age": 35.5}, False),
    ({"age": True}, False),
    ({"gender": None}, True),
    ({"gender": "something else"}, True),
    ({"gender": 1}, False),
    ({"religion": ""}, True),
    ({"religion": ["Islam"]}, False),
    ({"physical_condition": "x" * 200}, True),
    ({"physical_condition": "x" * 201}, False),
    ({"mental_condition": {"war": True}}, False),
    ({"name": "x" * 201}, False),
    ({"name": None}, False),
    ({"notes": "x" * 5000}, True),
    ({"notes": "x" * 5001}, False),
    ({"notes": None}, False),
    ({"overrides": {}}, True),
    ({"overrides": {"Violence": "ban"}}, True),
    ({"overrides": {"Violence": "maybe"}}, False),
    ({"overrides": {"violence": "ban"}}, False),
    ({"overrides": {"Gambling": "ban"}}, False),
    ({"overrides": ["Violence"]}, False),
    ({"overrides": None}, False),
    ({"height": 180}, False),
    ([], False),
    ("a profile", False),
    (None, False),
]


@pytest.mark.parametrize(("document", "valid"), DOCUMENTS)
def test_a_document_is_accepted_or_refused(document: Any, valid: bool) -> None:
    if valid:
        parse_profile(document, "it")
    else:
        with pytest.raises(ProfileError):
            parse_profile(document, "it")


SHIPPED = json.loads((resources.files("comfyui_psa.profiles") / "profile.schema.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("schema", [Profile.model_json_schema(), SHIPPED], ids=["made", "shipped"])
@pytest.mark.parametrize(("document", "valid"), DOCUMENTS)
def test_the_json_schema_agrees_with_the_profile(schema: dict[str, Any], document: Any, valid: bool) -> None:
    Draft202012Validator.check_schema(schema)
    assert Draft202012Validator(schema).is_valid(document) == valid


def test_every_field_of_a_whole_document_arrives() -> None:
    assert parse_profile(WHOLE, "it").model_dump() == WHOLE


def test_an_empty_document_is_a_profile_that_says_nothing() -> None:
    profile = parse_profile({}, "it")
    assert profile.age is None
    assert all(getattr(profile, field) is None for field in ATTRIBUTES)
    assert profile.overrides == {}


@pytest.mark.parametrize("field", ATTRIBUTES)
@pytest.mark.parametrize("blank", ["", "  ", "\t\n"])
def test_a_blank_attribute_is_unsaid(field: str, blank: str) -> None:
    assert getattr(parse_profile({field: blank}, "it"), field) is None


@pytest.mark.parametrize("field", ["name", *ATTRIBUTES])
def test_blanks_around_a_text_are_dropped(field: str) -> None:
    assert getattr(parse_profile({field: "  two words \n"}, "it"), field) == "two words"


@pytest.mark.parametrize(
    ("document", "named", "expected"),
    [
        ({"age": MARKER}, "age", "whole number from 0 to 130"),
        ({"name": [MARKER]}, "name", "text of at most 200"),
        ({"gender": [MARKER]}, "gender", "text of at most 200"),
        ({"religion": {MARKER: MARKER}}, "religion", "text of at most 200"),
        ({"physical_condition": MARKER * 30}, "physical_condition", "text of at most 200"),
        ({"mental_condition": (MARKER,)}, "mental_condition", "text of at most 200"),
        ({"notes": MARKER * 1000}, "notes", "text of at most 5,000"),
        ({"overrides": MARKER}, "overrides", "ban, allow or rule"),
        ({"overrides": {"Violence": MARKER}}, "overrides", "ban, allow or rule"),
        ({"overrides": {MARKER: "ban"}}, "overrides", "Hate, Harassment, Violence"),
        ({MARKER: 1}, "fields", "name, age, gender"),
        (MARKER, "profile", "object"),
    ],
)
def test_a_refusal_names_file_field_and_expectation_but_never_the_value(
    document: Any, named: str, expected: str
) -> None:
    with pytest.raises(ProfileError) as refused:
        parse_profile(document, "The file mine.json")
    message = str(refused.value)
    assert message.startswith("The file mine.json")
    assert named in message
    assert expected in message
    assert MARKER not in "".join(traceback.format_exception(refused.value))
    assert MARKER not in repr(refused.value)


def test_a_refusal_names_every_wrong_field_once() -> None:
    with pytest.raises(ProfileError) as refused:
        parse_profile({"age": -1, "gender": 5, "overrides": {"Hate": "x", "Violence": "y"}}, "it")
    message = str(refused.value)
    assert message.count("age should be") == 1
    assert message.count("gender should be") == 1
    assert message.count("overrides should be") == 1


@pytest.mark.parametrize("field", list(Profile.model_fields))
def test_a_refusal_offers_null_only_where_null_is_accepted(field: str) -> None:
    with pytest.raises(ProfileError) as refused:
        parse_profile({field: 12.5}, "it")
    if "null" in str(refused.value):
        parse_profile({field: None}, "it")
    else:
        with pytest.raises(ProfileError):
            parse_profile({field: None}, "it")


def _secret() -> Profile:
    texts = dict.fromkeys(("name", *ATTRIBUTES, "notes"), MARKER)
    return Profile(age=87, overrides={"Propaganda": "ban"}, **texts)


@pytest.mark.parametrize(
    "shown",
    [repr, str, format, "{}".format, "{!r}".format, "%s".__mod__, pprint.pformat, lambda profile: repr([profile])],
)
def test_a_profile_shows_nothing_of_itself(shown: Any) -> None:
    text = shown(_secret())
    assert "Profile" in text
    assert not [word for word in (MARKER, "87", "Propaganda") if word in text]


def test_a_profile_shows_nothing_to_rich() -> None:
    text = pretty_repr(_secret())
    assert not [word for word in (MARKER, "87", "Propaganda") if word in text]


def test_a_profile_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Profile(age=5).age = 35  # type: ignore[misc]


@pytest.mark.parametrize(
    ("age", "group"),
    [
        (0, "infants & toddlers"),
        (3, "infants & toddlers"),
        (4, "children"),
        (12, "children"),
        (13, "adolescents"),
        (19, "adolescents"),
        (20, "young adults"),
        (34, "young adults"),
        (35, "middle-aged"),
        (59, "middle-aged"),
        (60, "young elderly"),
        (74, "young elderly"),
        (75, "elderly"),
        (89, "elderly"),
        (90, "long-lived elderly"),
        (130, "long-lived elderly"),
        (None, None),
    ],
)
def test_the_age_group_follows_from_the_age(age: int | None, group: str | None) -> None:
    assert Profile(age=age).age_group == group
