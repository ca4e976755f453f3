"""Steps of a real ComfyUI sampling run, and how long they take on one model and on another."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import comfy.model_management
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from rich.console import Console
from rich.progress import track
from torch import Tensor

from comfyui_psa.training.synthetic import SD15


class Ratio(NamedTuple):
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return it for a table."""
        return f"{self.median:.3f} (quartiles {self.low:.3f} to {self.high:.3f})"


def sample(
    model: ModelPatcher,
    steps: int = 1,
    on_step: Callable[[], None] = lambda: None,
    *,
    images: int = 1,
    size: int = 32,
) -> list[float]:
    """Sample ``steps`` steps of SD1.5 at CFG 7.5, on latents of ``size`` x ``size``; return the seconds of each.

    On a GPU by the clock; else of the processor, so that what else the machine does counts less.
    """
    device = comfy.model_management.get_torch_device()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    generator = torch.Generator().manual_seed(0)
    prompt = [[torch.randn(1, 77, SD15.context_dim, generator=generator), {}]]
    seconds: list[float] = []

    def loop(wrapped: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, **_: Any) -> Tensor:
        for sigma in sigmas[:-1]:
            start = clock()
            wrapped(x, sigma * x.new_ones(len(x)), **(extra_args or {}))
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(clock() - start)
            on_step()
        return x

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompt, prompt)
    guider.set_cfg(7.5)
    latent = torch.randn(images, 4, size, size, generator=generator)
    sigmas = torch.linspace(14.0, 1.0, steps + 1)
    with torch.no_grad():
        guider.sample(
            latent, torch.zeros_like(latent), comfy.samplers.KSAMPLER(loop), sigmas, disable_pbar=True, seed=0
        )
    return seconds


def step_ratio(
    first: ModelPatcher, second: ModelPatcher, pairs: int, *, steps: int = 2, images: int = 1, size: int = 32
) -> Ratio:
    """Return how long a step takes on the second model, as a multiple of one on the first; they take turns.

    The first step of a run does not count: it also projects the vectors.
    """
    sample(first, images=images, size=size)
    sample(second, images=images, size=size)
    ratios = []
    for i in track(range(pairs), "Step time", console=Console(stderr=True)):
        order = (first, second) if i % 2 else (second, first)
        seconds = {id(model): min(sample(model, steps, images=images, size=size)[1:]) for model in order}
        ratios.append(seconds[id(second)] / seconds[id(first)])
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, low, high)
