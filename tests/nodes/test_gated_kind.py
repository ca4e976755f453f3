"""The gated kind on a ComfyUI model against true user attention with keys, values and sink on a diffusers UNet."""

from __future__ import annotations

from functools import partial

import comfy.hooks
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_testing import ROUNDING, TIMESTEP, TINY, comfy_model, conditioning, denoise, difference, noise, sigma_at
from diffusers_testing import diffusers_unet
from kinds_by_hand import GATED, kinds_adapter, users, with_gated_users
from neighbours import like_attention_couple, like_ip_adapter
from torch import Tensor

from comfyui_psa.adapter import PSAAdapter, find_sites
from comfyui_psa.nodes.apply import apply_psa

POSITIVE, NEGATIVE = conditioning(TINY, 1), conditioning(TINY, 2)
LATENT = noise(2, 4, 8, 8)
CFG = 4.0


@pytest.fixture(scope="module")
def adapter(model: ModelPatcher) -> PSAAdapter:
    sizes = tuple(site.hidden_size for site in find_sites(model.model.diffusion_model))
    return kinds_adapter(sizes, TINY.context_dim, gated=GATED)


def run(patcher: ModelPatcher, cfg: float = CFG, latent: Tensor = LATENT) -> Tensor:
    return denoise(patcher, POSITIVE, NEGATIVE, latent, cfg)


@pytest.mark.parametrize("numbers", [(0,), (0, 1)], ids=["one user", "a user each"])
def test_it_is_user_attention_with_a_sink(
    model: ModelPatcher, weights: dict[str, Tensor], adapter: PSAAdapter, numbers: tuple[int, ...]
) -> None:
    each = users(*(numbers if len(numbers) == 2 else numbers * 2)).vectors
    unet = with_gated_users(diffusers_unet(model, TINY, weights), adapter, list(each))
    sigma = sigma_at(model)
    with torch.no_grad():
        eps = unet(LATENT / (sigma**2 + 1) ** 0.5, TIMESTEP, POSITIVE[0][0].expand(2, -1, -1)).sample
    ours = run(apply_psa(model, adapter, users(*numbers)), cfg=1.0)
    assert difference(ours, LATENT - sigma * eps) < ROUNDING
    assert difference(ours, run(model, cfg=1.0)) > 0.01


def test_the_unconditional_half_stays_the_base(model: ModelPatcher, adapter: PSAAdapter) -> None:
    assert torch.equal(run(apply_psa(model, adapter, users(0)), cfg=0.0), run(model, cfg=0.0))
    conditional = run(apply_psa(model, adapter, users(0)), cfg=1.0)
    unconditional = run(model, cfg=0.0)
    expected = unconditional + CFG * (conditional - unconditional)
    assert difference(run(apply_psa(model, adapter, users(0))), expected) < ROUNDING


def test_halves_that_are_called_one_by_one(model: ModelPatcher, adapter: PSAAdapter) -> None:
    """ComfyUI does not join prompts of which one is more than four times as long as the other."""
    negative = conditioning(TINY, 2, tokens=5 * POSITIVE[0][0].shape[1])
    patched = apply_psa(model, adapter, users(0))
    expected = denoise(model, POSITIVE, negative, LATENT, 0.0)
    expected = expected + CFG * (run(patched, cfg=1.0) - expected)
    assert difference(denoise(patched, POSITIVE, negative, LATENT, CFG), expected) < ROUNDING


def test_strength_scales_it_and_zero_is_exactly_the_base(model: ModelPatcher, adapter: PSAAdapter) -> None:
    assert torch.equal(run(apply_psa(model, adapter, users(0), 0.0)), run(model))
    weak, full = (run(apply_psa(model, adapter, users(0), strength)) for strength in (1e-4, 1.0))
    assert 0 < difference(weak, run(model)) < 0.01 < difference(full, run(model))


def test_each_image_of_a_batch_has_its_own_user(model: ModelPatcher, adapter: PSAAdapter) -> None:
    together = run(apply_psa(model, adapter, users(0, 1)))
    for i in (0, 1):
        alone = run(apply_psa(model, adapter, users(i)), latent=LATENT[i : i + 1])
        assert difference(together[i : i + 1], alone) < ROUNDING


@pytest.mark.parametrize("name", ["ip_adapter", "attention_couple"])
def test_it_composes_in_any_order(model: ModelPatcher, adapter: PSAAdapter, paths: list[str], name: str) -> None:
    neighbour = partial(like_ip_adapter, paths=paths) if name == "ip_adapter" else like_attention_couple
    before, after = (
        run(neighbour(apply_psa(model, adapter, users(0)))),
        run(apply_psa(neighbour(model), adapter, users(0))),
    )
    assert difference(before, after) < ROUNDING
    assert difference(before, run(neighbour(model))) > 0.01
    assert difference(before, run(apply_psa(model, adapter, users(0)))) > 0.01


