"""What a batch of users changes of a UNet's call: at its layers, and of the text that it reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...adapter import SiteGate, UserEffect, UserText


class Text(NamedTuple):
    """What a UNet reads: ``hidden`` ``[n, tokens, dim]``; ``pooled`` ``[n, dim]`` for SDXL, else None."""

    hidden: Tensor
    pooled: Tensor | None = None

    def of_users(self, users: UserText, strength: float = 1.0) -> Text:
        """Return the users' versions of it, one user for each row."""
        pooled = None if self.pooled is None else users.pooled(self.pooled, strength)
        return Text(users.tokens(self.hidden, strength), pooled)

    def repeated(self, times: int) -> Text:
        """Return it several times, one behind the other."""
        return Text(self.hidden.repeat(times, 1, 1), None if self.pooled is None else self.pooled.repeat(times, 1))

    def followed_by(self, other: Text) -> Text:
        """Return this text and another one of the same kind behind it."""
        if self.pooled is None or other.pooled is None:
            return Text(torch.cat((self.hidden, other.hidden)))
        return Text(torch.cat((self.hidden, other.hidden)), torch.cat((self.pooled, other.pooled)))

    def added(self, time_ids: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
        """Return what a UNet takes besides ``hidden``, in ``dtype``; ``time_ids`` ``[pictures, 6]`` are repeated.

        They stay float32: in bf16 a size of 1365 would be 1368.
        """
        if self.pooled is None or time_ids is None:
            return {}
        times = self.pooled.shape[0] // time_ids.shape[0]
        return {"added_cond_kwargs": {"text_embeds": self.pooled.to(dtype), "time_ids": time_ids.repeat(times, 1)}}


class UNetInputs(NamedTuple):
    """Of ``n`` pictures: ``vectors[i]`` is ``[n, hidden_i]``, ``gates[i]`` of ``n`` users; what is missing is empty."""

    text: Text
    vectors: tuple[Tensor, ...] = ()
    gates: tuple[SiteGate, ...] = ()

    def repeated(self, times: int) -> UNetInputs:
        """Return a batch that is this one several times."""
        gates = tuple(gate.repeated(times) for gate in self.gates)
        return UNetInputs(self.text.repeated(times), tuple(v.repeat(times, 1) for v in self.vectors), gates)


def guided_inputs(effect: UserEffect | None, negative: Text, positive: Text, strength: float = 1.0) -> UNetInputs:
    """Return a batch for classifier-free guidance: the unconditional half, then the users' own.

    Args:
        effect: of as many users as there are prompts, on the device of the text; None for the base.
        negative: the prompts of the unconditional half.
        positive: the prompts of the users.
        strength: how much of the effect; 0 gives the base.
    """
    if effect is None:
        return UNetInputs(negative.followed_by(positive))
    if effect.text is not None:
        positive = positive.of_users(effect.text, strength)
    vectors: tuple[Tensor, ...] = ()
    if effect.constant is not None:
        pairs = zip(effect.constant.nulls(), effect.constant.user, strict=True)
        vectors = tuple(strength * torch.cat((null.expand_as(user), user)) for null, user in pairs)
    gates = tuple(
        SiteGate(torch.cat((g.scores, g.scores)), torch.cat((torch.zeros_like(g.values), strength * g.values)), g.sink)
        for g in effect.gated or ()
    )
    return UNetInputs(negative.followed_by(positive), vectors, gates)
