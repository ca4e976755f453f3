"""Denoising errors of pairs, and what they weigh: both images with the same noise at the same timestep."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from ..errors import TrainingError
from .inputs import Text
from .loss import PairErrors


@dataclass(frozen=True)
class PairBatch:
    """A batch of ``n`` pairs, everything drawn: what one call of the UNet needs.

    ``chosen``, ``rejected`` and ``noise`` are latents ``[n, channels, height, width]`` in float32,
    ``timesteps`` is ``[n]``, ``text`` is ``[n, tokens, dim]``; ``pooled`` ``[n, dim]`` and ``time_ids``
    ``[n, 6]`` are SDXL's and None elsewhere. ``embedding`` ``[n, dim]`` are user embeddings, ``dropped``
    ``[n]`` says who is the null user instead. ``rows`` are the rows of the data set; ``variants`` say which of its
    noises each pair has here, and are empty where noise never comes again. ``allowed`` ``[n]`` says which pairs show
    what their user allows, and is None where that does not count.
    """

    rows: tuple[int, ...]
    chosen: Tensor
    rejected: Tensor
    noise: Tensor
    timesteps: Tensor
    text: Tensor
    embedding: Tensor
    dropped: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    variants: tuple[int, ...] = ()
    allowed: Tensor | None = None

    def to(self, device: torch.device) -> PairBatch:
        """Return the batch on ``device``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


class Noised(NamedTuple):
    """What a UNet sees of chosen and then rejected images, and is to predict: ``[2 * pairs, ...]`` each."""

    latents: Tensor
    timesteps: Tensor
    target: Tensor


def noised(scheduler: DDPMScheduler, batch: PairBatch) -> Noised:
    """Add each pair's noise to both of its images."""
    latents, noise = torch.cat((batch.chosen, batch.rejected)), batch.noise.repeat(2, 1, 1, 1)
    timesteps = batch.timesteps.repeat(2)
    target = prediction_target(scheduler, latents, noise, timesteps)
    return Noised(scheduler.add_noise(latents, noise, timesteps), timesteps, target)


def predict(unet: UNet2DConditionModel, batch: PairBatch, seen: Noised, text: Text, times: int = 1) -> Tensor:
    """Run the UNet once on all images, or on all of them several times, each with a part of ``text`` of its own.

    ``text`` is of ``times * 2 * pairs`` images, and so is the prediction, in float32.
    """
    dtype = unet.dtype  # asked once: it walks through all modules
    latents, timesteps = seen.latents.to(dtype).repeat(times, 1, 1, 1), seen.timesteps.repeat(times)
    predicted: Tensor = unet(latents, timesteps, text.hidden.to(dtype), **text.added(batch.time_ids, dtype)).sample
    return predicted.float()


def errors_of(batch: PairBatch, prediction: Tensor, target: Tensor) -> PairErrors:
    """Return the errors of a prediction of chosen and then rejected images, ``[2 * pairs, ...]``."""
    residuals = prediction - target
    chosen, rejected = residuals.square().mean(dim=(1, 2, 3)).chunk(2)
    first, second = residuals.detach().chunk(2)
    said = None if batch.allowed is None else prediction
    return PairErrors(chosen, rejected, (first * second).mean(dim=(1, 2, 3)), said)


def pair_errors(
    unet: UNet2DConditionModel, scheduler: DDPMScheduler, batch: PairBatch, text: Text | None = None
) -> PairErrors:
    """Run the UNet once on chosen and rejected images together and return their errors.

    ``text`` is what it reads, for the chosen and then the rejected images; by default the batch's own.
    """
    seen = noised(scheduler, batch)
    return errors_of(batch, predict(unet, batch, seen, text or Text(batch.text, batch.pooled).repeated(2)), seen.target)


def prediction_target(scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the UNet should predict, by the scheduler's prediction type."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    if kind == "sample":
        return latents
    raise TrainingError(
        f'The base model predicts "{kind}"; expected epsilon, v_prediction or sample. Set model.prediction_type.'
    )


def error_weights(scheduler: DDPMScheduler, timesteps: Tensor, limit: float) -> Tensor | float:
    """Return what turns errors at ``timesteps`` into those of the predicted picture, at most ``limit``; 0: no weights.

    With ``x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps`` and ``v = sqrt(abar) eps - sqrt(1 - abar) x_0``, an error of the
    prediction is one of ``x_0`` multiplied by

        sqrt((1 - abar) / abar)  for epsilon,      sqrt(1 - abar)  for v,      1  for the sample itself,

    and the weight is its square.
    """
    if not limit:
        return 1.0
    alpha = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    kind = scheduler.config.prediction_type
    weights = {"epsilon": (1 - alpha) / alpha, "v_prediction": 1 - alpha, "sample": torch.ones_like(alpha)}
    return weights[kind].clamp(max=limit)
