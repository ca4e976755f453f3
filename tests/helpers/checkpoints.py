"""Single-file checkpoints of tiny models, put together from the models that others run: ComfyUI's and open_clip's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.sd1_clip import SDClipModel
from comfy.taesd.taesd import TAESD
from comfy_testing import unet_weights
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from comfyui_psa.training.synthetic import UNetShape

UNET, VAE = "model.diffusion_model.", "first_stage_model."
SD1_TEXT = "cond_stage_model."
SD2_TEXT = "cond_stage_model.model."
SDXL_TEXTS = ("conditioner.embedders.0.", "conditioner.embedders.1.model.")
LAYERS = 3

CLIP_WIDTH, OPEN_CLIP_WIDTH, POOLED = 64, 128, 32
SD1 = UNetShape(32, (1, 2, 2), 2, (1, 1, 0), 1, CLIP_WIDTH)
SD2 = UNetShape(64, (1, 2), 2, (1, 1), 1, OPEN_CLIP_WIDTH, linear_projection=True)
SDXL = UNetShape(64, (1, 1, 2), 2, (0, 2, 3), 3, CLIP_WIDTH + OPEN_CLIP_WIDTH, True, 6 * 256 + POOLED)


def clip_l(penultimate: bool = False) -> SDClipModel:
    """ComfyUI's CLIP-L, narrow, with one head; for SDXL it gives the last layer but one as it is."""
    config = {
        "hidden_act": "quick_gelu",
        "hidden_size": CLIP_WIDTH,
        "intermediate_size": 2 * CLIP_WIDTH,
        "num_attention_heads": 1,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "eos_token_id": 49407,
    }
    layers = {"layer": "hidden", "layer_idx": -2, "layer_norm_hidden_state": False} if penultimate else {}
    return randomised(SDClipModel(textmodel_json_config=config, dtype=torch.float32, **layers), 1)


def open_clip_tower(width: int = OPEN_CLIP_WIDTH, vocabulary: int = 49408) -> TextTransformer:
    """open_clip's text tower, narrow; 64 channels per head as in its H and bigG."""
    return randomised(
        TextTransformer(vocab_size=vocabulary, width=width, heads=width // 64, layers=LAYERS, output_dim=POOLED), 2
    )


def autoencoder() -> AutoencoderKL:
    """ComfyUI's VAE, narrow, eight pixels per latent."""
    config = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 64,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 2, 2],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return randomised(AutoencoderKL(ddconfig=config, embed_dim=4), 3)


def tiny_autoencoder(vae_scale: float, vae_shift: float) -> TAESD:
    """ComfyUI's TAESD, with its own scale and shift."""
    vae = randomised(TAESD(), 4)
    nn.init.constant_(vae.vae_scale, vae_scale)
    nn.init.constant_(vae.vae_shift, vae_shift)
    return vae


@torch.no_grad()
def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Draw every weight, biases and norms too; activations stay near unit size."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim < 2:
            weight.copy_(0.3 * noise + float(name.endswith("weight")))
        elif "embedding" in name:
            weight.copy_(noise)
        else:
            weight.copy_(noise / weight[0].numel() ** 0.5)
    return model.requires_grad_(False).eval()


def behind(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the weights with ``prefix`` in front of their names."""
    return {prefix + name: tensor.clone() for name, tensor in weights.items()}


def sd1_weights(unet: UNetShape = SD1) -> dict[str, Tensor]:
    """A whole SD1 checkpoint."""
    return (
        behind(UNET, unet_weights(unet))
        | behind(SD1_TEXT, clip_l().state_dict())
        | behind(VAE, autoencoder().state_dict())
    )


def sd2_weights(unet: UNetShape = SD2, vocabulary: int = 49408) -> dict[str, Tensor]:
    """A whole SD2 checkpoint."""
    tower = open_clip_tower(unet.context_dim, vocabulary)
    return (
        behind(UNET, unet_weights(unet))
        | behind(SD2_TEXT, tower.state_dict())
        | behind(VAE, autoencoder().state_dict())
    )


def sdxl_weights(unet: UNetShape = SDXL) -> dict[str, Tensor]:
    """A whole SDXL checkpoint."""
    return (
        behind(UNET, unet_weights(unet))
        | behind(SDXL_TEXTS[0], clip_l().state_dict())
        | behind(SDXL_TEXTS[1], open_clip_tower().state_dict())
        | behind(VAE, autoencoder().state_dict())
    )
