"""Runs of `psa train` on tiny bases, made once for all tests that look at them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from observed_runs import Base, Run, marked_split, train_tiny, write_bases

torch.set_num_threads(1)


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
