"""Caching passes over a tiny split: a base model that is watched, settings, and what a cache should hold."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from pairs import read_metadata, write_sage_split
from torch import Tensor, nn

from comfyui_psa.profiles import Profile
from comfyui_psa.training.base import BaseModel, open_base
from comfyui_psa.training.config import TrainConfig
from comfyui_psa.training.data.cache import build_cache
from comfyui_psa.training.data.cached import CachedPairs
from comfyui_psa.training.data.images import load_pair
from comfyui_psa.training.data.pairs import open_pairs

SHARD = 2  # rows
ROWS, USERS, CAPTIONS = 5, 2, 5  # captions with the empty one
EXTRA = {"L0": Profile(age=35), "L5": Profile(age=5)}


class WatchedBase:
    """A real base model that notes what is loaded and encoded, and may interrupt the pass."""

    def __init__(self, base: BaseModel, stop_after: int | None = None) -> None:
        """Interrupt at the first batch after ``stop_after`` images."""
        self._base = base
        self._stop_after = stop_after
        self.images = 0
        self.captions: list[str] = []
        self.loaded: list[str] = []
        self.models: list[weakref.ref[nn.Module]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def vae(self, device: torch.device) -> WatchedCoder:
        assert self.alive() == [], "the models before the VAE are in memory"
        self.loaded.append("vae")
        coder = self._base.vae(device)
        self.models.append(weakref.ref(coder._vae))
        return WatchedCoder(self, coder)

    def text_encoder(self, device: torch.device) -> WatchedCoder:
        assert self.alive() == [], "the models before the text encoder are in memory"
        self.loaded.append("text")
        encoder = self._base.text_encoder(device)
        self.models += [weakref.ref(tower.model) for tower in encoder._towers]
        return WatchedCoder(self, encoder)

    def alive(self) -> list[nn.Module]:
        return [model for reference in self.models if (model := reference()) is not None]

    def count(self, batch: Sequence[str] | Tensor) -> None:
        if isinstance(batch, Tensor):
            if self._stop_after is not None and self.images >= self._stop_after:
                raise KeyboardInterrupt
            self.images += len(batch)
        else:
            self.captions += batch


class WatchedCoder:
    """A VAE or a text encoder that reports its batches."""

    def __init__(self, base: WatchedBase, coder: Any) -> None:
        self._base = base
        self._coder = coder

    def encode(self, batch: Any) -> Any:
        self._base.count(batch)
        return self._coder.encode(batch)


def cache_config(folder: Path, base: Path) -> TrainConfig:
    """A run on a new split of five pairs and two users in ``folder``, where its cache will be too."""
    split = write_sage_split(folder / "train", rows=ROWS, users=USERS)
    return TrainConfig.model_validate(
        {
            "model": {"base": base, "dtype": "fp32"},
            "data": {"train": split, "cache": folder / "cache", "resolution": 32, "cache_batch_size": 1},
        }
    )


def changed(config: TrainConfig, section: str, **values: object) -> TrainConfig:
    content = config.model_dump()
    content[section].update(values)
    return TrainConfig.model_validate(content)


def build(config: TrainConfig, base: Any = None, captions: Sequence[str] = (), **options: Any) -> CachedPairs:
    arguments = {"extra_profiles": {}, "state": PartialState(cpu=True), "shard_rows": SHARD, **options}
    return build_cache(config, config.data.train, base or open_base(config.model.base), captions, **arguments)


def build_and_count(config: TrainConfig) -> tuple[int, int]:
    """Build a cache; return how many images this process encoded, and how many rows there are."""
    base = watch(config)
    cached = build(config, base)
    return base.images, len(cached)


def watch(config: TrainConfig, stop_after: int | None = None) -> WatchedBase:
    return WatchedBase(open_base(config.model.base), stop_after)


def cached_values(cached: CachedPairs) -> list[Any]:
    """Everything in a cache, comparable with ==."""
    rows = [cached.row(i) for i in range(len(cached))]
    return [
        cached.users,
        cached.row_users,
        cached.skipped,
        [(row.row, row.user_id, row.caption, row.chosen.tolist(), row.rejected.tolist(), row.crop) for row in rows],
        [cached.text(caption).hidden.tolist() for caption in sorted({"", *(row.caption for row in rows)})],
        [cached.user(user).tolist() for user in cached.users],
    ]


def check_latents(cached: CachedPairs, config: TrainConfig) -> None:
    """Compare with the VAE of the base model, image by image."""
    data = config.data
    stored = torch.float32 if config.model.dtype == "fp32" else torch.float16
    coder = open_base(config.model.base).vae(torch.device("cpu"))
    pairs = list(open_pairs(data.train))
    assert len(cached) == len(pairs)
    for i, pair in enumerate(pairs):
        chosen, rejected, crop = load_pair(pair, data.resolution, data.crop, data.flip, config.run.seed)
        row = cached.row(i)
        assert torch.equal(row.chosen, coder.encode(chosen[None])[0].to(stored).float())
        assert torch.equal(row.rejected, coder.encode(rejected[None])[0].to(stored).float())
        assert row.crop == crop


def parts(config: TrainConfig, name: str) -> list[Path]:
    return sorted(config.data.cache.glob(f"{name}-*"))


def break_image(split: Path, row: int) -> None:
    path = split / read_metadata(split)[row]["rejected"]
    path.write_bytes(path.read_bytes()[:50])


def write_embeddings(folder: Path, users: Sequence[str], dim: int = 6) -> Path:
    folder.mkdir(exist_ok=True)
    for number, user in enumerate(users):
        np.save(folder / f"{user}.npy", np.arange(dim, dtype=np.float32) + number)
    return folder
