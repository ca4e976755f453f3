"""Embeddings on disk, so that a language model runs once per profile and not once per picture."""

from __future__ import annotations

import logging
from collections.abc import Sequence
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
        paths = [self._path(profile) for profile in profiles]
        rows = [self._read(path) for path in paths]
        missing = [i for i, row in enumerate(rows) if row is None]
        if missing:
            computed = self._encoder.encode([profiles[i] for i in missing])
            for i, row in zip(missing, computed, strict=True):
                rows[i] = row
                self._write(paths[i], row)
        return torch.stack([row for row in rows if row is not None])

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
