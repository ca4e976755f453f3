"""Prompt templates: the text about a user that a language model reads.

The placeholders are those of the published release: ``<<AGE>>``, ``<<AGE_GROUP>>``, ``<<GENDER>>``,
``<<RELIGION>>``, ``<<PHYSICAL>>``, ``<<MENTAL>>``, ``<<BANNED>>`` and ``<<ALLOWED>>``.
"""

from __future__ import annotations

import re
from pathlib import Path

from .errors import EncoderError
from .policy import category_lists
from .schema import Profile

DEFAULT_TEMPLATE = Path(__file__).parent / "templates" / "default.txt"
UNSAID = "not specified"

_PLACEHOLDER = re.compile(r"<<([^<>]+)>>")


def default_template() -> str:
    """Return this pack's own template, for adapters trained with it."""
    return DEFAULT_TEMPLATE.read_text(encoding="utf-8")


def fill_template(template: str, profile: Profile) -> str:
    """Fill in a profile. Category lists look as in the release: alphabetical, ``['Hate', 'Violence']``.

    Raises:
        EncoderError: the template has an unknown placeholder, or none at all.
    """
    banned, allowed = category_lists(profile)
    values = {
        "AGE": profile.age,
        "AGE_GROUP": profile.age_group,
        "GENDER": profile.gender,
        "RELIGION": profile.religion,
        "PHYSICAL": profile.physical_condition,
        "MENTAL": profile.mental_condition,
        "BANNED": banned,
        "ALLOWED": allowed,
    }
    names = set(_PLACEHOLDER.findall(template))
    if not names or names - values.keys():
        found = ", ".join(f"<<{name}>>" for name in sorted(names)) or "none"
        raise EncoderError(
            f"The prompt template has the placeholders {found}; expected some of "
            f"{', '.join(f'<<{name}>>' for name in values)}. Convert the adapter with the right --template."
        )
    return _PLACEHOLDER.sub(lambda match: _text(values[match[1]]), template)


def _text(value: object) -> str:
    return UNSAID if value is None else str(value)
