"""The paper's adapter: one user token, hence one constant vector per cross-attention layer.

``Attn(q, W_k u, W_v u)`` over a single key has a softmax of 1, so it equals ``W_v u`` for every query and
``W_k`` has no effect: keys are neither kept nor computed (arXiv 2508.01151; docs/architecture.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class SiteVectors(NamedTuple):
    """What a user adds at each site, in front of ``to_out``: the contract with both runtimes.

    ``user[i]`` is ``[users, hidden_i]``; ``null[i]`` is ``[hidden_i]`` for the unconditional half, and
    ``null`` is None if that half stays the untouched base.
    """

    user: tuple[Tensor, ...]
    null: tuple[Tensor, ...] | None

    def nulls(self) -> tuple[Tensor, ...]:
        """Return per site ``[hidden_i]`` for the unconditional half: zeros if it stays untouched."""
        return self.null or tuple(torch.zeros_like(user[0]) for user in self.user)

    def rows(self) -> tuple[Tensor, ...]:
        """Return per site ``[users + 1, hidden_i]``: the users, then the unconditional half."""
        return tuple(torch.cat((user, null[None])) for user, null in zip(self.user, self.nulls(), strict=True))


class UserCrossAttention(nn.Module):
    """The user's values at one cross-attention layer; zero at the start, so that training begins at the base."""

    def __init__(self, cross_attention_dim: int, hidden_size: int) -> None:
        """Make the values of a layer of width ``hidden_size``."""
        super().__init__()
        self.to_v_user = nn.Linear(cross_attention_dim, hidden_size, bias=False)
        nn.init.zeros_(self.to_v_user.weight)

    def forward(self, user_token: Tensor) -> Tensor:
        """Map user tokens ``[users, cross_attention_dim]`` to ``[users, hidden_size]``."""
        return self.to_v_user(user_token)
