"""The frozen base model: what it is, and its parts, loaded when asked for. Nothing is fetched from a hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel

from ...safe_files import DAMAGE
from ..config import PredictionType
from ..errors import BaseModelError
from .coder import ImageCoder
from .folder import FolderSource
from .single_file import SUFFIXES, SingleFileSource
from .text import TextEncoder, TextTower

Part = Literal["unet", "vae", "text"]

_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_NOISE_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


class Source(Protocol):
    """Where the parts come from: a folder or a file. Every method may raise BaseModelError."""

    unet_config: Mapping[str, Any]
    scheduler_config: Mapping[str, Any]
    latent_channels: int
    vae_scale_factor: int

    def load_unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """Load the UNet, each weight as ``dtype``."""

    def load_vae(self) -> AutoencoderKL | AutoencoderTiny:
        """Load the VAE in float32."""

    def load_text(self) -> list[TextTower]:
        """Load the text encoders in float32."""

    def fingerprint(self, part: Part) -> str:
        """Hash what a part is loaded from."""


class BaseModel:
    """A base model, opened. Every part is loaded anew when asked for, so dropping it frees its memory."""

    def __init__(self, path: Path, source: Source, prediction_type: PredictionType = "auto") -> None:
        """Look at the configuration of ``source``; ``path`` is for messages.

        Raises:
            BaseModelError: the UNet is of a kind that no adapter can be trained for.
        """
        self.path = path
        self._source = source
        stated = str(source.scheduler_config.get("prediction_type", "epsilon"))
        self.prediction_type = stated if prediction_type == "auto" else prediction_type
        if self.prediction_type not in _PREDICTIONS:
            raise BaseModelError(
                f"{path} predicts {self.prediction_type}; expected one of {', '.join(_PREDICTIONS)}. "
                "Set model.prediction_type, or choose another base model."
            )
        self.latent_channels = source.latent_channels
        self.vae_scale_factor = source.vae_scale_factor
        unet = _empty_unet(path, source.unet_config)
        self.unet_config: Mapping[str, Any] = dict(unet.config)
        self.is_sdxl = self.unet_config["addition_embed_type"] == "text_time"
        self.pooled_dim = self._pooled_dim() if self.is_sdxl else None
        self._check_unet()

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """Load the UNet on the CPU, frozen, each weight as ``dtype``."""
        return self._source.load_unet(dtype).requires_grad_(False).eval()

    def empty_unet(self) -> UNet2DConditionModel:
        """Return the UNet without weights, on the meta device."""
        return _empty_unet(self.path, self.unet_config)

    def vae(self, device: torch.device) -> ImageCoder:
        """Load the VAE onto ``device``."""
        return ImageCoder(self._source.load_vae(), device)

    def text_towers(self) -> list[TextTower]:
        """Load the text encoders, with their tokenizers, on the CPU."""
        return self._source.load_text()

    def text_encoder(self, device: torch.device) -> TextEncoder:
        """Load the text encoders onto ``device``."""
        return TextEncoder(self.text_towers(), self.is_sdxl, device)

    def noise_scheduler(self) -> DDPMScheduler:
        """Return the noise schedule of the model's training, and what it predicts."""
        return DDPMScheduler(clip_sample=False, **self._noise_options())

    def sampler(self) -> DPMSolverMultistepScheduler:
        """Return a deterministic sampler that makes pictures in some 20 steps."""
        return DPMSolverMultistepScheduler(timestep_spacing="trailing", **self._noise_options())

    def fingerprint(self, part: Part) -> str:
        """Return a SHA-256 (hex) of what decides the results of a part: the contents of its files."""
        return self._source.fingerprint(part)

    def _pooled_dim(self) -> int:
        """The width of the pooled text, which the UNet reads in one vector with the six time ids."""
        config = self.unet_config
        return int(config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"])

    def _noise_options(self) -> dict[str, Any]:
        config = self._source.scheduler_config
        options = {key: config[key] for key in _NOISE_KEYS if key in config}
        options["rescale_betas_zero_snr"] = bool(config.get("rescale_betas_zero_snr", False))
        return options | {"prediction_type": self.prediction_type}

    def _check_unet(self) -> None:
        config = self.unet_config
        channels = (config["in_channels"], config["out_channels"])
        if channels != (self.latent_channels, self.latent_channels):
            raise BaseModelError(
                f"The UNet of {self.path} has {channels[0]} channels in and {channels[1]} out, but its latents have "
                f"{self.latent_channels}: it is made for inpainting, editing or upscaling. Choose a "
                "text-to-image model."
            )
        embeddings = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")
        unknown = [f"{key} = {config[key]}" for key in embeddings if config[key] is not None]
        if config["addition_embed_type"] not in (None, "text_time"):
            unknown.append(f"addition_embed_type = {config['addition_embed_type']}")
        if unknown:
            raise BaseModelError(
                f"The UNet of {self.path} is told more than text and size ({'; '.join(unknown)}). "
                "Choose an SD1.x, SD2.x or SDXL model for text to image."
            )


def open_base(path: Path, prediction_type: PredictionType = "auto") -> BaseModel:
    """Open a diffusers folder or a single-file checkpoint; weights are loaded later.

    ``prediction_type`` overrides what the model says of itself.

    Raises:
        BaseModelError: there is nothing at ``path``, it is neither of the two, it is no Stable Diffusion with a
            UNet, or it is damaged or incomplete.
    """
    if path.is_dir():
        return BaseModel(path, FolderSource(path), prediction_type)
    if not path.exists():
        raise BaseModelError(
            f"There is no base model {path}. Set model.base to a diffusers folder or a single-file checkpoint."
        )
    if path.suffix.lower() not in SUFFIXES:
        raise BaseModelError(
            f"{path.name} is no base model: expected a diffusers folder, or a checkpoint with one of the endings "
            f"{', '.join(SUFFIXES)}."
        )
    return BaseModel(path, SingleFileSource(path), prediction_type)


def _empty_unet(path: Path, config: Mapping[str, Any]) -> UNet2DConditionModel:
    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(dict(config)).requires_grad_(False).eval()
    except DAMAGE as error:
        raise BaseModelError(
            f"The description of the UNet in {path} makes no UNet ({error}). Get the base model again."
        ) from None
