"""Images to latents and back, scaled as the UNet sees them."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor


class ImageCoder:
    """The VAE of a base model on a device, in float32."""

    def __init__(self, vae: AutoencoderKL | AutoencoderTiny, device: torch.device) -> None:
        """Move the VAE, which is in float32, to ``device``."""
        self._vae = vae.requires_grad_(False).eval().to(device)
        self._device = device
        self._scale: float = vae.config.scaling_factor
        self._shift: float = vae.config.get("shift_factor") or 0.0

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the latents ``[n, channels, h / 8, w / 8]`` of images ``[n, 3, h, w]`` in [-1, 1].

        They are the mean of the VAE's distribution, so the same image always has the same latents.
        """
        encoded = self._vae.encode(images.to(self._device, torch.float32))
        # The tiny VAE has no distribution.
        latents: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return (latents - self._shift) * self._scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images ``[n, 3, h, w]`` in [-1, 1] from latents ``[n, channels, h / 8, w / 8]``."""
        unscaled = latents.to(self._device, torch.float32) / self._scale + self._shift
        images: Tensor = self._vae.decode(unscaled).sample
        return images.clamp(-1, 1)
