"""The ``attributes`` encoder: a profile's fields and bans as a vector, without any language model.

Version 1, 37 numbers: each of the seven categories (1 banned, -1 allowed); age / 100; then one-hot groups
for age group (8), gender (3), religion (5), physical condition (5) and mental condition (8), where the last
entry of each but the age group means "another value". An unsaid attribute is all zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..policy import banned_categories
from ..schema import (
    AGE_GROUPS,
    CATEGORIES,
    GENDERS,
    MENTAL_CONDITIONS,
    PHYSICAL_CONDITIONS,
    RELIGIONS,
    Profile,
)

NAME = "attributes-1"
DIM = 37


class AttributesEncoder:
    """Deterministic and instant; for adapters that were trained on it."""

    identity = NAME

    def cache_key(self, profile: Profile) -> None:
        """Nothing to cache: encoding takes microseconds."""

    def encode(self, profiles: Sequence[Profile]) -> Tensor:
        """Return float32 ``[len(profiles), 37]``."""
        return torch.tensor([_encode(profile) for profile in profiles], dtype=torch.float32).reshape(-1, DIM)

    def encode_batches(self, profiles: Sequence[Profile], batch_size: int = 8) -> Iterator[Tensor]:
        """Yield float32 ``[<= batch_size, 37]`` in order."""
        for start in range(0, len(profiles), batch_size):
            yield self.encode(profiles[start : start + batch_size])


def _encode(profile: Profile) -> list[float]:
    banned = banned_categories(profile)
    return [
        *(1.0 if category in banned else -1.0 for category in CATEGORIES),
        (profile.age or 0) / 100,
        *_one_hot(profile.age_group, [name for name, _ in AGE_GROUPS]),
        *_one_hot_or_other(profile.gender, GENDERS),
        *_one_hot_or_other(profile.religion, RELIGIONS),
        *_one_hot_or_other(profile.physical_condition, PHYSICAL_CONDITIONS),
        *_one_hot_or_other(profile.mental_condition, MENTAL_CONDITIONS),
    ]


def _one_hot(value: str | None, offers: Sequence[str]) -> list[float]:
    known = value.casefold() if value else None
    return [float(known == offer.casefold()) for offer in offers]


def _one_hot_or_other(value: str | None, offers: Sequence[str]) -> list[float]:
    hot = _one_hot(value, offers)
    return [*hot, float(bool(value) and not any(hot))]
