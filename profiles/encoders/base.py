"""What an encoder is: profiles in, embeddings out, and an identity that goes into adapters and cache keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    def encode_batches(self, profiles: Sequence[Profile], batch_size: int = 8) -> Iterator[Tensor]:
        """Yield float32 embeddings ``[<= batch_size, dim]`` in order, with a language model loaded once for all.

        The model is in memory until the last batch is taken, or the iterator closed.
        """
        ...
