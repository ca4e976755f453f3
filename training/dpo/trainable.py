"""The one module that is trained, and so the one that accelerate wraps: the adapter, from users to vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...adapter import PSAAdapter

# Entries of an embedding that hardly differ between users carry nothing: they are left unscaled.
_SMALLEST_DEVIATION = 1e-6


class UserVectors(nn.Module):
    """An adapter as a function of a batch of users, some of them the null user.

    The UNet is no part of it: gradients reach the adapter through the vectors, so data parallel wrappers
    see a module of some million parameters and nothing else.
    """

    def __init__(self, adapter: PSAAdapter) -> None:
        """Wrap ``adapter``; its parameters are trained in float32."""
        super().__init__()
        self.adapter = adapter.float().requires_grad_(True).train()

    def forward(self, embedding: Tensor, dropped: Tensor) -> tuple[Tensor, ...]:
        """Map ``[n, embedding_dim]`` and ``dropped`` ``[n]`` to one ``[n, hidden_i]`` per site.

        A dropped user is the null user of ``zero_embedding``: the projection of a zero (standardised) embedding.
        """
        mean = self.adapter.embedding_mean
        return self.adapter.site_vectors(torch.where(dropped[:, None], mean, embedding), null="none").user


def standardise(adapter: PSAAdapter, embeddings: Tensor) -> None:
    """Store mean and deviation of the training users' ``embeddings`` ``[users, embedding_dim]`` in ``adapter``."""
    deviation, mean = torch.std_mean(embeddings.double(), dim=0, correction=0)
    adapter.embedding_mean.copy_(mean)
    adapter.embedding_std.copy_(torch.where(deviation > _SMALLEST_DEVIATION, deviation, torch.ones_like(deviation)))
