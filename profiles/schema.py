"""Who the user is: the profile, its seven categories and the values that the paper offers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, StringConstraints, ValidationError

from .errors import ProfileError

Category = Literal["Hate", "Harassment", "Violence", "Self-Harm", "Sexuality", "Shocking", "Propaganda"]
Override = Literal["ban", "allow", "rule"]

CATEGORIES: tuple[Category, ...] = get_args(Category)
GENDERS = ("male", "female")
RELIGIONS = ("Christianity", "Islam", "Buddhism", "None")
PHYSICAL_CONDITIONS = ("visual impairment", "hearing impairment", "intellectual disability", "healthy")
MENTAL_CONDITIONS = (
    "depression",
    "anxiety",
    "war",
    "sexual assault",
    "major accidents",
    "natural disasters",
    "healthy",
)

# The paper's age groups by their first year; the last one ends with the oldest age that a profile takes.
AGE_GROUPS: tuple[tuple[str, int], ...] = (
    ("infants & toddlers", 0),
    ("children", 4),
    ("adolescents", 13),
    ("young adults", 20),
    ("middle-aged", 35),
    ("young elderly", 60),
    ("elderly", 75),
    ("long-lived elderly", 90),
)
MAX_AGE = 130


def age_group(age: int) -> str:
    """Return the paper's name for the age group of ``age`` (years)."""
    return next(name for name, first in reversed(AGE_GROUPS) if age >= first)


def _blank_to_none(value: Any) -> Any:
    return None if isinstance(value, str) and not value.strip() else value


_Text = Annotated[str, StringConstraints(strip_whitespace=True, max_length=200)]
_Attribute = Annotated[_Text | None, BeforeValidator(_blank_to_none)]


class Profile(BaseModel):
    """A person's boundaries. Every attribute may stay unsaid (None); free text is allowed beside the offers.

    ``overrides`` decides single categories against the rules; "rule", like leaving a category out, follows
    them. ``notes`` are for the owner alone and enter no prompt and no embedding. Printing a profile shows
    nothing of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: _Text = ""
    age: Annotated[StrictInt, Field(ge=0, le=MAX_AGE)] | None = None
    gender: _Attribute = Field(None, examples=list(GENDERS))
    religion: _Attribute = Field(None, examples=list(RELIGIONS))
    physical_condition: _Attribute = Field(None, examples=list(PHYSICAL_CONDITIONS))
    mental_condition: _Attribute = Field(None, examples=list(MENTAL_CONDITIONS))
    overrides: dict[Category, Override] = Field(default_factory=dict)
    notes: Annotated[str, StringConstraints(max_length=5000)] = ""

    @property
    def age_group(self) -> str | None:
        """The paper's age group, or None if the age is unsaid."""
        return None if self.age is None else age_group(self.age)

    def __repr__(self) -> str:
        """Say nothing: ComfyUI prints node inputs into error reports."""
        return "Profile(private)"

    __str__ = __repr__

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        """Say nothing to rich and pydantic either."""
        return []


class Audience(Profile):
    """Several people who look at the same pictures: what one of them bans is banned (``policy.decide``).

    An attribute that not all of them share is unsaid.
    """

    members: Annotated[tuple[Profile, ...], Field(min_length=1)]

    @classmethod
    def of(cls, *profiles: Profile) -> Audience:
        """Return the audience of these people; audiences among them are taken apart.

        Raises:
            ProfileError: it would be nobody.
        """
        if not profiles:
            raise ProfileError("The audience has nobody in it, so nothing would be banned. Name at least one profile.")
        members = [
            member
            for profile in profiles
            for member in (profile.members if isinstance(profile, Audience) else (profile,))
        ]
        attributes = ("age", "gender", "religion", "physical_condition", "mental_condition")
        shared = {name: values.pop() for name in attributes if len(values := {getattr(m, name) for m in members}) == 1}
        return cls(members=tuple(members), **shared)


def parse_profile(data: Any, source: str) -> Profile:
    """Validate a profile read from ``source`` (a name for messages).

    Raises:
        ProfileError: names each wrong field and what it should be, never the value found.
    """
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(dict.fromkeys(_problem(e["loc"], e["type"]) for e in error.errors(include_input=False)))
        raise ProfileError(f"{source} is not a valid profile: {problems}. Correct it and try again.") from None


def _problem(loc: tuple[int | str, ...], kind: str) -> str:
    field = str(loc[0]) if loc else ""
    if kind == "extra_forbidden" or field not in Profile.model_fields:
        return f"it may only have the fields {', '.join(Profile.model_fields)}" if loc else "it should be an object"
    expected = {
        "name": "text of at most 200 characters",
        "age": f"a whole number from 0 to {MAX_AGE}, or null",
        "overrides": f"ban, allow or rule for some of {', '.join(CATEGORIES)}",
        "notes": "text of at most 5,000 characters",
    }.get(field, "text of at most 200 characters, or null")
    return f"{field} should be {expected}"
