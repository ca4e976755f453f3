"""Models as artists have them: SD1.5 at full size, SDXL with all of its 70 sites."""

from __future__ import annotations

from pathlib import Path

import comfy.model_detection
import comfy.ops
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy_testing import DEVICE, comfy_model, conditioning, denoise, difference, noise
from torch import nn

from comfyui_psa.adapter import AdapterConfig, AdapterError, EncoderSpec, PSAAdapter, find_sites, load_adapter
from comfyui_psa.nodes.apply import apply_psa
from comfyui_psa.profiles import SafetyEmbedding
from comfyui_psa.training.synthetic import (
    SD15,
    SDXL,
    UNetShape,
    attention_widths,
    random_weights,
    unet_shapes,
    write_release_adapter,
)


def structure(shape: UNetShape) -> nn.Module:
    """ComfyUI's UNet of this shape, without memory for its weights."""
    with torch.device("meta"):
        weights = {name: torch.empty(size) for name, size in unet_shapes(shape)}
    config = comfy.model_detection.detect_unet_config(weights, "")
    config |= {"num_heads": -1, "num_head_channels": 64} if shape.adm_channels else {"num_heads": 8}
    config.setdefault("num_head_channels", -1)
    unet = UNetModel(**config, device="meta", operations=comfy.ops.disable_weight_init)
    unet.load_state_dict(weights, strict=True, assign=True)
    return unet


def patcher(unet: nn.Module) -> ModelPatcher:
    model = nn.Module()
    model.diffusion_model = unet
    return ModelPatcher(model, load_device=DEVICE, offload_device=DEVICE)


def test_sd15_at_full_size_follows_a_user(tmp_path: Path) -> None:
    model = comfy_model(random_weights(unet_shapes(SD15), torch.Generator().manual_seed(0)))
    write_release_adapter(tmp_path / "psa_adapter.bin", attention_widths(SD15), 768, 3584)
    adapter = load_adapter(tmp_path / "psa_adapter.bin")
    assert adapter.config.base == "sd1"
    assert adapter.config.num_sites == 16
    embedding = SafetyEmbedding(torch.randn(1, 3584, generator=torch.Generator().manual_seed(0)))
    prompt = conditioning(SD15, 1)
    patched = apply_psa(model, adapter, embedding)
    assert (
        difference(
            denoise(patched, prompt, prompt, noise(1, 4, 8, 8)), denoise(model, prompt, prompt, noise(1, 4, 8, 8))
        )
        > 0.01
    )


def test_sdxl_maps_all_of_its_sites() -> None:
    config = AdapterConfig(
        hidden_sizes=attention_widths(SDXL),
        cross_attention_dim=2048,
        embedding_dim=37,
        encoder=EncoderSpec(kind="attributes", name="attributes-1"),
    )
    assert config.base == "sdxl"
    assert config.num_sites == 70
    adapter = PSAAdapter(config)
    sdxl = patcher(structure(SDXL))
    patched = apply_psa(sdxl, adapter, SafetyEmbedding(torch.zeros(1, 37)))
    (patch,) = patched.model_options["transformer_options"]["patches"]["attn2_output_patch"]
    assert [site.key for site in patch.sites] == [site.key for site in find_sites(sdxl.model.diffusion_model)]
    assert sum(row.shape[1] for row in patch.rows) == 83_200


def test_an_adapter_for_another_family_is_refused(tmp_path: Path) -> None:
    write_release_adapter(tmp_path / "psa_adapter.bin", attention_widths(SD15), 768, 12)
    adapter = load_adapter(tmp_path / "psa_adapter.bin")
    with pytest.raises(AdapterError, match=r"trained for SD1.x \(16 .* model is SDXL \(70 "):
        apply_psa(patcher(structure(SDXL)), adapter, SafetyEmbedding(torch.zeros(1, 12)))


def test_a_model_without_cross_attention_is_refused(tmp_path: Path) -> None:
    from comfy.ldm.flux.model import Flux

    flux = Flux(
        **{"in_channels": 4, "out_channels": 4, "vec_in_dim": 8, "context_in_dim": 8, "hidden_size": 16},
        **{"mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 4], "theta": 100},
        **{"patch_size": 1, "qkv_bias": True, "guidance_embed": False, "device": "meta", "dtype": torch.float32},
        operations=comfy.ops.disable_weight_init,
    )
    write_release_adapter(tmp_path / "psa_adapter.bin", attention_widths(SD15), 768, 12)
    adapter = load_adapter(tmp_path / "psa_adapter.bin")
    with pytest.raises(AdapterError, match=r"no cross-attention .* SD1.x, SD2.x, SDXL"):
        apply_psa(patcher(flux), adapter, SafetyEmbedding(torch.zeros(1, 12)))
