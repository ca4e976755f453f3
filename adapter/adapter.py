"""A whole adapter: up to three ways in which a user acts, and what each hands to the runtimes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import AdapterConfig, NullMode
from .constant import SiteVectors, UserCrossAttention
from .errors import AdapterError
from .gated import GatedUserAttention, SiteGate
from .sites import Site
from .text import TextAdapter, UserText, UserTextAttention, UserTextMLP
from .user import UserProjection


class UserEffect(NamedTuple):
    """All that an adapter does for users: the contract with both runtimes. What it does not do is None."""

    constant: SiteVectors | None
    gated: tuple[SiteGate, ...] | None
    text: UserText | None


class PSAAdapter(nn.Module):
    """An adapter and its configuration. Parameters are float32; as it is made it changes nothing yet.

    ``embedding_mean`` and ``embedding_std`` (``[embedding_dim]``) standardise user embeddings; the paper's
    adapters have 0 and 1.
    """

    embedding_mean: Tensor
    embedding_std: Tensor

    def __init__(self, config: AdapterConfig) -> None:
        """Make the parts that ``config`` names."""
        super().__init__()
        self.config = config
        dim, width, sizes = config.embedding_dim, config.cross_attention_dim, config.hidden_sizes
        if config.constant:
            self.user_proj = UserProjection(dim, width)
            self.sites = nn.ModuleList(UserCrossAttention(width, size) for size in sizes)
        if config.gated:
            self.gated_user_proj = UserProjection(dim, config.gated.token_dim, config.gated.num_tokens)
            self.gated_sites = nn.ModuleList(GatedUserAttention(size, config.gated) for size in sizes)
        if config.text:
            self.text = TextAdapter(config.text, width, dim)
        self.register_buffer("embedding_mean", torch.zeros(dim))
        self.register_buffer("embedding_std", torch.ones(dim))

    def effect(self, embedding: Tensor, null: NullMode | None = None) -> UserEffect:
        """Return what these users do, each kind for itself.

        Args:
            embedding: user embeddings, ``[users, embedding_dim]``.
            null: what the unconditional half gets from the constant kind; by default as the adapter was trained. The
                other kinds leave that half as it is.

        Raises:
            AdapterError: the embedding has another width.
        """
        standardised = self.standardised(embedding)
        config = self.config
        return UserEffect(
            constant=self._vectors(standardised, null or config.null) if config.constant else None,
            gated=self._gates(standardised) if config.gated else None,
            text=self.text(standardised) if config.text else None,
        )

    def zero_at_start(self) -> list[Tensor]:
        """Return the weights that are zero before training: while they all are, the adapter changes nothing."""
        weights: list[Tensor] = []
        for module in self.modules():
            if isinstance(module, (UserCrossAttention, GatedUserAttention)):
                weights.append(module.to_v_user.weight)
            elif isinstance(module, (UserTextAttention, UserTextMLP)):
                weights.append(module.to_out.weight)
        return weights

    def standardised(self, embedding: Tensor) -> Tensor:
        """Return embeddings ``[users, embedding_dim]`` as the parts of the adapter take them."""
        if embedding.ndim != 2 or embedding.shape[1] != self.config.embedding_dim:
            raise AdapterError(
                f"The user embedding has shape {list(embedding.shape)}, but this adapter expects "
                f"[users, {self.config.embedding_dim}]. Use an embedding from the encoder that the adapter was "
                f"trained with ({self.config.encoder.name})."
            )
        return (embedding.to(self.embedding_mean) - self.embedding_mean) / self.embedding_std

    def check_sites(self, sites: Sequence[Site]) -> None:
        """Raise AdapterError unless these are the cross-attention layers that the adapter was trained for."""
        other = self.config.other_model(sites)
        if other is not None:
            raise AdapterError(
                f"This adapter was trained for {self.config.describe_base()}, but the connected model is "
                f"{other}. Load a checkpoint of the adapter's family, or an adapter made for "
                "this model."
            )

    def _vectors(self, standardised: Tensor, null: NullMode) -> SiteVectors:
        user = self._values(standardised)
        if null == "none":
            return SiteVectors(user, None)
        zero = standardised.new_zeros(1, self.config.embedding_dim)
        return SiteVectors(user, tuple(value[0] for value in self._values(zero)))

    def _values(self, standardised: Tensor) -> tuple[Tensor, ...]:
        token = self.user_proj(standardised)[:, 0]
        return tuple(site(token) for site in self.sites)

    def _gates(self, standardised: Tensor) -> tuple[SiteGate, ...]:
        tokens = self.gated_user_proj(standardised)
        return tuple(site(tokens) for site in self.gated_sites)
