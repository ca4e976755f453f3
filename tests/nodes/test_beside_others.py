"""PSA beside the other things that artists put on a model, before and after them in the chain.

The independent computation: for one user, PSA is the base with another bias in every ``attn2.to_out``
(docs/architecture.md). So the expected prediction comes from a model without PSA whose biases are changed:
once for the user (conditional half), once for the null user (unconditional half).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.hooks
import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_perpneg import Guider_PerpNeg, perp_neg
from comfy_testing import DEVICE, ROUNDING, TINY, baked, comfy_model, conditioning, denoise, difference, noise
from neighbours import controlnet, like_attention_couple, like_ip_adapter
from torch import Tensor

from comfyui_psa.adapter import PSAAdapter
from comfyui_psa.nodes.apply import apply_psa
from comfyui_psa.profiles import SafetyEmbedding

Users = Callable[..., SafetyEmbedding]
Neighbour = Callable[[ModelPatcher], ModelPatcher]
Weights = dict[str, Tensor]

POSITIVE = conditioning(TINY, 1)
NEGATIVE = conditioning(TINY, 2)
LATENT = noise(2, 4, 16, 16)
CFG = 4.0


def guided(
    halves: tuple[ModelPatcher, ModelPatcher], neighbour: Neighbour, positive: Any = POSITIVE, cfg: float = CFG
) -> Tensor:
    conditional = denoise(neighbour(halves[0]), positive, NEGATIVE, LATENT, cfg=1.0)
    unconditional = denoise(neighbour(halves[1]), positive, NEGATIVE, LATENT, cfg=0.0)
    return unconditional + cfg * (conditional - unconditional)


def alone(patcher: ModelPatcher) -> ModelPatcher:
    return patcher


@pytest.mark.parametrize("first", ["psa", "other"])
@pytest.mark.parametrize("name", ["ip_adapter", "attention_couple"])
def test_beside_attention_patches(
    model: ModelPatcher,
    adapter: PSAAdapter,
    users: Users,
    paths: list[str],
    expected_halves: Any,
    name: str,
    first: str,
) -> None:
    neighbour: Neighbour = partial(like_ip_adapter, paths=paths) if name == "ip_adapter" else like_attention_couple
    if first == "psa":
        patched = neighbour(apply_psa(model, adapter, users(0)))
    else:
        patched = apply_psa(neighbour(model), adapter, users(0))
    expected = guided(expected_halves(), neighbour)
    assert difference(denoise(patched, POSITIVE, NEGATIVE, LATENT, CFG), expected) < ROUNDING
    assert difference(denoise(neighbour(model), POSITIVE, NEGATIVE, LATENT, CFG), expected) > 0.01
    assert difference(guided(expected_halves(), alone), expected) > 0.01


def lora(weights: Weights, paths: list[str]) -> tuple[dict[str, Tensor], Weights]:
    """A LoRA on every to_out, and the weights with it merged in."""
    generator = torch.Generator().manual_seed(3)
    names = [f"{path}.to_out.0.weight" for path in paths]
    changes = {name: 0.1 * torch.randn(weights[name].shape, generator=generator) for name in names}
    return changes, weights | {name: weights[name] + change for name, change in changes.items()}


def with_lora(patcher: ModelPatcher, changes: dict[str, Tensor]) -> ModelPatcher:
    patched = patcher.clone()
    patched.add_patches({f"diffusion_model.{name}": ("diff", (change,)) for name, change in changes.items()})
    return patched


@pytest.mark.parametrize("first", ["psa", "lora"])
def test_beside_a_lora_that_changes_to_out(
    model: ModelPatcher,
    weights: Weights,
    adapter: PSAAdapter,
    users: Users,
    paths: list[str],
    expected_halves: Any,
    first: str,
) -> None:
    changes, merged = lora(weights, paths)
    if first == "psa":
        patched = with_lora(apply_psa(model, adapter, users(0)), changes)
    else:
        patched = apply_psa(with_lora(model, changes), adapter, users(0))
    expected = guided(expected_halves(merged), alone)
    assert difference(denoise(patched, POSITIVE, NEGATIVE, LATENT, CFG), expected) < ROUNDING
    assert difference(guided(expected_halves(), alone), expected) > 0.01


def test_beside_a_lora_on_one_conditioning_only(
    model: ModelPatcher, weights: Weights, adapter: PSAAdapter, users: Users, paths: list[str], expected_halves: Any
) -> None:
    changes, merged = lora(weights, paths)
    keyed = {
        f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}.diff": change for name, change in changes.items()
    }
    hooks = comfy.hooks.create_hook_lora(keyed, 1.0, 1.0)
    hooked = comfy.hooks.set_hooks_for_conditioning(POSITIVE, hooks)
    patched = apply_psa(model, adapter, users(0))
    expected = guided((expected_halves(merged)[0], expected_halves()[1]), alone)
    assert difference(denoise(patched, hooked, NEGATIVE, LATENT, CFG), expected) < ROUNDING
    assert difference(guided(expected_halves(), alone), expected) > 0.01
    assert difference(denoise(patched, POSITIVE, NEGATIVE, LATENT, CFG), guided(expected_halves(), alone)) < ROUNDING


def test_a_hooked_and_a_plain_conditioning_of_the_same_user(
    model: ModelPatcher, weights: Weights, adapter: PSAAdapter, users: Users, paths: list[str], expected_halves: Any
) -> None:
    """Both are the user's, in one step, with different weights of the model."""
    changes, merged = lora(weights, paths)
    keyed = {
        f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}.diff": change for name, change in changes.items()
    }
    hooks = comfy.hooks.create_hook_lora(keyed, 1.0, 1.0)
    both = comfy.hooks.set_hooks_for_conditioning(POSITIVE, hooks) + conditioning(TINY, 4)
    patched = apply_psa(model, adapter, users(0))
    hooked = denoise(expected_halves(merged)[0], POSITIVE, NEGATIVE, LATENT)
    plain = denoise(expected_halves()[0], conditioning(TINY, 4), NEGATIVE, LATENT)
    assert difference(hooked, plain) > 0.01
    for positive in (both, both[::-1]):
        assert difference(denoise(patched, positive, NEGATIVE, LATENT), (hooked + plain) / 2) < ROUNDING