def lora(weights: dict[str, Tensor], paths: list[str]) -> dict[str, Tensor]:
    """What a LoRA adds to every output projection, which gates are folded with."""
    generator = torch.Generator().manual_seed(3)
    names = [f"{path}.to_out.0.weight" for path in paths]
    return {name: 0.1 * torch.randn(weights[name].shape, generator=generator) for name in names}


@pytest.mark.parametrize("first", ["psa", "lora"])
def test_gates_are_folded_with_the_weights_that_the_model_has_then(
    model: ModelPatcher, weights: dict[str, Tensor], adapter: PSAAdapter, paths: list[str], first: str
) -> None:
    changes = lora(weights, paths)

    def with_lora(patcher: ModelPatcher) -> ModelPatcher:
        patched = patcher.clone()
        patched.add_patches({f"diffusion_model.{name}": ("diff", (change,)) for name, change in changes.items()})
        return patched

    if first == "psa":
        patched = with_lora(apply_psa(model, adapter, users(0)))
    else:
        patched = apply_psa(with_lora(model), adapter, users(0))
    merged = comfy_model(weights | {name: weights[name] + change for name, change in changes.items()})
    assert difference(run(patched), run(apply_psa(merged, adapter, users(0)))) < ROUNDING
    assert difference(run(patched), run(with_lora(model))) > 0.01


def test_a_lora_on_one_conditioning_changes_its_gates_alone(
    model: ModelPatcher, weights: dict[str, Tensor], adapter: PSAAdapter, paths: list[str]
) -> None:
    changes = lora(weights, paths)
    keyed = {f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}.diff": c for name, c in changes.items()}
    hooked = comfy.hooks.set_hooks_for_conditioning(POSITIVE, comfy.hooks.create_hook_lora(keyed, 1.0, 1.0))
    merged = comfy_model(weights | {name: weights[name] + change for name, change in changes.items()})
    conditional = run(apply_psa(merged, adapter, users(0)), cfg=1.0)
    unconditional = run(model, cfg=0.0)
    ours = denoise(apply_psa(model, adapter, users(0)), hooked, NEGATIVE, LATENT, CFG)
    assert difference(ours, unconditional + CFG * (conditional - unconditional)) < ROUNDING
    assert difference(ours, run(apply_psa(model, adapter, users(0)))) > 0.01


def test_weights_in_fp8(weights: dict[str, Tensor], adapter: PSAAdapter) -> None:
    low = {name: weight.to(torch.float8_e4m3fn) for name, weight in weights.items()}
    ours = run(apply_psa(comfy_model(low, torch.float8_e4m3fn, torch.float32), adapter, users(0)))
    rounded = comfy_model({name: weight.float() for name, weight in low.items()})
    assert difference(ours, run(apply_psa(rounded, adapter, users(0)))) < ROUNDING
    assert difference(ours, run(rounded)) > 0.01


def test_two_positive_prompts_are_each_the_users(model: ModelPatcher, adapter: PSAAdapter) -> None:
    other = conditioning(TINY, 5)
    patched = apply_psa(model, adapter, users(0))
    ours = denoise(patched, [*POSITIVE, *other], NEGATIVE, LATENT, 1.0)
    alone = [denoise(patched, prompt, NEGATIVE, LATENT, 1.0) for prompt in (POSITIVE, other)]
    assert difference(ours, (alone[0] + alone[1]) / 2) < ROUNDING


def test_all_kinds_together_add_up_with_a_neighbour_kind(model: ModelPatcher, adapter: PSAAdapter) -> None:
    sizes = adapter.config.hidden_sizes
    both = kinds_adapter(sizes, TINY.context_dim, constant=True, gated=GATED)
    halves = [
        kinds_adapter(sizes, TINY.context_dim, constant=True),
        kinds_adapter(sizes, TINY.context_dim, gated=GATED),
    ]
    for half in halves:
        own = {name: value for name, value in both.state_dict().items() if name in half.state_dict()}
        half.load_state_dict(own)
    ours = run(apply_psa(model, both, users(0)))
    chained = run(apply_psa(apply_psa(model, halves[0], users(0)), halves[1], users(0)))
    assert difference(ours, chained) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_no_more_than_the_model_itself(
    weights: dict[str, Tensor], adapter: PSAAdapter, dtype: torch.dtype
) -> None:
    """Over three adapters: how much a random one amplifies what the model rounds differs by a factor of three."""
    half = comfy_model({name: weight.to(dtype) for name, weight in weights.items()}, dtype)
    rounded = comfy_model({name: weight.to(dtype).float() for name, weight in weights.items()})
    config = adapter.config
    adapters = [
        kinds_adapter(config.hidden_sizes, config.cross_attention_dim, seed=seed, gated=GATED) for seed in range(3)
    ]
    losses = [
        difference(run(apply_psa(half, one, users(0)), 1.0), run(apply_psa(rounded, one, users(0)), 1.0))
        for one in adapters
    ]
    assert sum(losses) / len(losses) < 3 * difference(run(half, 1.0), run(rounded, 1.0))
