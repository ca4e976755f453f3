"""What several tests share: a tiny base model, settings for caching it, and runs of `psa train`, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cache_testing import cache_config
from observed_runs import Base, Run, marked_split, train_tiny, write_bases
from pipelines import write_sd_pipeline

from comfyui_psa.training.config import TrainConfig

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline of SD1.5's topology."""
    folder = tmp_path_factory.mktemp("sd")
    write_sd_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with as few layers as can be, for tests that load it many times."""
    folder = tmp_path_factory.mktemp("small")
    write_sd_pipeline(folder, small=True)
    return folder


@pytest.fixture
def config(tmp_path: Path, sd: Path) -> TrainConfig:
    """Settings for caching a tiny split of its own with that pipeline."""
    return cache_config(tmp_path, sd)


@pytest.fixture(scope="session")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pairs of the runs; beside it lie ``seen`` and ``unseen``."""
    folder = tmp_path_factory.mktemp("splits")
    marked_split(folder / "seen")
    marked_split(folder / "unseen", first_user=50)
    return marked_split(folder / "train")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    """Tiny base models by name: ``sd``, ``sdxl``, and ``v``, which predicts v."""
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="session")
def runs(bases: dict[str, Base], split: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run of each base; ``sd`` has everything switched on that looks or writes."""
    output = tmp_path_factory.mktemp("runs")
    everything = {
        "tracking.trackers": ("tensorboard",),
        "validation.every": 2,
        "validation.pairs": 2,
        "validation.seen": split.with_name("seen"),
        "validation.unseen": split.with_name("unseen"),
        "validation.grid_every": 3,
        "validation.grid_steps": 2,
        "validation.grid_prompts": ("a dog",),
    }
    return {
        name: train_tiny(base, split, output / name, everything if name == "sd" else {}, report=name == "sd")
        for name, base in bases.items()
    }