def test_beside_a_controlnet(model: ModelPatcher, adapter: PSAAdapter, users: Users, expected_halves: Any) -> None:
    guided_by = [[POSITIVE[0][0], {"control": controlnet(model, (128, 128)), "control_apply_to_uncond": True}]]
    ours = denoise(apply_psa(model, adapter, users(0)), guided_by, NEGATIVE, LATENT, CFG)
    assert difference(ours, guided(expected_halves(), alone, guided_by)) < ROUNDING
    assert difference(guided(expected_halves(), alone), guided(expected_halves(), alone, guided_by)) > 0.01


def test_perp_neg(model: ModelPatcher, adapter: PSAAdapter, users: Users, expected_halves: Any) -> None:
    empty = conditioning(TINY, 5)

    class Guider(Guider_PerpNeg):  # type: ignore[misc]
        def set_conds(self, positive: Any, negative: Any) -> None:
            super().set_conds(positive, negative, empty)

        def set_cfg(self, cfg: float) -> None:
            super().set_cfg(cfg, 1.5)

    patched = apply_psa(model, adapter, users(0))
    ours = denoise(patched, POSITIVE, NEGATIVE, LATENT, CFG, guider=Guider(patched))
    user, null = expected_halves()
    parts = (
        denoise(user, POSITIVE, POSITIVE, LATENT),
        denoise(null, NEGATIVE, NEGATIVE, LATENT),
        denoise(null, empty, empty, LATENT),
    )
    # PerpNeg mixes in the latents' own scale.
    assert difference(ours, perp_neg(LATENT, *parts, 1.5, CFG)) < ROUNDING


