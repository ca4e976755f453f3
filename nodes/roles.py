"""Which parts of a batch are the user's: the conditional ones.

``cond_or_uncond`` holds positions in whatever list a guider passes, and guiders differ. So the guider's own names
("positive", "negative", ...) are written into the conditionings when a run begins, and read back with every call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..adapter import AdapterError

Options = dict[str, Any]
Roles = tuple[bool, ...]

COUPLE_KEY = "cond_or_uncond_couple"  # left by Attention Couple, which repeats conditional chunks

# How guiders name the conditionings that are no prompt of the user's ("negative", "empty_negative_prompt").
_UNCONDITIONAL_NAMES = ("negative", "uncond", "empty")
_ROLE_KEY = "psa_role"


def name_roles(conds: Mapping[str, Sequence[Options]]) -> None:
    """Write the names that a guider gives its conditionings into them."""
    for name, entries in conds.items():
        for cond in entries:
            cond[_ROLE_KEY] = name


def roles_of(conds: Sequence[Sequence[Options] | None]) -> Roles:
    """Return for each conditioning of a call whether it is the user's.

    Its first entry counts: ComfyUI appends copies of other conditionings' areas behind it. Conditionings
    without a name (made outside of a guider) go by ComfyUI's custom that the first is the positive one.
    """
    names = [cond[0].get(_ROLE_KEY) if cond else None for cond in conds]
    return tuple(is_users(name, i) for i, name in enumerate(names))


def is_users(name: str | None, position: int) -> bool:
    """Return whether a conditioning with this name, or at this position if it has none, is the user's."""
    return position == 0 if name is None else not any(word in name for word in _UNCONDITIONAL_NAMES)


def made_of_others(couple: Sequence[int], chunks: Sequence[int]) -> tuple[tuple[int, bool], ...] | None:
    """Return for each chunk of a batch that Attention Couple has made larger of which one it was made, and whether it
    has been put in.

    Of each conditional chunk it makes several: the first stays as it was, the others have other prompts.

    Args:
        couple: what it says of the batch that it has made.
        chunks: the same of the batch that came; if ``couple`` cannot have been made of it, the answer is None.
    """
    places: Counter[int] = Counter()
    found = []
    for chunk in couple:
        came = [i for i, other in enumerate(chunks) if other == chunk]
        if not came or couple.count(chunk) % len(came):
            return None
        copies = couple.count(chunk) // len(came)
        found.append((came[places[chunk] // copies], places[chunk] % copies != 0))
        places[chunk] += 1
    return tuple(found)


def chunks_of_user(chunks: Sequence[int], roles: Roles | None) -> Roles:
    """Return for each chunk of ``cond_or_uncond`` whether it is the user's.

    Raises:
        AdapterError: a chunk is of a conditioning that nobody has named.
    """
    if roles is None:
        return tuple(chunk == 0 for chunk in chunks)
    if max(chunks) >= len(roles):
        raise AdapterError(
            "Another node calls the model with a conditioning of its own, and PSA cannot tell whose it is. Remove that "
            "node, or place Apply PSA behind it, right before the sampler."
        )
    return tuple(roles[chunk] for chunk in chunks)
