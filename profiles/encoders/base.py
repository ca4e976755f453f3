"""What an encoder is: profiles in, embeddings out, and an identity that goes into adapters and cache keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..schema import Profile


class Encoder(Protocol):
    """Turns profiles into user embeddings."""

    @property
    def identity(self) -> str:
        """Two encoders with the same identity are meant to give the same embeddings."""
        ...

    def cache_key(self, profile: Profile) -> str | None:
        """Return a hash of everything that the embedding depends on, or None if caching is no use."""
        ...

    def encode(self, profiles: Sequence[Profile]) -> Tensor:
        """Return float32 embeddings ``[len(profiles), dim]``."""
        ...
