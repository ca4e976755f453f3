"""Training runs of seconds: their configuration, the run itself, and what it left behind."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console
from torch import Tensor

from comfyui_psa.training import train as recipe
from comfyui_psa.training.config import TrainConfig
from comfyui_psa.training.dpo.signals import StopSignals
from comfyui_psa.training.dpo.trainer import StepReport, Trainer

Look = Callable[[Trainer, "StepReport | None"], None]

RESOLUTION = 64
# The second step of four pairs has them with and without prompt, with and without user; all quarters come up.
SEED = 25
# AdamW keeps the last gradient as it is, which `gradients` reads; nothing is clipped.
PLAIN = {"learning_rate": 1e-2, "warmup_steps": 0, "betas": (0.0, 0.999), "max_grad_norm": 1e6}


def tiny_config(output: Path, base: Path, data: Path, changes: Mapping[str, Any] | None = None) -> TrainConfig:
    """Three steps of four pairs in float32, without validation, grids and trackers; ``changes`` are by dotted key."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"base": base, "dtype": "fp32"},
        "data": {
            "train": data,
            "cache": base.with_name(f"{base.name}-cache"),
            "resolution": RESOLUTION,
            "flip": False,
        },
        "loss": {"beta": 100.0, "prompt_dropout": 0.5, "user_dropout": 0.5},
        "optimizer": dict(PLAIN),
        "run": {"output": output, "steps": 3, "batch_size": 2, "accumulation": 2, "seed": SEED},
        "validation": {"every": 0, "grid_every": 0},
        "tracking": {"trackers": (), "every": 1},
    }
    for key, value in (changes or {}).items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return TrainConfig.model_validate(sections)


def run(config: TrainConfig, report: bool = False) -> str:
    """Run the real recipe in this process and return what it said; plots take longer than all the rest."""
    said = io.StringIO()
    with nullcontext() if report else mock.patch.object(recipe, "write_report"):
        recipe.train(config, Console(file=said, width=200))
    return said.getvalue()


def observe(monkeypatch: pytest.MonkeyPatch, look: Look) -> None:
    """Let ``look`` see the trainer of a run before the first step (without a report) and after each step."""

    class Observed(Trainer):
        def steps(self, stop: StopSignals) -> Iterator[StepReport]:
            look(self, None)
            for report in super().steps(stop):
                look(self, report)
                yield report

    monkeypatch.setattr(recipe, "Trainer", Observed)


def adapter_file(config: TrainConfig) -> Path:
    """The result of a run."""
    return config.run.output / f"{config.adapter.name}.safetensors"


def metrics(config: TrainConfig) -> list[dict[str, float]]:
    """The training lines of ``metrics.jsonl``, without those of validation."""
    lines = [json.loads(line) for line in (config.run.output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def checkpoint(config: TrainConfig, step: int) -> Path:
    """The folder of a checkpoint."""
    return config.run.output / "checkpoints" / f"step-{step:06d}"


def optimizer_state(folder: Path) -> dict[int, dict[str, Tensor]]:
    """The state of a checkpoint's optimizer, by number of the parameter."""
    return torch.load(folder / "optimizer.bin", weights_only=True)["state"]


def gradients(folder: Path) -> Tensor:
    """The gradient of a checkpoint's step, all parameters in a row."""
    return torch.cat([values["exp_avg"].flatten() for values in optimizer_state(folder).values()])
