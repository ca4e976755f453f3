"""LoRAs from disk, through diffusers' own loader (which knows kohya's names, too), fused into the base's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from ....safe_files import DAMAGE
from ...base import BaseModel
from ...base.text import TextTower
from ...errors import BaseModelError

SUFFIX = ".safetensors"


def check_lora(base: BaseModel, path: Path) -> None:
    """Raise BaseModelError unless ``path`` is a LoRA for the UNet of ``base``."""
    if not path.is_file() or path.suffix != SUFFIX:
        raise BaseModelError(f"There is no LoRA {path}. Name a {SUFFIX} file.")
    _load(base, base.empty_unet(), (), path)


def fuse_lora(base: BaseModel, unet: Any, towers: Sequence[TextTower], path: Path, strength: float) -> None:
    """Add a LoRA to the weights of ``unet`` and of the text encoders, which it changes in place.

    Raises:
        BaseModelError: the file is damaged, no LoRA, or one for another model.
    """
    pipeline = _load(base, unet, towers, path)
    parts = [name for name in pipeline._lora_loadable_modules if getattr(pipeline, name, None) is not None]
    pipeline.fuse_lora(components=parts, lora_scale=strength)
    pipeline.unload_lora_weights()


def _load(base: BaseModel, unet: Any, towers: Sequence[TextTower], path: Path) -> Any:
    pipeline = _pipeline(base, unet, towers)
    try:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)
    except DAMAGE as error:
        raise BaseModelError(
            f"{path} cannot be used as a LoRA for {base.path} ({str(error).splitlines()[0]:.200}). It is damaged, no "
            "LoRA, or one for another kind of model."
        ) from None
    if not getattr(unet, "peft_config", None):
        raise BaseModelError(f"{path} holds nothing for the UNet of {base.path}. Name a LoRA for this kind of model.")
    return pipeline


@torch.no_grad()
def _pipeline(base: BaseModel, unet: Any, towers: Sequence[TextTower]) -> Any:
    first, second = (*towers, None, None)[:2]
    parts: dict[str, Any] = {"unet": unet, "vae": None, "scheduler": base.sampler()}
    parts |= {"text_encoder": first and first.model, "tokenizer": first and first.tokenizer}
    if base.is_sdxl:
        parts |= {"text_encoder_2": second and second.model, "tokenizer_2": second and second.tokenizer}
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
