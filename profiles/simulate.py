"""Simulated users with the published distribution and constraints (arXiv 2508.01151, the Sage users)."""

from __future__ import annotations

import numpy as np

from .policy import category_lists
from .schema import (
    AGE_GROUPS,
    GENDERS,
    MENTAL_CONDITIONS,
    PHYSICAL_CONDITIONS,
    RELIGIONS,
    Profile,
)

OLDEST = 100

_AGE_GROUP_PROBABILITIES = (0.05, 0.20, 0.20, 0.20, 0.20, 0.10, 0.04, 0.01)
_RELIGION_PROBABILITIES = (0.3, 0.2, 0.2, 0.3)
_PHYSICAL_PROBABILITIES = (0.2, 0.2, 0.2, 0.4)
_MENTAL_PROBABILITIES = (0.15, 0.15, 0.075, 0.075, 0.075, 0.075, 0.4)

# The youngest age at which a value is plausible; a user below it is drawn again.
_YOUNGEST = {
    "Christianity": 8,
    "Islam": 8,
    "Buddhism": 8,
    "depression": 5,
    "anxiety": 5,
    "major accidents": 5,
    "sexual assault": 13,
    "war": 18,
}


def simulate_users(count: int, seed: int) -> list[Profile]:
    """Draw ``count`` users; the same seed gives the same users, and more users begin with the same ones."""
    rng = np.random.default_rng(seed)
    users: list[Profile] = []
    while len(users) < count:
        user = _draw(rng)
        if _plausible(user):
            users.append(user)
    return users


def user_row(number: int, user: Profile) -> dict[str, str]:
    """Return a user as a row of the release's ``users.csv``, with its seven-digit ``User_ID``."""
    banned, allowed = category_lists(user)
    row = {
        "User_ID": f"{number:07d}",
        "Age": user.age,
        "Age_Group": user.age_group,
        "Gender": user.gender,
        "Religion": user.religion,
        "Physical_Condition": user.physical_condition,
        "Mental_Condition": user.mental_condition,
        "Banned_Categories": banned,
        "Allowed_Categories": allowed,
    }
    return {column: str(value) for column, value in row.items()}


def _draw(rng: np.random.Generator) -> Profile:
    group = int(rng.choice(len(AGE_GROUPS), p=_AGE_GROUP_PROBABILITIES))
    first = AGE_GROUPS[group][1]
    last = AGE_GROUPS[group + 1][1] - 1 if group + 1 < len(AGE_GROUPS) else OLDEST
    return Profile(
        age=int(rng.integers(first, last, endpoint=True)),
        gender=str(rng.choice(GENDERS)),
        religion=str(rng.choice(RELIGIONS, p=_RELIGION_PROBABILITIES)),
        physical_condition=str(rng.choice(PHYSICAL_CONDITIONS, p=_PHYSICAL_PROBABILITIES)),
        mental_condition=str(rng.choice(MENTAL_CONDITIONS, p=_MENTAL_PROBABILITIES)),
    )


def _plausible(user: Profile) -> bool:
    return all((user.age or 0) >= _YOUNGEST.get(value or "", 0) for value in (user.religion, user.mental_condition))
