"""Tiny diffusers pipelines with random weights: the topologies of SD1.5 and SDXL, seconds on a CPU.

Heads are as the helpers for ComfyUI have them: four per layer in SD1.5, 16 channels each in SDXL.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from comfyui_psa.training.base.tokenizer import clip_tokenizer

POOLED_DIM = 16
_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def write_sd_pipeline(
    folder: Path,
    seed: int = 0,
    prediction_type: str = "epsilon",
    zero_snr: bool = False,
    cross_attention_dim: int = 24,
    small: bool = False,
) -> StableDiffusionPipeline:
    """Write (and return) a pipeline with SD1.5's 16 cross-attention layers, 8 pixels per latent.

    With another ``prediction_type`` than "epsilon" it has the linear projections of SD2. A ``small`` one has 4 such
    layers, in two levels: it is loaded many times faster.
    """
    generator = torch.Generator().manual_seed(seed)
    topology: dict[str, Any] = {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 2}
    if small:
        topology = {"block_out_channels": (32, 64), "layers_per_block": 1}
        topology |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
        topology |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    unet = UNet2DConditionModel(
        **topology,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        sample_size=8,
        use_linear_projection=prediction_type != "epsilon",
    )
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1, prediction_type=prediction_type, **_NOISE)
    if zero_snr:
        scheduler = EulerDiscreteScheduler(
            prediction_type=prediction_type,
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            steps_offset=1,
            **_NOISE,
        )
    pipeline = StableDiffusionPipeline(
        vae=_randomised(_vae(0.18215), generator),
        text_encoder=_randomised(CLIPTextModel(_text_config(cross_attention_dim, "quick_gelu")), generator),
        tokenizer=clip_tokenizer(),
        unet=_randomised(unet, generator),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


def write_sdxl_pipeline(
    folder: Path, seed: int = 0, prediction_type: str = "epsilon", small: bool = False
) -> StableDiffusionXLPipeline:
    """Write (and return) a pipeline with two text encoders, and attention in two of three levels, as in SDXL.

    A ``small`` one has one layer in each block.
    """
    generator = torch.Generator().manual_seed(seed)
    widths = (24, POOLED_DIM)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64, 64),
        layers_per_block=1 if small else 2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1 if small else (1, 2, 3),
        cross_attention_dim=sum(widths),
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + POOLED_DIM,
        sample_size=8,
    )
    second = CLIPTextModelWithProjection(_text_config(widths[1], "gelu"))
    tokenizer_2 = clip_tokenizer()
    tokenizer_2.pad_token = "!"
    pipeline = StableDiffusionXLPipeline(
        vae=_randomised(_vae(0.13025), generator),
        text_encoder=_randomised(CLIPTextModel(_text_config(widths[0], "quick_gelu")), generator),
        text_encoder_2=_randomised(second, generator),
        tokenizer=clip_tokenizer(),
        tokenizer_2=tokenizer_2,
        unet=_randomised(unet, generator),
        scheduler=EulerDiscreteScheduler(prediction_type=prediction_type, steps_offset=1, **_NOISE),
    )
    pipeline.save_pretrained(folder)
    # Read back: the special "!" is one only from then on, and so it is in the real SDXL.
    return StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)


def _vae(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
        scaling_factor=scaling_factor,
    )


def _text_config(width: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        hidden_act=activation,
        projection_dim=POOLED_DIM,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=0,
    )


@torch.no_grad()
def _randomised(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw every weight, biases and norms too, so that nothing cancels by luck; activations stay near unit size."""
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            weight.copy_(0.3 * noise + float(name.endswith("weight")))
        elif "embedding" in name and "linear" not in name:
            weight.copy_(noise)
        else:
            weight.copy_(noise / weight[0].numel() ** 0.5)
    return model.eval()
