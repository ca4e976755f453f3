"""A base model as a single-file checkpoint, in the layout that artists share (CompVis' and Stability's names)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ..errors import BaseModelError
from .checkpoint import SUFFIXES, Checkpoint
from .conversion import clip_weights, fill, named_for, open_clip_weights, tiny_vae_weights
from .detection import TIME_DIM, UnknownLayoutError, text_config, unet_config, vae_config
from .fingerprints import fingerprint
from .text import TextTower
from .tokenizer import clip_tokenizer

__all__ = ["SUFFIXES", "SingleFileSource"]

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_SCALING, _SCALING_XL = 0.18215, 0.13025
_TIME_IDS = 6
_V_PREDICTION_SIGN = f"{_UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SD2_CONTEXT, _SD2_THRESHOLD = 1024, 0.09

Read = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class _Tower:
    """A text encoder inside the file: where it is, and what the family makes of it."""

    prefix: str
    open_clip: bool
    projected: bool = False  # it gives the pooled text
    skip_last: bool = False  # SD2 ends one layer earlier


_CLIP = _Tower("cond_stage_model.transformer.", open_clip=False)
_OPEN_CLIP = tuple(
    _Tower(prefix, open_clip=True, skip_last=True)
    for prefix in ("cond_stage_model.model.", "conditioner.embedders.0.model.")
)
_SDXL = (
    _Tower("conditioner.embedders.0.transformer.", open_clip=False),
    _Tower("conditioner.embedders.1.model.", open_clip=True, projected=True),
)


class SingleFileSource:
    """The parts of a checkpoint. Opening reads names and shapes, and checks that every part is whole."""

    def __init__(self, path: Path) -> None:
        """Open the file ``path``.

        Raises:
            BaseModelError: it is damaged, holds no UNet of the family, or lacks a part.
        """
        self.path = path
        self._file = Checkpoint(path)
        self._check_kind()
        self._towers = self._find_towers()
        is_sdxl = self._towers == _SDXL
        self._tiny_vae = f"{_VAE}taesd_decoder.1.weight" in self._file.shapes
        try:
            self.unet_config: Mapping[str, Any] = unet_config(self._shapes(_UNET))
            self._vae_config = self._describe_vae(_SCALING_XL if is_sdxl else _SCALING)
        except (UnknownLayoutError, LookupError) as error:
            raise BaseModelError(
                f"The UNet or VAE in {path} is none that diffusers has ({error}). Choose an SD1.x, SD2.x or SDXL model."
            ) from None
        self.latent_channels = int(self._vae_config["latent_channels"])
        levels = self._vae_config["block_out_channels" if not self._tiny_vae else "encoder_block_out_channels"]
        self.vae_scale_factor = int(2 ** (len(levels) - 1))
        self.scheduler_config: Mapping[str, Any] = self._describe_schedule()
        self._check_parts(is_sdxl)

    def load_unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """Load the UNet, each weight as ``dtype``."""
        return self._make_unet(self._file.read, dtype)

    def load_vae(self) -> AutoencoderKL | AutoencoderTiny:
        """Load the VAE in float32."""
        return self._make_vae(self._file.read)

    def load_text(self) -> list[TextTower]:
        """Load the text encoders in float32; the tokenizer is CLIP's for all of them."""
        tokenizer = clip_tokenizer()
        return [
            TextTower(tokenizer, self._make_text(tower, self._file.read), 0 if tower.open_clip else None)
            for tower in self._towers
        ]

    def fingerprint(self, part: Literal["unet", "vae", "text"]) -> str:
        """Hash the file; it is one for all parts."""
        return fingerprint([self.path], part)

    def _make_unet(self, read: Read, dtype: torch.dtype) -> UNet2DConditionModel:
        weights = convert_ldm_unet_checkpoint(read(_UNET), self.unet_config)
        return fill(lambda: UNet2DConditionModel.from_config(self.unet_config), weights, dtype, self.path)

    def _make_vae(self, read: Read) -> AutoencoderKL | AutoencoderTiny:
        config, weights = self._vae_config, read(_VAE)
        if self._tiny_vae:
            inner = {name.removeprefix(_VAE): tensor for name, tensor in weights.items()}
            tiny = tiny_vae_weights(inner)
            return fill(lambda: AutoencoderTiny.from_config(config), tiny, torch.float32, self.path)
        weights = convert_ldm_vae_checkpoint(weights, config)
        return fill(lambda: AutoencoderKL.from_config(config), weights, torch.float32, self.path)

    def _make_text(self, tower: _Tower, read: Read) -> Any:
        rename = open_clip_weights if tower.open_clip else clip_weights
        weights = rename(read(tower.prefix), tower.prefix)
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        options = text_config(shapes, "gelu" if tower.open_clip else "quick_gelu")
        options["num_hidden_layers"] -= tower.skip_last
        config = CLIPTextConfig(**options)
        kind = CLIPTextModelWithProjection if tower.projected else CLIPTextModel
        return fill(lambda: kind(config), named_for(lambda: kind(config), weights), torch.float32, self.path)

    def _shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        shapes = self._file.shapes
        return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}

    def _describe_vae(self, scale: float) -> dict[str, Any]:
        shapes = self._shapes(_VAE)
        if not self._tiny_vae:
            return vae_config(shapes, scale)
        width, latents = shapes["taesd_decoder.1.weight"][:2]
        # ComfyUI scales TAESD's latents like those of any other VAE, and lets a file undo it with these two.
        own = self._file.read(f"{_VAE}vae_scale", f"{_VAE}vae_shift")
        own_scale = float(own.get(f"{_VAE}vae_scale", 1.0))
        return {
            "latent_channels": latents,
            "encoder_block_out_channels": [width] * 4,
            "decoder_block_out_channels": [width] * 4,
            "scaling_factor": scale / own_scale,
            "shift_factor": -own_scale * float(own.get(f"{_VAE}vae_shift", 0.0)),
        }

    def _describe_schedule(self) -> dict[str, Any]:
        """All of the family were trained with the same noise; what they predict differs."""
        velocity = "v_pred" in self._file.shapes
        if self.unet_config["cross_attention_dim"] == _SD2_CONTEXT and _V_PREDICTION_SIGN in self._file.shapes:
            # ComfyUI's way to tell the two kinds of SD2 apart.
            bias = self._file.read(_V_PREDICTION_SIGN)[_V_PREDICTION_SIGN]
            velocity |= float(bias.float().std(correction=0)) > _SD2_THRESHOLD
        return {
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "v_prediction" if velocity else "epsilon",
            "rescale_betas_zero_snr": "ztsnr" in self._file.shapes,
        }

    def _check_kind(self) -> None:
        shapes = self._file.shapes
        if f"{_UNET}input_blocks.0.0.weight" not in shapes:
            other = any(name.startswith(_UNET) for name in shapes)
            found = "a model without a UNet (a transformer, perhaps)" if other else "no complete checkpoint"
            raise BaseModelError(
                f"{self.path} holds {found}; expected UNet, VAE and text encoder of an SD1.x, SD2.x or SDXL model in "
                f"one file ({_UNET}input_blocks...). Choose another base model."
            )
        if f"{_VAE}decoder.conv_in.weight" not in shapes and f"{_VAE}taesd_decoder.1.weight" not in shapes:
            raise BaseModelError(
                f"{self.path} has no VAE ({_VAE}...). Use a complete checkpoint: save one in ComfyUI with the node "
                "Save Checkpoint."
            )
        edm = next((name for name in shapes if name.startswith("edm_")), None)
        if edm is not None:
            raise BaseModelError(
                f"{self.path} is made for EDM noise ({edm}), which training does not know. Choose another base model."
            )
        scaled = next((name for name in shapes if name.endswith((".scale_weight", "scaled_fp8"))), None)
        if scaled is not None:
            raise BaseModelError(f"{self.path} holds scaled fp8 weights ({scaled}). Use the fp16 or fp32 checkpoint.")

    def _find_towers(self) -> tuple[_Tower, ...]:
        def has(tower: _Tower) -> bool:
            return any(name.startswith(tower.prefix) for name in self._file.shapes)

        labelled = f"{_UNET}label_emb.0.0.weight" in self._file.shapes
        layouts = [_SDXL] if labelled else [(_CLIP,), *((tower,) for tower in _OPEN_CLIP)]
        for layout in layouts:
            if all(has(tower) for tower in layout):
                return layout
        needed = " and ".join(tower.prefix for tower in _SDXL) if labelled else _CLIP.prefix
        raise BaseModelError(
            f"{self.path} has not the text encoder of its family (expected {needed}...). Use a complete checkpoint "
            "of SD1.x, SD2.x or SDXL; the SDXL refiner and unCLIP are none."
        )

    def _check_parts(self, is_sdxl: bool) -> None:
        """Build every part from shapes alone, so that what is missing shows now and not after hours."""
        try:
            self._make_unet(self._file.outline, torch.float32)
            self._make_vae(self._file.outline)
            texts = [self._make_text(tower, self._file.outline).config for tower in self._towers]
        except (LookupError, AttributeError, ValueError) as error:
            raise BaseModelError(f"{self.path} is incomplete (found no {error}). Get it again.") from None
        context, width = self.unet_config["cross_attention_dim"], sum(text.hidden_size for text in texts)
        if context != width:
            raise BaseModelError(
                f"The UNet in {self.path} reads {context} numbers per token, its text encoder writes {width}. "
                "The parts are of different models: get another checkpoint."
            )
        if is_sdxl:
            label = self.unet_config["projection_class_embeddings_input_dim"]
            expected = _TIME_IDS * TIME_DIM + texts[-1].projection_dim
            if label != expected:
                raise BaseModelError(
                    f"The UNet in {self.path} is told {label} numbers besides the text, expected {expected} (SDXL). "
                    "Choose another base model."
                )
