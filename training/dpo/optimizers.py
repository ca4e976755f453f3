"""Optimizers and learning rates by name, from the libraries that have them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from ..config import OptimizerSection
from ..errors import TrainingError


def check_optimizer(section: OptimizerSection, device: torch.device) -> None:
    """Raise TrainingError if the optimizer cannot run here: 8-bit AdamW without CUDA or without bitsandbytes."""
    if section.kind != "adamw8bit":
        return
    if device.type != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
        reason = "bitsandbytes is not installed" if device.type == "cuda" else f"this device is {device.type}"
        raise TrainingError(
            f'optimizer.kind = "adamw8bit" needs a CUDA device and the package bitsandbytes, but {reason}. '
            'Use "adamw" (the adapter is small) or "adafactor", or install bitsandbytes on a machine with CUDA.'
        )


def make_optimizer(
    parameters: Iterable[nn.Parameter], section: OptimizerSection, device: torch.device
) -> torch.optim.Optimizer:
    """Return the optimizer of the configuration; raise TrainingError as ``check_optimizer`` does."""
    check_optimizer(section, device)
    common = {"lr": section.learning_rate, "weight_decay": section.weight_decay}
    if section.kind == "adafactor":
        from transformers.optimization import Adafactor

        # With a learning rate of ours, as the paper uses it, and not its own schedule.
        return Adafactor(parameters, scale_parameter=False, relative_step=False, warmup_init=False, **common)
    adam: dict[str, Any] = {"betas": section.betas, "eps": section.epsilon, **common}
    if section.kind == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **adam)
    return torch.optim.AdamW(parameters, **adam)


def make_schedule(
    optimizer: torch.optim.Optimizer, section: OptimizerSection, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return diffusers' learning rate schedule of that name; it is stepped once per optimizer step."""
    return get_scheduler(
        section.schedule,
        optimizer,
        num_warmup_steps=section.warmup_steps,
        num_training_steps=steps,
        num_cycles=section.cycles,
        power=section.power,
    )
