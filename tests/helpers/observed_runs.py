"""Runs of tiny bases, looked at from inside while they train."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from comfy_testing import TINY_SDXL, comfy_model, unet_weights
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers_testing import diffusers_unet
from pairs import read_metadata, write_metadata, write_sage_split
from pipelines import write_sd_pipeline, write_sdxl_pipeline
from torch import Tensor, nn
from training_runs import observe, run, tiny_config
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from comfyui_psa.profiles import Profile
from comfyui_psa.profiles.encoders import AttributesEncoder
from comfyui_psa.training.config import TrainConfig
from comfyui_psa.training.dpo.trainer import StepReport, Trainer
from comfyui_psa.training.synthetic import UNetShape

ROWS, USERS, STEPS = 12, 5, 3
SD_SHAPE = UNetShape(32, (1, 2, 2, 2), 2, (1, 1, 1, 0), 1, 24)
SHAPES = {"sd": SD_SHAPE, "sdxl": TINY_SDXL}

# Words that stand nowhere else.
MARKERS = {"Gender": "vorpelgender", "Mental_Condition": "wexlemind"}
_MODELS = (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection)


class Base(NamedTuple):
    """A pipeline folder, and what was written into it."""

    folder: Path
    pipeline: DiffusionPipeline
    weights: Mapping[str, Tensor]


@dataclass
class Run:
    """A run, looked at from inside: the trainer as it was after the last step, and models in memory at each step."""

    config: TrainConfig
    base: Base
    said: str = ""
    trainer: Trainer | None = None
    in_memory: list[list[str]] = field(default_factory=list)
    unet_calls: list[tuple[int, bool]] = field(default_factory=list)


def write_bases(folder: Path) -> dict[str, Base]:
    """SD1.5 and SDXL with the UNet of a ComfyUI model, and a model that predicts v, with zero terminal SNR."""
    pipelines = {
        "sd": write_sd_pipeline(folder / "sd"),
        "sdxl": write_sdxl_pipeline(folder / "sdxl"),
        "v": write_sd_pipeline(folder / "v", prediction_type="v_prediction", zero_snr=True),
    }
    bases = {}
    for name, pipeline in pipelines.items():
        weights: Mapping[str, Tensor] = {}
        if name in SHAPES:
            weights = unet_weights(SHAPES[name])
            pipeline.unet = diffusers_unet(comfy_model(weights), SHAPES[name], weights)
            pipeline.unet.save_pretrained(folder / name / "unet")
        bases[name] = Base(folder / name, pipeline, weights)
    return bases


def marked_split(folder: Path, first_user: int = 1) -> Path:
    """A Sage split whose users have ids and attributes that stand nowhere else."""
    write_sage_split(folder, rows=ROWS, users=USERS, size=(64, 64), seed=first_user)
    rows = read_metadata(folder)
    for row in rows:
        number = int(row["user_data"]["User_ID"]) + first_user - 1
        row["user_data"] |= {"User_ID": f"qanzibel-{number}", **MARKERS}
    write_metadata(folder, rows)
    return folder


def train_tiny(base: Base, data: Path, output: Path, changes: Mapping[str, Any], report: bool = False) -> Run:
    """Train with a checkpoint after each step, and watch."""
    often = {"run.checkpoint_every": 1, "run.checkpoints_total_limit": None}
    run_ = Run(tiny_config(output, base.folder, data, {**often, **changes}), base)
    before = weakref.WeakSet(models_in_memory())
    hooks = []

    def look(trainer: Trainer, report: StepReport | None) -> None:
        run_.trainer = trainer
        run_.in_memory.append([type(model).__name__ for model in models_in_memory() if model not in before])
        if report is None:
            note = lambda _unet, args: run_.unet_calls.append((len(args[0]), torch.is_grad_enabled()))  # noqa: E731
            hooks.append(trainer.policy.unet.register_forward_pre_hook(note))

    with pytest.MonkeyPatch.context() as patch:
        observe(patch, look)
        run_.said = run(run_.config, report)
    hooks.pop().remove()
    return run_


def models_in_memory() -> list[nn.Module]:
    """All parts of base models that hold weights."""
    models = [thing for thing in gc.get_objects() if type(thing) in _MODELS]
    return [model for model in models if next(model.parameters()).device.type != "meta"]


def embedding(profile: Profile) -> Tensor:
    """``[1, 37]``."""
    return AttributesEncoder().encode([profile])
