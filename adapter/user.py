"""The user as tokens: what every kind of adapter starts from."""

from __future__ import annotations

from torch import Tensor, nn


class UserProjection(nn.Module):
    """User embedding to user tokens: ``u_t = LayerNorm(W_t e + b_t)``; the paper has one token."""

    def __init__(self, embedding_dim: int, token_dim: int, num_tokens: int = 1) -> None:
        """Make a projection from ``embedding_dim`` to ``num_tokens`` tokens of width ``token_dim``."""
        super().__init__()
        self.proj = nn.Linear(embedding_dim, num_tokens * token_dim)
        self.norm = nn.LayerNorm(token_dim)

    def forward(self, embedding: Tensor) -> Tensor:
        """Map ``[users, embedding_dim]`` to ``[users, num_tokens, token_dim]``."""
        return self.norm(self.proj(embedding).unflatten(-1, (-1, self.norm.normalized_shape[0])))