def test_cfg_one_runs_the_conditional_half_alone(
    model: ModelPatcher, adapter: PSAAdapter, users: Users, expected_halves: Any
) -> None:
    ours = denoise(apply_psa(model, adapter, users(0)), POSITIVE, NEGATIVE, LATENT, 1.0)
    assert difference(ours, denoise(expected_halves()[0], POSITIVE, NEGATIVE, LATENT, 1.0)) < ROUNDING


def test_two_positive_conditionings(
    model: ModelPatcher, adapter: PSAAdapter, users: Users, expected_halves: Any
) -> None:
    both = POSITIVE + conditioning(TINY, 4)
    ours = denoise(apply_psa(model, adapter, users(0)), both, NEGATIVE, LATENT, CFG)
    assert difference(ours, guided(expected_halves(), alone, both)) < ROUNDING


def test_area_conditionings(model: ModelPatcher, adapter: PSAAdapter, users: Users, expected_halves: Any) -> None:
    area = POSITIVE + conditioning(TINY, 4, area=(8, 16, 4, 0), strength=1.0, set_area_to_bounds=False)
    ours = denoise(apply_psa(model, adapter, users(0)), area, NEGATIVE, LATENT, CFG)
    assert difference(ours, guided(expected_halves(), alone, area)) < ROUNDING
    assert difference(guided(expected_halves(), alone), guided(expected_halves(), alone, area)) > 0.01


def test_weights_in_fp8(weights: Weights, paths: list[str], adapter: PSAAdapter, users: Users) -> None:
    low = {name: weight.to(torch.float8_e4m3fn) for name, weight in weights.items()}
    model = comfy_model(low, torch.float8_e4m3fn, torch.float32)
    assert model.model.diffusion_model.get_submodule(paths[0]).to_out[0].weight.dtype == torch.float8_e4m3fn
    ours = denoise(apply_psa(model, adapter, users(0)), POSITIVE, NEGATIVE, LATENT)
    rounded = {name: weight.float() for name, weight in low.items()}
    expected = comfy_model(baked(rounded, paths, adapter, users(0).vectors[0]))
    assert difference(ours, denoise(expected, POSITIVE, NEGATIVE, LATENT)) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_no_more_than_the_model_itself(
    weights: Weights, model: ModelPatcher, adapter: PSAAdapter, users: Users, dtype: torch.dtype
) -> None:
    half = comfy_model({name: weight.to(dtype) for name, weight in weights.items()}, dtype)
    rounded = comfy_model({name: weight.to(dtype).float() for name, weight in weights.items()})
    base = difference(denoise(half, POSITIVE, NEGATIVE, LATENT), denoise(rounded, POSITIVE, NEGATIVE, LATENT))
    ours = denoise(apply_psa(half, adapter, users(0)), POSITIVE, NEGATIVE, LATENT)
    exact = denoise(apply_psa(rounded, adapter, users(0)), POSITIVE, NEGATIVE, LATENT)
    assert difference(ours, exact) < 2 * base


def test_offloaded_weights_with_a_lora(
    weights: Weights,
    adapter: PSAAdapter,
    users: Users,
    paths: list[str],
    expected_halves: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Load as --lowvram does: weights stay behind and are cast and patched each time a layer runs."""

    def load_low(models: list[ModelPatcher], **_: Any) -> None:
        for patcher in models:
            patcher.load(DEVICE, lowvram_model_memory=1)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load_low)
    changes, merged = lora(weights, paths)
    patched = apply_psa(with_lora(comfy_model(weights), changes), adapter, users(0))
    ours = denoise(patched, POSITIVE, NEGATIVE, LATENT, CFG)
    layer = patched.model.diffusion_model.get_submodule(paths[0]).to_out[0]
    assert layer.comfy_cast_weights
    assert layer.weight_function
    monkeypatch.undo()
    assert difference(ours, guided(expected_halves(merged), alone)) < ROUNDING
