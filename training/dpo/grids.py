"""Image grids during training: prompts down, users across, every row with the same noise.

Draws with what is already in memory, the frozen UNet; the VAE is there only while it decodes.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from ...adapter import UserEffect
from ..base import BaseModel, TextEmbedding
from ..config import ValidationSection
from ..picture_grid import picture_grid
from ..sampling import denoise, whole_picture
from .inputs import Text, UNetInputs, guided_inputs
from .policy import Policy


@torch.no_grad()
def draw_grid(
    base: BaseModel,
    policy: Policy,
    columns: Mapping[str, UserEffect | None],
    captions: Sequence[str],
    texts: Mapping[str, TextEmbedding],
    config: ValidationSection,
    device: torch.device,
    seed: int,
    resolution: int,
) -> Image.Image:
    """Draw each caption for each user and return the labelled pictures as one image.

    Args:
        base: gives the sampler and the VAE; its UNet is the one in ``policy``, which is on ``device``.
        policy: the UNet, with the adapter attached.
        columns: label to what one user changes, None for the base model itself.
        captions: the prompts, one row each.
        texts: the embeddings of every caption, and of ``""`` for the unconditional half.
        config: ``grid_steps`` and ``grid_guidance_scale``.
        device: where the UNet is and the VAE will be.
        seed: with the number of the row, it decides the initial noise.
        resolution: height and width of a picture in pixels.
    """
    size = resolution // base.vae_scale_factor
    generator = torch.Generator().manual_seed(seed)
    latents = []
    for caption in captions:
        noise = torch.randn((1, base.latent_channels, size, size), generator=generator).to(device)
        negative, positive = (_text(texts[name], device) for name in ("", caption))
        for effect in columns.values():
            inputs = guided_inputs(effect, negative, positive)
            latents.append(_sample(base, policy, inputs, noise, config, resolution).cpu())
    pictures = _decode(base, latents, device)
    rows = [pictures[start : start + len(columns)] for start in range(0, len(pictures), len(columns))]
    return picture_grid(rows, list(columns), captions)


def _text(embedding: TextEmbedding, device: torch.device) -> Text:
    pooled = None if embedding.pooled is None else embedding.pooled[None].to(device)
    return Text(embedding.hidden[None].to(device), pooled)


def _sample(
    base: BaseModel, policy: Policy, inputs: UNetInputs, noise: Tensor, config: ValidationSection, resolution: int
) -> Tensor:
    """Return latents ``[1, channels, height, width]`` for one prompt and one user."""
    steps, scale = config.grid_steps, config.grid_guidance_scale
    sizes = whole_picture(resolution, resolution, noise.device)
    with policy.applied(inputs):
        return denoise(policy.unet, base.sampler(), inputs.text, noise, steps, scale, sizes)


def _decode(base: BaseModel, latents: Sequence[Tensor], device: torch.device) -> list[Image.Image]:
    coder = base.vae(device)
    pictures = []
    for one in latents:
        pixels = (coder.decode(one.to(device))[0] + 1) * 127.5
        pictures.append(Image.fromarray(pixels.clamp(0, 255).round().byte().permute(1, 2, 0).cpu().numpy()))
    del coder
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return pictures
