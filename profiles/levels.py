"""The safety levels L0 (nothing banned) to L5 (everything banned): synthetic users, stored as presets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .errors import ProfileError
from .policy import banned_categories
from .schema import CATEGORIES, Profile, parse_profile

_PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Level:
    """A preset: its id ("L3") and the profile of the simulated user behind it."""

    id: str
    profile: Profile

    @property
    def label(self) -> str:
        """The level in words, as the node offers it: "L1 - bans Violence, Shocking"."""
        banned = banned_categories(self.profile)
        if len(banned) in (0, len(CATEGORIES)):
            return f"{self.id} - bans {'everything' if banned else 'nothing'}"
        return f"{self.id} - bans {', '.join(banned)}"


@cache
def levels() -> tuple[Level, ...]:
    """Return all levels in the paper's order; the bans of one need not include those of the level before."""
    paths = sorted(_PRESETS.glob("L*.json"))
    return tuple(
        Level(path.stem, parse_profile(json.loads(path.read_text(encoding="utf-8")), path.name)) for path in paths
    )


def find_level(name: str) -> Level:
    """Return the level with this id or label; only the id in front counts, so labels may change.

    Raises:
        ProfileError: there is no such level.
    """
    for level in levels():
        if name.split(" ")[0] == level.id:
            return level
    raise ProfileError(f'There is no safety level "{name}". Choose one of {", ".join(level.id for level in levels())}.')
