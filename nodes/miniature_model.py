"""The miniature as ComfyUI's own MODEL, CLIP and VAE, built from a diffusers folder.

ComfyUI recognises models by their weights and does not know this one, so its classes are given their settings here.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import comfy.model_management as mm
import comfy.utils
import torch
from comfy.latent_formats import LatentFormat
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer
from comfy.supported_models_base import BASE, ClipTarget
from comfy.taesd.taesd import TAESD, Block, Clamp, conv
from torch import Tensor, nn
from transformers import CLIPTokenizer

from . import miniature_files as files
from .miniature_files import MiniatureFiles, NoiseDescription, TextDescription, UNetDescription, VAEDescription


class Miniature(NamedTuple):
    """What a checkpoint loader gives: for samplers, for text encoding, for latents and pictures."""

    model: ModelPatcher
    clip: CLIP
    vae: VAE


def load_miniature(folder: Path) -> Miniature:
    """Load a miniature in diffusers' layout; ComfyUI decides on its precision and devices.

    Raises:
        MiniatureError: a file is missing, damaged or describes another kind of model.
    """
    found = MiniatureFiles(folder)
    vae = found.describe(files.VAE_CONFIG, VAEDescription)
    return Miniature(_load_unet(found, vae), _load_clip(found), _load_vae(found, vae))


class MiniatureLatents(LatentFormat):
    """Latents of the miniature's autoencoder."""

    def __init__(self, vae: VAEDescription) -> None:
        """Take channels, scale and size from the autoencoder's description."""
        self.latent_channels = vae.latent_channels
        self.scale_factor = vae.scaling_factor
        # Newer releases read this; older ones take 8 for granted.
        self.spacial_downscale_ratio = vae.pixels_per_latent


class MiniatureConfig(BASE):
    """ComfyUI's settings for the UNet: shape, latents, noise."""

    unet_extra_config: ClassVar[dict[str, Any]] = {}

    def __init__(self, unet: UNetDescription, vae: VAEDescription, noise: NoiseDescription) -> None:
        """Translate the descriptions of a diffusers folder."""
        super().__init__(comfy_unet_config(unet))
        self.latent_format = MiniatureLatents(vae)
        # ComfyUI's "linear" is linear in the square root, which diffusers calls "scaled_linear".
        self.sampling_settings = {
            "beta_schedule": "linear",
            "linear_start": noise.beta_start,
            "linear_end": noise.beta_end,
            "timesteps": noise.num_train_timesteps,
        }
        self._prediction = noise.prediction_type

    def model_type(self, state_dict: Any, prefix: str = "") -> ModelType:
        """Return what the UNet predicts."""
        return ModelType.V_PREDICTION if self._prediction == "v_prediction" else ModelType.EPS

    def inpaint_model(self) -> bool:
        """Return False: ComfyUI would take more than four channels for an inpainting model."""
        return False


