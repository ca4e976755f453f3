"""Which cached pairs are trained on, and which are only looked at: held-out pairs and unseen users."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..errors import DataError


class Split(NamedTuple):
    """Indices of pairs. No user of ``unseen`` is among those of ``train`` and ``seen``."""

    train: tuple[int, ...]
    seen: tuple[int, ...]
    unseen: tuple[int, ...]


def split_pairs(users: Sequence[str], held_out: float, unseen_users: float, generator: torch.Generator) -> Split:
    """Split pairs by their users' ids: first whole users, then a share of the pairs that are left.

    A share above 0 is at least one user, or one pair.

    Raises:
        DataError: nothing would be left to train on.
    """
    names = sorted(set(users))
    shuffled = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
    kept_out = set(shuffled[: math.ceil(unseen_users * len(names))])
    unseen = tuple(i for i, user in enumerate(users) if user in kept_out)
    rest = [i for i, user in enumerate(users) if user not in kept_out]
    order = torch.randperm(len(rest), generator=generator).tolist()
    count = math.ceil(held_out * len(rest))
    seen = tuple(sorted(rest[i] for i in order[:count]))
    train = tuple(sorted(rest[i] for i in order[count:]))
    if not train:
        raise DataError(
            f"Of {len(users)} pairs of {len(names)} users, {len(unseen)} belong to unseen users and {len(seen)} "
            "are held out: none is left to train on. Lower validation.unseen_users and validation.held_out, or get "
            "more pairs."
        )
    return Split(train, seen, unseen)
