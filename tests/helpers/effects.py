"""What an adapter does for users, one kind at a time."""

from __future__ import annotations

from torch import Tensor

from comfyui_psa.adapter import NullMode, PSAAdapter, SiteVectors


def site_vectors(adapter: PSAAdapter, embedding: Tensor, null: NullMode | None = None) -> SiteVectors:
    """What an adapter of the constant kind adds for users ``[users, embedding_dim]``."""
    vectors = adapter.effect(embedding, null).constant
    assert vectors is not None
    return vectors
