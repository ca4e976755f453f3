"""Our nodes on a ComfyUI model against the paper's true two-branch attention on a diffusers UNet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_testing import (
    ROUNDING,
    TIMESTEP,
    TINY,
    TINY_SDXL,
    comfy_model,
    conditioning,
    denoise,
    difference,
    noise,
    sigma_at,
    unet_weights,
)
from diffusers_testing import TwoBranchUNet, diffusers_unet
from torch import Tensor

from comfyui_psa.adapter import PSAAdapter, find_sites, load_adapter
from comfyui_psa.nodes.apply import apply_psa
from comfyui_psa.profiles import SafetyEmbedding
from comfyui_psa.training.synthetic import write_release_adapter

POSITIVE = conditioning(TINY, 1)
NEGATIVE = conditioning(TINY, 2)
Users = Callable[..., SafetyEmbedding]


@pytest.fixture(scope="module")
def reference(model: ModelPatcher, weights: dict[str, Tensor], adapter_path: Path) -> TwoBranchUNet:
    release = torch.load(adapter_path, weights_only=True)
    return TwoBranchUNet(diffusers_unet(model, TINY, weights), release)


def predict(reference: TwoBranchUNet, model: ModelPatcher, latent: Tensor, context: Tensor, user: Tensor) -> Tensor:
    """The denoised latent by the reference."""
    sigma = sigma_at(model)
    batch = latent.shape[0]
    eps = reference(latent / (sigma**2 + 1) ** 0.5, TIMESTEP, context.expand(batch, -1, -1), user.expand(batch, -1))
    return latent - sigma * eps


def assert_close(ours: Tensor, theirs: Tensor, base: Tensor) -> None:
    """Equal to float32 rounding, on a scale where the user makes a difference of another size."""
    assert difference(base, theirs) > 0.01
    assert difference(ours, theirs) < ROUNDING


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (24, 16)])
def test_conditional_half_follows_the_user(
    model: ModelPatcher, adapter: PSAAdapter, users: Users, reference: TwoBranchUNet, size: tuple[int, int]
) -> None:
    latent = noise(1, 4, *size)
    ours = denoise(apply_psa(model, adapter, users(0)), POSITIVE, NEGATIVE, latent, cfg=1.0)
    theirs = predict(reference, model, latent, POSITIVE[0][0], users(0).vectors)
    assert_close(ours, theirs, denoise(model, POSITIVE, NEGATIVE, latent, cfg=1.0))


def test_unconditional_half_follows_the_zero_embedding(
    model: ModelPatcher, adapter: PSAAdapter, users: Users, reference: TwoBranchUNet
) -> None:
    latent = noise(2, 4, 16, 16)
    ours = denoise(apply_psa(model, adapter, users(0)), POSITIVE, NEGATIVE, latent, cfg=0.0)
    theirs = predict(reference, model, latent, NEGATIVE[0][0], torch.zeros_like(users(0).vectors))
    assert_close(ours, theirs, denoise(model, POSITIVE, NEGATIVE, latent, cfg=0.0))


def test_guidance_mixes_both_halves(
    model: ModelPatcher, adapter: PSAAdapter, users: Users, reference: TwoBranchUNet
) -> None:
    latent = noise(1, 4, 16, 16)
    ours = denoise(apply_psa(model, adapter, users(4)), POSITIVE, NEGATIVE, latent, cfg=7.5)
    positive = predict(reference, model, latent, POSITIVE[0][0], users(4).vectors)
    negative = predict(reference, model, latent, NEGATIVE[0][0], torch.zeros_like(users(4).vectors))
    theirs = negative + 7.5 * (positive - negative)
    assert_close(ours, theirs, denoise(model, POSITIVE, NEGATIVE, latent, cfg=7.5))


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_strength_scales_the_user_branch(
    model: ModelPatcher,
    weights: dict[str, Tensor],
    adapter: PSAAdapter,
    adapter_path: Path,
    users: Users,
    strength: float,
) -> None:
    release = torch.load(adapter_path, weights_only=True)
    scaled = TwoBranchUNet(diffusers_unet(model, TINY, weights), release, strength)
    latent = noise(1, 4, 16, 16)
    ours = denoise(apply_psa(model, adapter, users(0), strength), POSITIVE, NEGATIVE, latent)
    theirs = predict(scaled, model, latent, POSITIVE[0][0], users(0).vectors)
    assert_close(ours, theirs, denoise(model, POSITIVE, NEGATIVE, latent))


def test_sdxl_layout_follows_the_user(tmp_path: Path, users: Users) -> None:
    weights = unet_weights(TINY_SDXL)
    model = comfy_model(weights)
    sizes = tuple(site.hidden_size for site in find_sites(model.model.diffusion_model))
    write_release_adapter(tmp_path / "psa_adapter.bin", sizes, TINY_SDXL.context_dim, 12)
    release = torch.load(tmp_path / "psa_adapter.bin", weights_only=True)
    reference = TwoBranchUNet(diffusers_unet(model, TINY_SDXL, weights), release)

    latent = noise(1, 4, 16, 16)
    positive = conditioning(TINY_SDXL, 1)
    ours = denoise(apply_psa(model, load_adapter(tmp_path / "psa_adapter.bin"), users(0)), positive, positive, latent)
    base = denoise(model, positive, positive, latent)
    sigma = sigma_at(model)
    added = {
        "text_embeds": positive[0][1]["pooled_output"],
        "time_ids": torch.tensor([[128.0, 128.0, 0.0, 0.0, 128.0, 128.0]]),  # the size of the image, no crop
    }
    scaled = latent / (sigma**2 + 1) ** 0.5
    eps = reference(scaled, TIMESTEP, positive[0][0], users(0).vectors, added_cond_kwargs=added)
    assert_close(ours, latent - sigma * eps, base)
