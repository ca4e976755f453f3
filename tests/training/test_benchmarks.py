"""What `make benchmark-training` compares: both trainers take a step, on models of a few channels."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

UNET = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
TEXT = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32,) * 4,
    "layers_per_block": 1,
}


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("trainers")


@pytest.mark.parametrize(
    ("name", "remembered"), [("PSATrainer", False), ("PSATrainer", True), ("StraightforwardTrainer", False)]
)
def test_a_trainer_of_the_benchmark_begins_at_the_base(
    trainers: ModuleType, tmp_path: Path, name: str, remembered: bool
) -> None:
    family = trainers.Family("tiny", UNET, (TEXT,), VAE)
    setting = trainers.Setting(family, "cpu", "fp32", checkpointing=True, remembered=remembered)
    trainer = getattr(trainers, name)(setting, tmp_path)
    assert trainer.step(trainer.batch(2, 64)) == pytest.approx(math.log(2), abs=1e-3)
