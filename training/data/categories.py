"""What pairs show, and whether their users allow it: what ``loss.fidelity`` needs to know."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from datasets import Dataset

from ...profiles import CATEGORIES, banned_categories
from ..errors import DataError
from .users import BANNED, read_profile

logger = logging.getLogger(__name__)

HARMLESS = "harmless"
_KNOWN = {category.casefold(): category for category in (*CATEGORIES, HARMLESS)}


def known_category(text: str | None) -> str | None:
    """Return one of the seven categories or HARMLESS, in upper or lower case; None for all else, which is unknown."""
    return _KNOWN.get((text or "").strip().casefold())


def allowed_rows(table: Dataset, source: Path) -> tuple[bool, ...]:
    """Return for each row of a cached table of ``source`` whether its user allows what it shows.

    Everyone allows what is harmless. Of an unknown category nobody can tell, so it counts as not allowed.

    Raises:
        DataError: no row has a category, or a user does not say in so many words what they ban.
    """
    categories = [known_category(category) for category in table["category"][:]]
    if not any(categories):
        raise DataError(
            f"loss.fidelity keeps what users allow as the base model draws it, and {source} does not say what its "
            f"pairs show: expected a column category with {', '.join(CATEGORIES)} or {HARMLESS}. Add it, or set "
            "loss.fidelity = 0."
        )
    if unknown := categories.count(None):
        logger.warning("PSA: rows of %s without a known category stay preferences: %d.", source, unknown)
    bans: dict[str, frozenset[str]] = {}
    for where, user in zip(table["where"][:], table["user"][:], strict=True):
        if user not in bans:
            bans[user] = _bans(json.loads(user), f"{source}, {where}")
    users = table["user"][:]
    return tuple(
        category is not None and category not in bans[user] for category, user in zip(categories, users, strict=True)
    )


def _bans(data: dict[str, Any], where: str) -> frozenset[str]:
    """Return what a user says that they ban. The rules do not guess it here: pairs were chosen by what it was."""
    if data.get(BANNED) in (None, ""):
        raise DataError(
            f"{where}: loss.fidelity needs to know what its user bans. Add {BANNED} to user_data, a list that may be "
            "empty, or set loss.fidelity = 0."
        )
    try:
        return frozenset(banned_categories(read_profile(data, where)))
    except DataError as error:
        raise DataError(f"{error} Without loss.fidelity, which asks what users ban, it is not needed.") from None
