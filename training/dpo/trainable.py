"""The one module that is trained, and so the one that accelerate wraps: the adapter, from users to what they change."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...adapter import AdapterConfig, EncoderSpec, PSAAdapter, family_name, find_sites
from ..base import BaseModel
from ..config import AdapterSection
from .inputs import Text, UNetInputs

# Entries of an embedding that hardly differ between users carry nothing: they are left unscaled.
_SMALLEST_DEVIATION = 1e-6


class TrainableAdapter(nn.Module):
    """An adapter as a function of a batch of users, some of them the null user, and of their prompts.

    The UNet is no part of it: gradients reach the adapter through what it hands over, so data parallel wrappers
    see a module of some million parameters and nothing else.
    """

    def __init__(self, adapter: PSAAdapter) -> None:
        """Wrap ``adapter``; its parameters are trained in float32."""
        super().__init__()
        self.adapter = adapter.float().requires_grad_(True).train()

    def forward(self, embedding: Tensor, dropped: Tensor, text: Text) -> UNetInputs:
        """Map users ``[n, embedding_dim]``, whether they are dropped ``[n]``, and their prompts to what the UNet gets.

        A dropped user is the null user: of the constant kind the projection of a zero (standardised) embedding, and
        nothing of the other kinds, which leave the unconditional half alone.
        """
        mean = self.adapter.embedding_mean
        effect = self.adapter.effect(torch.where(dropped[:, None], mean, embedding), null="none")
        vectors = effect.constant.user if effect.constant else ()
        gates = tuple(
            gate._replace(values=gate.values.masked_fill(dropped[:, None, None], 0)) for gate in effect.gated or ()
        )
        if effect.text is None:
            return UNetInputs(text, vectors, gates)
        hidden, pooled = text.of_users(effect.text)
        kept = torch.where(dropped[:, None, None], text.hidden, hidden)
        if pooled is not None and text.pooled is not None:
            pooled = torch.where(dropped[:, None], text.pooled, pooled)
        return UNetInputs(Text(kept, pooled), vectors, gates)


def new_adapter_config(
    section: AdapterSection, base: BaseModel, embedding_dim: int, encoder: EncoderSpec
) -> AdapterConfig:
    """Describe an adapter of the kinds that a configuration names, for a base model.

    Raises:
        AdapterError: the base model has no cross-attention layers.
    """
    sites, kinds = find_sites(base.empty_unet()), section.kinds
    sizes, width = tuple(site.hidden_size for site in sites), sites[0].cross_attention_dim
    return AdapterConfig(
        base=family_name(sizes, width),
        hidden_sizes=() if set(kinds) == {"text"} else sizes,  # the text side is for every model that reads such text
        cross_attention_dim=width,
        embedding_dim=embedding_dim,
        constant="constant" in kinds,
        gated=section.gated if "gated" in kinds else None,
        text=section.text.model_copy(update={"pooled_dim": base.pooled_dim}) if "text" in kinds else None,
        null=section.null,
        encoder=encoder,
    )


def standardise(adapter: PSAAdapter, embeddings: Tensor) -> None:
    """Store mean and deviation of the training users' ``embeddings`` ``[users, embedding_dim]`` in ``adapter``."""
    deviation, mean = torch.std_mean(embeddings.double(), dim=0, correction=0)
    adapter.embedding_mean.copy_(mean)
    adapter.embedding_std.copy_(torch.where(deviation > _SMALLEST_DEVIATION, deviation, torch.ones_like(deviation)))