def comfy_unet_config(unet: UNetDescription) -> dict[str, Any]:
    """Return the arguments of ComfyUI's ``UNetModel`` for a diffusers UNet."""
    levels = range(len(unet.block_out_channels))
    down, up = unet.down_block_types, unet.up_block_types[::-1]
    depths = unet.transformer_layers_per_block
    layers = unet.layers_per_block
    return {
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "adm_in_channels": None,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "model_channels": unet.block_out_channels[0],
        "channel_mult": [width // unet.block_out_channels[0] for width in unet.block_out_channels],
        "num_res_blocks": [layers for _ in levels],
        "transformer_depth": [depths[i] * down[i].startswith("CrossAttn") for i in levels for _ in range(layers)],
        "transformer_depth_output": [
            depths[i] * up[i].startswith("CrossAttn") for i in levels for _ in range(layers + 1)
        ],
        "transformer_depth_middle": depths[-1],
        "context_dim": unet.cross_attention_dim,
        "use_linear_in_transformer": unet.use_linear_projection,
        "num_heads": unet.attention_head_dim,
        "num_head_channels": -1,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
    }


def _load_unet(found: MiniatureFiles, vae: VAEDescription) -> ModelPatcher:
    unet = found.describe(files.UNET_CONFIG, UNetDescription)
    noise = found.describe(files.SCHEDULER_CONFIG, NoiseDescription)
    config = MiniatureConfig(unet, vae, noise)
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    weights = {names.get(name, name): tensor for name, tensor in found.weights(files.UNET).items()}

    device = mm.get_torch_device()
    supported = list(config.supported_inference_dtypes)
    dtype = mm.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=supported,
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    config.set_inference_dtype(dtype, mm.unet_manual_cast(dtype, device, supported))
    offload_device = mm.unet_offload_device()
    model = config.get_model(weights, "").to(offload_device)
    found.check_fit(files.UNET, weights, model.diffusion_model.state_dict())
    model.load_model_weights(weights, "")
    return ModelPatcher(model, load_device=device, offload_device=offload_device)


class MiniatureTextModel(SDClipModel):
    """A CLIP text encoder of any size, with its own vocabulary; gives the last layer, normalised."""

    def __init__(
        self,
        text: TextDescription,
        tokenizer: CLIPTokenizer,
        device: Any = "cpu",
        dtype: torch.dtype | None = None,
        model_options: dict[str, Any] | None = None,
    ) -> None:
        """Build the encoder without weights."""
        special = {"start": tokenizer.bos_token_id, "end": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
        super().__init__(
            device=device,
            max_length=text.max_position_embeddings,
            textmodel_json_config={**text.model_dump(), "eos_token_id": tokenizer.eos_token_id},
            dtype=dtype,
            special_tokens=special,
            return_projected_pooled=False,
            model_options=model_options or {},
        )
        # ComfyUI makes a table of CLIP's 49408 tokens, whatever the vocabulary is.
        table = type(self.transformer.get_input_embeddings())
        fitting = table(text.vocab_size, text.hidden_size, dtype=dtype, device=device)
        self.transformer.set_input_embeddings(fitting.requires_grad_(False))


def _load_clip(found: MiniatureFiles) -> CLIP:
    text = found.describe(files.TEXT_CONFIG, TextDescription)
    tokenizer = found.tokenizer(text.vocab_size)
    weights = _text_weights(found.weights(files.TEXT_ENCODER), text)
    # Named as SD1's text encoder, so that LoRAs in the usual names find their layers.
    clip = CLIP(
        ClipTarget(
            partial(
                SD1Tokenizer,
                tokenizer=partial(
                    SDTokenizer,
                    tokenizer_path=str(found.folder / files.TOKENIZER),
                    max_length=text.max_position_embeddings,
                    pad_token=tokenizer.pad_token_id,
                    embedding_size=text.hidden_size,
                ),
            ),
            partial(SD1ClipModel, clip_model=partial(MiniatureTextModel, text, tokenizer)),
        ),
        parameters=comfy.utils.calculate_parameters(weights),
    )
    found.check_fit(files.TEXT_ENCODER, weights, clip.cond_stage_model.clip_l.transformer.state_dict())
    clip.load_sd(weights)
    return clip


def _text_weights(weights: dict[str, Tensor], text: TextDescription) -> dict[str, Tensor]:
    """Return the weights in ComfyUI's names; transformers 5 leaves out the prefix of older releases."""
    prefix = "text_model."
    named = {
        name if name.startswith(prefix) else prefix + name: tensor
        for name, tensor in weights.items()
        if not name.endswith("position_ids")
    }
    # The UNet uses no pooled text, so there is no projection of it; ComfyUI has the layer all the same.
    return {**named, "text_projection.weight": torch.eye(text.hidden_size)}


def _load_vae(found: MiniatureFiles, vae: VAEDescription) -> VAE:
    # ComfyUI knows tiny autoencoders of one width. Ranges, precision, devices and tiling are the same for any
    # width, so it sets up its own, whose layers are then replaced.
    loaded = VAE(sd=TAESD(latent_channels=vae.latent_channels).state_dict())
    tiny = loaded.first_stage_model
    tiny.taesd_encoder, tiny.taesd_decoder = _encoder(vae), _decoder(vae)
    weights = {_taesd_name(name): tensor for name, tensor in found.weights(files.VAE).items()}
    scale = {name: tensor for name, tensor in tiny.state_dict().items() if name in ("vae_scale", "vae_shift")}
    found.check_fit(files.VAE, weights, {name: t for name, t in tiny.state_dict().items() if name not in scale})
    tiny.load_state_dict({**weights, **scale})
    tiny.to(loaded.vae_dtype).requires_grad_(False).eval()
    loaded.downscale_ratio = loaded.upscale_ratio = vae.pixels_per_latent
    loaded.size = mm.module_size(tiny)
    return loaded


def _encoder(vae: VAEDescription) -> nn.Sequential:
    """Build diffusers' ``EncoderTiny``: pixels in [0, 1] to latents."""
    layers: list[nn.Module] = []
    for width, blocks in zip(vae.encoder_block_out_channels, vae.num_encoder_blocks, strict=True):
        layers.append(conv(width, width, stride=2, bias=False) if layers else conv(vae.in_channels, width))
        layers += [Block(width, width) for _ in range(blocks)]
    return nn.Sequential(*layers, conv(vae.encoder_block_out_channels[-1], vae.latent_channels))


def _decoder(vae: VAEDescription) -> nn.Sequential:
    """Build diffusers' ``DecoderTiny``: latents to pixels in [0, 1]."""
    layers: list[nn.Module] = [Clamp(), conv(vae.latent_channels, vae.decoder_block_out_channels[0]), nn.ReLU()]
    for width, blocks in zip(vae.decoder_block_out_channels, vae.num_decoder_blocks, strict=True):
        layers += [Block(width, width) for _ in range(blocks)]
        layers += [nn.Upsample(scale_factor=2), conv(width, width, bias=False)]
    # The last stage ends in the picture.
    return nn.Sequential(*layers[:-2], conv(vae.decoder_block_out_channels[-1], vae.out_channels))


def _taesd_name(name: str) -> str:
    """Return ComfyUI's name of a weight; its decoder counts the clamp as a layer, diffusers' does not."""
    part, _, rest = name.partition(".layers.")
    number, _, rest = rest.partition(".")
    if part not in ("encoder", "decoder") or not number.isdigit():
        return name
    return f"taesd_{part}.{int(number) + (part == 'decoder')}.{rest}"
