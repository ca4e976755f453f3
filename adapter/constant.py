"""The paper's adapter: one user token, hence one constant vector per cross-attention layer.

``Attn(q, W_k u, W_v u)`` over a single key has a softmax of 1, so it equals ``W_v u`` for every query and
``W_k`` has no effect: keys are neither kept nor computed (arXiv 2508.01151; docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import AdapterConfig, NullMode
from .errors import AdapterError
from .families import describe
from .sites import Site


class SiteVectors(NamedTuple):
    """What a user adds at each site, in front of ``to_out``: the contract with both runtimes.

    ``user[i]`` is ``[users, hidden_i]``; ``null[i]`` is ``[hidden_i]`` for the unconditional half, and
    ``null`` is None if that half stays the untouched base.
    """

    user: tuple[Tensor, ...]
    null: tuple[Tensor, ...] | None


class UserProjection(nn.Module):
    """User embedding to user token: ``u = LayerNorm(W e + b)``."""

    def __init__(self, embedding_dim: int, cross_attention_dim: int) -> None:
        """Make a projection from ``embedding_dim`` to ``cross_attention_dim``."""
        super().__init__()
        self.proj = nn.Linear(embedding_dim, cross_attention_dim)
        self.norm = nn.LayerNorm(cross_attention_dim)

    def forward(self, embedding: Tensor) -> Tensor:
        """Map ``[users, embedding_dim]`` to ``[users, cross_attention_dim]``."""
        return self.norm(self.proj(embedding))


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


class PSAAdapter(nn.Module):
    """A whole adapter: projection, one user cross-attention per site, and its configuration.

    ``embedding_mean`` and ``embedding_std`` (``[embedding_dim]``) standardise user embeddings; the paper's
    adapters have 0 and 1. Parameters are float32.
    """

    embedding_mean: Tensor
    embedding_std: Tensor

    def __init__(self, config: AdapterConfig) -> None:
        """Make an adapter that changes nothing yet (all values are zero)."""
        super().__init__()
        self.config = config
        self.user_proj = UserProjection(config.embedding_dim, config.cross_attention_dim)
        self.sites = nn.ModuleList(UserCrossAttention(config.cross_attention_dim, size) for size in config.hidden_sizes)
        self.register_buffer("embedding_mean", torch.zeros(config.embedding_dim))
        self.register_buffer("embedding_std", torch.ones(config.embedding_dim))

    def user_token(self, embedding: Tensor) -> Tensor:
        """Project embeddings ``[users, embedding_dim]`` to user tokens ``[users, cross_attention_dim]``."""
        if embedding.ndim != 2 or embedding.shape[1] != self.config.embedding_dim:
            raise AdapterError(
                f"The user embedding has shape {list(embedding.shape)}, but this adapter expects "
                f"[users, {self.config.embedding_dim}]. Use an embedding from the encoder that the adapter was "
                f"trained with ({self.config.encoder.name})."
            )
        standardised = (embedding.to(self.embedding_mean) - self.embedding_mean) / self.embedding_std
        return self.user_proj(standardised)

    def null_token(self) -> Tensor:
        """Return the token ``[1, cross_attention_dim]`` of a zero (standardised) embedding: ``LayerNorm(b)``."""
        return self.user_proj(self.embedding_mean.new_zeros(1, self.config.embedding_dim))

    def site_vectors(self, embedding: Tensor, null: NullMode | None = None) -> SiteVectors:
        """Return what these users add at each site, and what the unconditional half adds.

        Args:
            embedding: user embeddings, ``[users, embedding_dim]``.
            null: the unconditional half; by default as the adapter was trained.

        Raises:
            AdapterError: the embedding has another width.
        """
        user = self._values(self.user_token(embedding))
        if (null or self.config.null) == "none":
            return SiteVectors(user, None)
        return SiteVectors(user, tuple(value[0] for value in self._values(self.null_token())))

    def check_sites(self, sites: Sequence[Site]) -> None:
        """Raise AdapterError unless these are the cross-attention layers that the adapter was trained for."""
        found = [site.hidden_size for site in sites]
        widths = sorted({site.cross_attention_dim for site in sites})
        if found != list(self.config.hidden_sizes) or widths != [self.config.cross_attention_dim]:
            model = describe(found, widths[0]) if len(widths) == 1 else f"a UNet with the text widths {widths}"
            raise AdapterError(
                f"This adapter was trained for {self.config.describe_base()}, but the connected model is "
                f"{model}. Load a checkpoint of the adapter's family, or an adapter made for "
                "this model."
            )

    def _values(self, token: Tensor) -> tuple[Tensor, ...]:
        return tuple(site(token) for site in self.sites)
