"""The models that runs draw with: the base, another pipeline in its place, another UNet, or a LoRA on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ....adapter import find_sites
from ...base import BaseModel, open_base
from ...base.fingerprints import fingerprint
from ...base.folder import is_unet_folder, load_unet_folder, unet_files
from ...base.text import TextEmbedding, TextEncoder
from ...data.parts import free_memory
from ...dpo.attachment import Attachment
from ...dpo.inputs import Text
from ...dpo.policy import DTYPES
from ...errors import BaseModelError
from ..config import ModelSection
from ..methods import Run
from .lora import check_lora, fuse_lora

_REMEMBERED = 512  # prompts


@dataclass(frozen=True)
class Parts:
    """What a run's models are made of; ``strength`` is the LoRA's."""

    base: Path
    unet: Path | None = None
    lora: Path | None = None
    strength: float = 1.0


class Loaded:
    """Models in memory."""

    def __init__(self, base: BaseModel, parts: Parts, dtype: torch.dtype, device: torch.device) -> None:
        """Load what ``parts`` name onto ``device``; raise BaseModelError if something is damaged."""
        self.base = base
        unet = base.unet(dtype) if parts.unet is None else load_unet_folder(parts.unet, dtype)
        towers = base.text_towers()
        if parts.lora is not None:
            fuse_lora(base, unet, towers, parts.lora, parts.strength)
        self.unet = unet.to(device)
        self.attachment = Attachment(self.unet, find_sites(self.unet))
        self.coder = base.vae(device)
        self._encoder = TextEncoder(towers, base.is_sdxl, device)
        self._device = device
        self._known: dict[str, TextEmbedding] = {}

    def read(self, prompts: Sequence[str]) -> Text:
        """Return what the UNet reads of prompts."""
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        unknown = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        self._known.update(zip(unknown, self._encoder.encode(unknown), strict=True))
        found = [self._known[prompt] for prompt in prompts]
        hidden = torch.stack([embedding.hidden for embedding in found]).to(self._device)
        pooled = [embedding.pooled for embedding in found if embedding.pooled is not None]
        return Text(hidden, torch.stack(pooled).to(self._device) if pooled else None)


class Models:
    """Knows the models of all runs, and has those of one in memory."""

    def __init__(self, section: ModelSection, device: torch.device) -> None:
        """Open the base; raise BaseModelError if there is none."""
        self._section = section
        self._device = device
        self._open = cache(lambda path: open_base(path, section.prediction_type if path == section.base else "auto"))
        self._loaded: tuple[Parts, Loaded] | None = None
        self.base: BaseModel = self._open(section.base)

    def parts(self, run: Run) -> Parts:
        """Return what a run is drawn with."""
        base = self._section.base
        if run.kind == "lora":
            return Parts(base, lora=run.path, strength=run.strength)
        if run.kind == "pipeline" and run.path is not None:
            return Parts(base, unet=run.path) if is_unet_folder(run.path) else Parts(run.path)
        return Parts(base)

    def check(self, run: Run) -> None:
        """Raise BaseModelError unless the models of a run are there and draw with the base's noise."""
        parts = self.parts(run)
        if parts.lora is not None:
            check_lora(self.base, parts.lora)
        found, ours = self._open(parts.base), self.base
        if (found.latent_channels, found.vae_scale_factor) != (ours.latent_channels, ours.vae_scale_factor):
            raise BaseModelError(
                f"{parts.base} has {found.latent_channels} latent channels of {found.vae_scale_factor} pixels, the "
                f"base {ours.path} {ours.latent_channels} of {ours.vae_scale_factor}: they cannot be given the same "
                "noise. "
                "Compare it with a base of its own kind."
            )
        if parts.unet is not None:
            layers = [(site.hidden_size, site.cross_attention_dim) for site in find_sites(ours.empty_unet())]
            unet = load_unet_folder(parts.unet, None)
            if [(site.hidden_size, site.cross_attention_dim) for site in find_sites(unet)] != layers:
                raise BaseModelError(
                    f"The UNet in {parts.unet} has other cross-attention layers than that of {ours.path}, so it cannot "
                    "take its place. Name a UNet of the base's kind, or a whole pipeline."
                )

    def name(self, run: Run) -> str:
        """Return the names of a run's models and a hash of their weights and noise schedule, without a LoRA."""
        parts = self.parts(run)
        base = self._open(parts.base)
        unet = base.fingerprint("unet") if parts.unet is None else fingerprint(unet_files(parts.unet))
        digests = (unet, base.fingerprint("text"), base.fingerprint("vae"), _schedule(base))
        names = _name(parts.base) if parts.unet is None else f"{_name(parts.unet)} on {_name(parts.base)}"
        return f"{names} {fingerprint([], *digests)[:12]}"

    def load(self, run: Run) -> Loaded:
        """Return the models of a run; those of another one leave the memory first."""
        parts = self.parts(run)
        if self._loaded is None or self._loaded[0] != parts:
            self.unload()
            loaded = Loaded(self._open(parts.base), parts, DTYPES[self._section.precision], self._device)
            self._loaded = (parts, loaded)
        return self._loaded[1]

    def unload(self) -> None:
        """Let go of what is in memory."""
        if self._loaded is not None:
            self._loaded = None
            free_memory(self._device)


def noise(seed: int, channels: int, height: int, width: int) -> Tensor:
    """Return the initial noise ``[1, channels, height, width]`` of a picture, in latents.

    It is drawn on the CPU for each picture alone, so it depends on neither the batch nor the device, and is what
    ComfyUI draws with this seed.
    """
    return torch.randn((1, channels, height, width), generator=torch.Generator().manual_seed(seed))


def _schedule(base: BaseModel) -> str:
    """Return in words how noise goes down and what is predicted; names of versions, which begin with _, left out."""
    config = base.sampler().config
    return repr(sorted((key, value) for key, value in config.items() if not key.startswith("_")))


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}" if path.name == "unet" else path.name
