"""Embeddings on disk, so that a language model runs once per profile and not once per picture."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ...safe_files import make_private
from ..embedding import SafetyEmbedding, load_embedding, save_embedding
from ..errors import EncoderError
from ..schema import Profile
from .base import Encoder

logger = logging.getLogger(__name__)


class CachedEncoder:
    """An encoder with a folder of embeddings; a damaged or foreign entry is computed again."""

    def __init__(self, encoder: Encoder, folder: Path) -> None:
        """Cache what ``encoder`` computes in ``folder``, which is made when something is stored."""
        self._encoder = encoder
        self._folder = folder

    @property
    def identity(self) -> str:
        """The identity of the encoder inside."""
        return self._encoder.identity

    def cache_key(self, profile: Profile) -> str | None:
        """Return the key of the encoder inside."""
        return self._encoder.cache_key(profile)

    def encode(self, profiles: Sequence[Profile]) -> Tensor:
        """Return float32 ``[len(profiles), dim]``; the encoder sees only profiles that are not in the cache."""
        return torch.cat(list(self.encode_batches(profiles)))

    def encode_batches(self, profiles: Sequence[Profile], batch_size: int = 8) -> Iterator[Tensor]:
        """Yield float32 ``[<= batch_size, dim]`` in order, each batch stored as soon as it is there."""
        paths = [self._path(profile) for profile in profiles]
        rows = [self._read(path) for path in paths]
        missing = [i for i, row in enumerate(rows) if row is None]
        computed = self._encoder.encode_batches([profiles[i] for i in missing], batch_size) if missing else iter(())
        todo = iter(missing)
        for start in range(0, len(rows), batch_size):
            span = range(start, min(start + batch_size, len(rows)))
            while any(rows[i] is None for i in span):
                batch = next(computed)
                for i, row in zip(islice(todo, len(batch)), batch, strict=True):
                    rows[i] = row
                    self._write(paths[i], row)
            yield torch.stack([row for i in span if (row := rows[i]) is not None])

    def _path(self, profile: Profile) -> Path | None:
        key = self._encoder.cache_key(profile)
        return None if key is None else self._folder / f"{key}.safetensors"

    def _read(self, path: Path | None) -> Tensor | None:
        if path is None:
            return None
        try:
            embedding = load_embedding(path)
        except EncoderError:
            return None
        return embedding.vectors[0] if embedding.encoder == self.identity and len(embedding.vectors) == 1 else None

    def _write(self, path: Path | None, row: Tensor) -> None:
        if path is None:
            return
        try:
            make_private(self._folder)
            save_embedding(SafetyEmbedding(row[None], self.identity), path)
        except OSError as error:
            logger.warning(
                "PSA: the embedding cache %s cannot be written (%s); the language model will run again next time.",
                self._folder,
                error.strerror,
            )
