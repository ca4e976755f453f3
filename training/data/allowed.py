"""Which pairs show what their user allows: those that ``loss.fidelity`` keeps as the base model draws them."""

from __future__ import annotations

from ...profiles import CATEGORIES, banned_categories
from ..errors import DataError
from .cached import CachedPairs
from .users import read_profile

HARMLESS = (None, "", "harmless")  # what the column ``category`` says of a pair that shows none of the seven


def allowed_pairs(cached: CachedPairs) -> tuple[bool, ...]:
    """Return for each usable pair whether its user allows its ``category``; everyone allows what is harmless.

    Raises:
        DataError: the set has no categories, or another one than the seven, or does not say what a user bans.
    """
    if all(category in HARMLESS for category in cached.row_categories):
        raise DataError(
            "loss.fidelity keeps what a user allows as the base model draws it, and the pairs do not say what they "
            f"show: expected a column category with {', '.join(CATEGORIES)}, or nothing for harmless pairs. Add it, or "
            "set loss.fidelity = 0."
        )
    bans: dict[str, frozenset[str]] = {}
    allowed = []
    for index, (user, category) in enumerate(zip(cached.row_users, cached.row_categories, strict=True)):
        if category not in HARMLESS and category not in CATEGORIES:
            where, _ = cached.user_data(index)
            raise DataError(
                f'{where} has the category "{category}"; loss.fidelity needs one of {", ".join(CATEGORIES)}, or '
                "nothing for a harmless pair. Correct it, or set loss.fidelity = 0."
            )
        if user not in bans:
            bans[user] = _bans(cached, index)
        allowed.append(category not in bans[user])
    return tuple(allowed)


def _bans(cached: CachedPairs, index: int) -> frozenset[str]:
    where, data = cached.user_data(index)
    try:
        return frozenset(banned_categories(read_profile(data, where)))
    except DataError:
        raise DataError(
            f"{where}: loss.fidelity needs to know what its user bans, and user_data does not say it in a way that can "
            "be read. Add Banned_Categories, a list of categories, or set loss.fidelity = 0."
        ) from None
