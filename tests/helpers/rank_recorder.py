"""Called in each of two ranks: ``psa train`` that notes the hash of its weights after each step."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from training_runs import observe, run

from comfyui_psa.training.config import load_config
from comfyui_psa.training.dpo.trainer import StepReport, Trainer


def record(config: Path, folder: Path) -> None:
    """Write ``rank-<n>.txt``: one line for each step."""

    def look(trainer: Trainer, report: StepReport | None) -> None:
        digest = hashlib.sha256()
        for name, tensor in sorted(trainer.accelerator.unwrap_model(trainer.effects).state_dict().items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        accelerator = trainer.accelerator
        assert accelerator.num_processes == 2
        step = report.progress.step if report else trainer.progress.step
        with (folder / f"rank-{accelerator.process_index}.txt").open("a", encoding="utf-8") as file:
            file.write(f"{step} {digest.hexdigest()}\n")

    with pytest.MonkeyPatch.context() as patch:
        observe(patch, look)
        run(load_config(config))
