"""Pictures from the miniature, many at a time, each with a prompt, a negative prompt and a person of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor

from ...adapter import UserEffect, find_sites
from ..base import open_base
from ..dpo.attachment import Attachment
from ..dpo.inputs import Text, guided_inputs
from ..sampling import denoise
from .pixels import to_images, to_pixels

STEPS = 10
GUIDANCE_SCALE = 3.0
CPU = torch.device("cpu")
_BATCH = 32


class Painter:
    """The miniature with everything in memory, and adapters attached for one batch at a time."""

    def __init__(self, folder: Path, device: torch.device = CPU) -> None:
        """Load the diffusers folder ``folder`` onto a device; raise BaseModelError if it is not one."""
        self.base = open_base(folder)
        self._device = device
        self._unet = self.base.unet(torch.float32).to(device)
        self._sites = find_sites(self._unet)
        self._attachment = Attachment(self._unet, self._sites)
        self._text = self.base.text_encoder(device)
        self._coder = self.base.vae(device)
        self._known: dict[str, Tensor] = {}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``[channels, height, width]`` of a picture's latents."""
        size = self.base.unet_config["sample_size"]
        return self.base.latent_channels, size, size

    def through_autoencoder(self, images: Sequence[PIL.Image.Image]) -> list[PIL.Image.Image]:
        """Return pictures as they are after encoding and decoding."""
        found: list[PIL.Image.Image] = []
        for start in range(0, len(images), _BATCH):
            found += to_images(self._coder.decode(self._coder.encode(to_pixels(images[start : start + _BATCH]))))
        return found

    @torch.no_grad()
    def paint(
        self,
        prompts: Sequence[str],
        noise: Tensor,
        negative: Sequence[str] | None = None,
        people: UserEffect | None = None,
        strength: float = 1.0,
        steps: int = STEPS,
    ) -> list[PIL.Image.Image]:
        """Return one picture for each prompt.

        Args:
            prompts: one for each picture.
            noise: the initial noise, ``[pictures, channels, 12, 12]``.
            negative: negative prompts; by default empty ones.
            people: what the pictures' persons change, one each, on the painter's device; None for the base.
            strength: of the adapter.
            steps: of DPM-Solver++ (2M), with classifier-free guidance of 3.
        """
        without, asked = (
            Text(self._encode(names).to(self._device)) for names in (negative or [""] * len(prompts), prompts)
        )
        inputs = guided_inputs(people, without, asked, strength)
        with self._attachment.applied(inputs.vectors, inputs.gates):
            latents = denoise(
                self._unet, self.base.sampler(), inputs.text, noise.to(self._device), steps, GUIDANCE_SCALE
            )
        return to_images(self._coder.decode(latents))

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        unknown = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        for prompt, embedding in zip(unknown, self._text.encode(unknown), strict=True):
            self._known[prompt] = embedding.hidden
        return torch.stack([self._known[prompt] for prompt in prompts])
