"""From noise to latents with classifier-free guidance, for all that draws here: grids, the miniature, evaluations."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .dpo.inputs import Text


def whole_picture(height: int, width: int, device: torch.device) -> Tensor:
    """Return SDXL's time ids ``[1, 6]`` of a picture of this size in pixels that was never cropped."""
    return torch.tensor([[height, width, 0, 0, height, width]], device=device, dtype=torch.float32)


class Safety(Protocol):
    """Guidance away from a concept; it remembers earlier steps, so each run has its own."""

    def __call__(self, step: int, without: Tensor, asked: Tensor, concept: Tensor) -> Tensor:
        """Return what is taken from the guidance in a step, all ``[n, channels, height, width]``.

        They are what is predicted without a prompt, with it, and for the concept.
        """


@torch.no_grad()
def denoise(
    unet: Any,
    sampler: Any,
    text: Text,
    noise: Tensor,
    steps: int,
    guidance_scale: float,
    time_ids: Tensor | None = None,
    safety: Safety | None = None,
) -> Tensor:
    """Return latents ``[n, channels, height, width]`` of pictures of that shape.

    Args:
        unet: with whatever is attached to it applied.
        sampler: a scheduler of its own, because it remembers earlier steps.
        text: of the unconditional half, then of the prompts; with ``safety``, then of the concept: ``2 n`` or ``3 n``.
        noise: the initial noise, on the UNet's device.
        steps: of the sampler.
        guidance_scale: 1 draws what the prompt says alone.
        time_ids: SDXL's, ``[1, 6]`` for all pictures; others have none.
        safety: Safe Latent Diffusion, if it is wanted.
    """
    sampler.set_timesteps(steps, device=noise.device)
    latents = noise * sampler.init_noise_sigma
    copies = 2 if safety is None else 3
    hidden, added = text.hidden.to(unet.dtype), text.added(time_ids, unet.dtype)
    for step, timestep in enumerate(sampler.timesteps):
        scaled = sampler.scale_model_input(latents.repeat(copies, 1, 1, 1), timestep).to(unet.dtype)
        without, asked, *concept = unet(scaled, timestep, hidden, **added).sample.float().chunk(copies)
        guidance = asked - without
        if safety is not None:
            guidance = guidance - safety(step, without, asked, concept[0])
        latents = sampler.step(without + guidance_scale * guidance, timestep, latents).prev_sample
    return latents
