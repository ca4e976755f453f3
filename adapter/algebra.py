"""What can be made of users without asking an adapter again: mixtures of several, and several in one batch.

    mixed:   what a layer adds for a mixture is the weighted sum of what it adds for its parts; likewise text tokens
    joined:  one user for each picture

Both are exact for every kind: vectors are added; gates stand beside each other as further heads, whose values carry the
weights; text residuals are added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import UserEffect
from .constant import SiteVectors
from .errors import AdapterError
from .gated import SiteGate
from .text import TextGate, TextResidual, TextShift, UserText


def mixed(effects: Sequence[UserEffect], weights: Sequence[float]) -> UserEffect:
    """Return what a mixture does. With one weight that is not zero, it does exactly what that user does.

    Args:
        effects: of one adapter; each of one user, or of as many as the others.
        weights: how much each counts; only their proportions do.

    Raises:
        AdapterError: a weight is negative or no number, or all are zero; or the numbers of users differ.
    """
    if any(not math.isfinite(weight) or weight < 0 for weight in weights) or not sum(weights):
        raise AdapterError(
            f"The weights of a mixture are {', '.join(f'{weight:g}' for weight in weights)}: expected numbers from 0 "
            "on, not all of them 0. Set at least one above 0."
        )
    parts = [(effect, weight / sum(weights)) for effect, weight in zip(effects, weights, strict=True) if weight]
    users = max(users_of(effect) for effect, _ in parts)
    if different := sorted({users_of(effect) for effect, _ in parts} - {1, users}):
        raise AdapterError(
            f"A mixture got {different[0]} users in one part and {users} in another. Mix one user with any number, "
            "or as many with as many."
        )
    effects = [_repeated(effect, users) for effect, _ in parts]
    shares = [share for _, share in parts]
    if len(parts) == 1:
        return effects[0]
    return UserEffect(
        constant=_mixed_vectors([effect.constant for effect in effects if effect.constant], shares),
        gated=tuple(_mixed_gates(site, shares) for site in zip(*_gates(effects), strict=True)) or None,
        text=_mixed_text([effect.text for effect in effects if effect.text], shares),
    )


def joined(effects: Sequence[UserEffect]) -> UserEffect:
    """Return what all the users of several effects of one adapter do, one behind the other."""
    if len(effects) == 1:
        return effects[0]
    vectors = [effect.constant for effect in effects if effect.constant]
    text = [effect.text for effect in effects if effect.text]
    return UserEffect(
        constant=SiteVectors(_joined_rows([found.user for found in vectors]), vectors[0].null) if vectors else None,
        gated=tuple(_joined_gates(site) for site in zip(*_gates(effects), strict=True)) or None,
        text=_joined_text(text) if text else None,
    )


def users_of(effect: UserEffect) -> int:
    """Return how many users an effect is of."""
    if effect.constant is not None:
        return effect.constant.user[0].shape[0]
    if effect.gated is not None:
        return effect.gated[0].values.shape[0]
    assert effect.text is not None  # an adapter acts in some way
    return effect.text.users


def _gates(effects: Sequence[UserEffect]) -> list[tuple[SiteGate, ...]]:
    return [effect.gated for effect in effects if effect.gated]


def _repeated(effect: UserEffect, users: int) -> UserEffect:
    return effect if users_of(effect) == users else joined([effect] * users)


def _mixed_vectors(parts: Sequence[SiteVectors], shares: Sequence[float]) -> SiteVectors | None:
    if not parts:
        return None
    sites = zip(*(part.user for part in parts), strict=True)
    user = tuple(_weighted_sum(values, shares) for values in sites)
    return SiteVectors(user, parts[0].null)  # nobody's own: the adapter's


def _weighted_sum(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([share * value for value, share in zip(values, shares, strict=True)]).sum(dim=0)


def _mixed_gates(parts: Sequence[SiteGate], shares: Sequence[float]) -> SiteGate:
    values = [share * part.values for part, share in zip(parts, shares, strict=True)]
    scores, sinks = [part.scores for part in parts], [part.sink for part in parts]
    return SiteGate(torch.cat(scores, dim=-1), torch.cat(values, dim=-2), torch.cat(sinks))


def _mixed_text(parts: Sequence[UserText], shares: Sequence[float]) -> UserText | None:
    if not parts:
        return None
    pooled = [part.on_pooled for part in parts if part.on_pooled]
    tokens = _mixed_residuals([part.on_tokens for part in parts], shares)
    return UserText(tokens, _mixed_residuals(pooled, shares) if pooled else None)


def _mixed_residuals(parts: Sequence[TextResidual], shares: Sequence[float]) -> TextResidual:
    gates = [part for part in parts if isinstance(part, TextGate)]
    if gates:
        return gates[0]._replace(gate=_mixed_gates([part.gate for part in gates], shares))
    shifts = [part for part in parts if isinstance(part, TextShift)]
    counts = [share * part.shares for part, share in zip(shifts, shares, strict=True)]
    biases = torch.cat([part.biases for part in shifts], dim=1)
    return shifts[0]._replace(biases=biases, shares=torch.cat(counts, dim=1))


def _joined_rows(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(site) for site in zip(*parts, strict=True))


def _joined_gates(parts: Sequence[SiteGate]) -> SiteGate:
    """Users who are fewer people than others get heads that add nothing."""
    columns = max(part.values.shape[-2] for part in parts)
    sinks = max((part.sink for part in parts), key=len)
    scores = [F.pad(part.scores, (0, columns - part.scores.shape[-1])) for part in parts]
    values = [F.pad(part.values, (0, 0, 0, columns - part.values.shape[-2])) for part in parts]
    return SiteGate(torch.cat(scores), torch.cat(values), sinks)


def _joined_text(parts: Sequence[UserText]) -> UserText:
    pooled = [part.on_pooled for part in parts if part.on_pooled]
    return UserText(
        _joined_residuals([part.on_tokens for part in parts]), _joined_residuals(pooled) if pooled else None
    )


def _joined_residuals(parts: Sequence[TextResidual]) -> TextResidual:
    gates = [part for part in parts if isinstance(part, TextGate)]
    if gates:
        return gates[0]._replace(gate=_joined_gates([part.gate for part in gates]))
    shifts = [part for part in parts if isinstance(part, TextShift)]
    most = max(part.shares.shape[1] for part in shifts)
    biases = [F.pad(part.biases, (0, 0, 0, most - part.shares.shape[1])) for part in shifts]
    shares = [F.pad(part.shares, (0, most - part.shares.shape[1])) for part in shifts]
    return shifts[0]._replace(biases=torch.cat(biases), shares=torch.cat(shares))
