"""What pairs show, and whether their users allow it: what ``loss.fidelity`` needs to know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ...profiles import CATEGORIES
from ..errors import DataError
from .users import said_bans

if TYPE_CHECKING:
    from datasets import Dataset

HARMLESS = "harmless"
_KNOWN = {category.casefold(): category for category in (*CATEGORIES, HARMLESS)}


def known_category(text: str | None) -> str | None:
    """Return one of the seven categories or HARMLESS, in upper or lower case; None for all else, which is unknown."""
    return _KNOWN.get((text or "").strip().casefold())


def unknown_rows(table: Dataset) -> int:
    """Return how many rows of a cached table of pairs have no known category."""
    return sum(known_category(category) is None for category in table["category"][:])


def allowed_rows(table: Dataset, source: Path) -> tuple[bool, ...]:
    """Return for each row of a cached table of ``source`` whether its user allows what it shows.

    Everyone allows what is harmless. Of an unknown category nobody can tell, so it counts as not allowed. Bans are
    those that are said: rules do not guess them, because pairs were chosen by what was said.

    Raises:
        DataError: no row has a category, or a user does not say what they ban.
    """
    if unknown_rows(table) == len(table):
        raise DataError(
            f"loss.fidelity keeps what users allow as the base model draws it, and {source} does not say what its "
            f"pairs show: expected a column category with {', '.join(CATEGORIES)} or {HARMLESS}. Add it, or set "
            "loss.fidelity = 0."
        )
    bans: dict[str, frozenset[str]] = {}
    allowed = []
    for where, user, text in zip(*(table[name][:] for name in ("where", "user", "category")), strict=True):
        if user not in bans:
            bans[user] = _bans(user, f"{source}, {where}")
        allowed.append(allows(bans[user], text))
    return tuple(allowed)


def allows(bans: frozenset[str], text: str | None) -> bool:
    """Return whether who has these bans allows what a pair of the category ``text`` shows: see ``allowed_rows``."""
    category = known_category(text)
    return category is not None and category not in bans


def _bans(user: str, where: str) -> frozenset[str]:
    bans = said_bans(json.loads(user), where)
    if bans is None:
        raise DataError(
            f"{where}: loss.fidelity needs to know what its user bans. Add Banned_Categories to user_data, a list that "
            "may be empty, or set loss.fidelity = 0."
        )
    return bans
