"""From cached pairs and draws to batches: which pairs a step sees on which rank, with what noise."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.cached import CachedPairs, CachedRow
from .denoising import PairBatch
from .draws import Draw, Draws


class Batches:
    """The pairs of one split as batches.

    Sample ``n`` of a run is pair ``order[n % rows]`` of epoch ``n // rows``, whoever computes it.
    """

    def __init__(self, cached: CachedPairs, indices: Sequence[int], draws: Draws, resolution: int) -> None:
        """Use the pairs ``indices`` of a cache; ``resolution`` is the size of the images in pixels."""
        self.indices = tuple(indices)
        self._cached = cached
        self._draws = draws
        self._resolution = resolution
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)

    @property
    def row_count(self) -> int:
        """One more than the largest number in ``PairBatch.rows``."""
        return 1 + max(self._cached.source_rows[i] for i in self.indices)

    @property
    def preferences(self) -> int:
        """How many of the pairs are preferences: all, or with ``loss.fidelity`` those that their users do not allow."""
        return sum(not self._cached.allowed(i) for i in self.indices)

    def training(self, first: int, size: int) -> PairBatch:
        """Return the samples ``first`` to ``first + size - 1`` of the run."""
        samples = range(first, first + size)
        rows = [self._cached.row(self._index(sample)) for sample in samples]
        draws = [
            self._draws.draw(sample, row.chosen.shape, row.row, epoch=sample // len(self.indices))
            for sample, row in zip(samples, rows, strict=True)
        ]
        return self._batch(rows, draws)

    def fixed(self, positions: Sequence[int], timestep: int) -> PairBatch:
        """Return pairs of the split at ``timestep`` with noise of their own that never changes; nothing is dropped."""
        rows = [self._cached.row(self.indices[position]) for position in positions]
        draws = []
        for row in rows:
            noise = torch.randn(row.chosen.shape, generator=self._draws.generator("validation", row.row))
            draws.append(Draw(noise, timestep, prompt_dropped=False, user_dropped=False))
        return self._batch(rows, draws)

    def digest(self) -> str:
        """Return a hash of which rows these are, whose, and what their captions are."""
        cached = self._cached
        rows = [(cached.source_rows[i], cached.row_users[i], cached.row_captions[i]) for i in self.indices]
        return hashlib.sha256(repr(rows).encode()).hexdigest()

    def allowed_digest(self) -> str:
        """Return a hash of which of the pairs show what their users allow."""
        return hashlib.sha256(repr([self._cached.allowed(i) for i in self.indices]).encode()).hexdigest()

    def _index(self, sample: int) -> int:
        epoch, position = divmod(sample, len(self.indices))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._draws.order(epoch, len(self.indices))
        return self.indices[int(self._order[position])]

    def _batch(self, rows: Sequence[CachedRow], draws: Sequence[Draw]) -> PairBatch:
        texts = [
            self._cached.text("" if draw.prompt_dropped else row.caption) for row, draw in zip(rows, draws, strict=True)
        ]
        pooled = [text.pooled for text in texts if text.pooled is not None]
        return PairBatch(
            rows=tuple(row.row for row in rows),
            chosen=torch.stack([row.chosen for row in rows]).float(),
            rejected=torch.stack([row.rejected for row in rows]).float(),
            noise=torch.stack([draw.noise for draw in draws]),
            timesteps=torch.tensor([draw.timestep for draw in draws]),
            text=torch.stack([text.hidden for text in texts]),
            embedding=torch.stack([self._cached.user(row.user_id) for row in rows]),
            dropped=torch.tensor([draw.user_dropped for draw in draws]),
            pooled=torch.stack(pooled) if pooled else None,
            time_ids=torch.stack([self._time_ids(row) for row in rows]) if pooled else None,
            variants=tuple(draw.variant for draw in draws if draw.variant is not None),
            allowed=_allowed(rows, draws),
        )

    def _time_ids(self, row: CachedRow) -> Tensor:
        """SDXL's micro-conditioning: original size, top left corner of the crop, target size (arXiv 2307.01952)."""
        target = (self._resolution, self._resolution)
        return torch.tensor([*row.crop.original_size, *row.crop.top_left, *target], dtype=torch.float32)


def _allowed(rows: Sequence[CachedRow], draws: Sequence[Draw]) -> Tensor | None:
    """Return which pairs show what their user allows, ``[pairs]``; the null user is nobody, who bans nothing."""
    if rows[0].allowed is None:
        return None
    return torch.tensor([bool(row.allowed) or draw.user_dropped for row, draw in zip(rows, draws, strict=True)])
