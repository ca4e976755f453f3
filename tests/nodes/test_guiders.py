"""Which conditionings are the user's, in whatever order a guider has them, and runs that leave PSA out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_testing import ROUNDING, TINY, conditioning, denoise, difference, noise, sigma_at
from threads import in_threads
from torch import Tensor

from comfyui_psa.adapter import AdapterError, PSAAdapter
from comfyui_psa.nodes.apply import apply_psa
from comfyui_psa.profiles import SafetyEmbedding

Users = Callable[..., SafetyEmbedding]

POSITIVE = conditioning(TINY, 1)
MIDDLE = conditioning(TINY, 4)
NEGATIVE = conditioning(TINY, 2)
LATENT = noise(1, 4, 16, 16)


@pytest.mark.parametrize("nested", [False, True])
def test_dual_cfg_puts_the_negative_first(
    model: ModelPatcher, adapter: PSAAdapter, users: Users, expected_halves: Any, nested: bool
) -> None:
    class Guider(Guider_DualCFG):  # type: ignore[misc]
        def set_conds(self, positive: Any, negative: Any) -> None:
            super().set_conds(positive, MIDDLE, negative)

        def set_cfg(self, cfg: float) -> None:
            super().set_cfg(cfg, 2.0, nested)

    patched = apply_psa(model, adapter, users(0))
    ours = denoise(patched, POSITIVE, NEGATIVE, LATENT, 3.0, guider=Guider(patched))
    user, null = expected_halves()
    positive, middle = denoise(user, POSITIVE, POSITIVE, LATENT), denoise(user, MIDDLE, MIDDLE, LATENT)
    negative = denoise(null, NEGATIVE, NEGATIVE, LATENT)
    if nested:
        text = middle + 3.0 * (positive - middle)
        expected = negative + 2.0 * (text - negative)
    else:
        expected = negative + 2.0 * (middle - negative) + 3.0 * (positive - middle)
    assert difference(ours, expected) < ROUNDING


def test_self_attention_guidance_calls_the_negative_alone(
    model: ModelPatcher, adapter: PSAAdapter, users: Users
) -> None:
    """With the unconditional half left as it is, SAG's own call has to see the base, not the user."""

    def with_sag(patcher: ModelPatcher) -> ModelPatcher:
        (patched,) = SelfAttentionGuidance.execute(patcher, 0.5, 2.0).args
        return patched

    # At cfg 0 the guided result is the unconditional half, and SAG adds what its own call says.
    ours = denoise(with_sag(apply_psa(model, adapter, users(0), null="none")), POSITIVE, NEGATIVE, LATENT, 0.0)
    base = denoise(with_sag(model), POSITIVE, NEGATIVE, LATENT, 0.0)
    assert difference(base, denoise(model, POSITIVE, NEGATIVE, LATENT, 0.0)) > 0.001
    assert difference(ours, base) < ROUNDING


def test_one_conditioning_without_a_negative(
    model: ModelPatcher, adapter: PSAAdapter, users: Users, expected_halves: Any
) -> None:
    class Basic(comfy.samplers.CFGGuider):  # type: ignore[misc]
        def set_conds(self, positive: Any, negative: Any) -> None:
            self.inner_set_conds({"positive": positive})

    patched = apply_psa(model, adapter, users(0))
    ours = denoise(patched, POSITIVE, NEGATIVE, LATENT, guider=Basic(patched))
    assert difference(ours, denoise(expected_halves()[0], POSITIVE, POSITIVE, LATENT)) < ROUNDING


def test_tiles_in_one_call_are_refused(model: ModelPatcher, adapter: PSAAdapter, users: Users) -> None:
    def tiled(apply: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        conditioned = {**args["c"], "c_crossattn": args["c"]["c_crossattn"].repeat(2, 1, 1)}
        both = apply(args["input"].repeat(2, 1, 1, 1), args["timestep"].repeat(2), **conditioned)
        return both[: len(args["input"])]

    patched = apply_psa(model, adapter, users(0))
    patched.set_model_unet_function_wrapper(tiled)
    with pytest.raises(AdapterError, match="4 pictures into one call where 2 times 1"):
        denoise(patched, POSITIVE, NEGATIVE, LATENT, 4.0)


def drop_patches(patcher: ModelPatcher) -> ModelPatcher:
    patched = patcher.clone()
    patched.model_options["transformer_options"]["patches"] = {}
    return patched


def drop_options(patcher: ModelPatcher) -> ModelPatcher:
    patched = patcher.clone()

    def call(apply: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        conditioned = {name: value for name, value in args["c"].items() if name != "transformer_options"}
        return apply(args["input"], args["timestep"], **conditioned)

    patched.set_model_unet_function_wrapper(call)
    return patched


def skip_a_block(patcher: ModelPatcher) -> ModelPatcher:
    patched = patcher.clone()
    block = patched.model.diffusion_model.middle_block[1].transformer_blocks[0]
    patched.add_object_patch("diffusion_model.middle_block.1.transformer_blocks.0.forward", lambda x, **_: x)
    assert block is patched.model.diffusion_model.middle_block[1].transformer_blocks[0]
    return patched


@pytest.mark.parametrize("leave_out", [drop_patches, drop_options, skip_a_block])
def test_a_run_that_leaves_psa_out_gives_no_picture(
    model: ModelPatcher,
    adapter: PSAAdapter,
    users: Users,
    leave_out: Callable[[ModelPatcher], ModelPatcher],
) -> None:
    patched = leave_out(apply_psa(model, adapter, users(0)))
    with pytest.raises(AdapterError, match="leaves PSA out"):
        denoise(patched, POSITIVE, NEGATIVE, LATENT, 4.0)
    denoise(leave_out(model), POSITIVE, NEGATIVE, LATENT, 4.0)


def test_a_run_without_steps_is_no_run_that_left_psa_out(
    model: ModelPatcher, adapter: PSAAdapter, users: Users
) -> None:
    """As a second sampler that begins where the first one has finished."""
    guider = comfy.samplers.CFGGuider(apply_psa(model, adapter, users(0)))
    guider.set_conds(POSITIVE, NEGATIVE)
    sampler = comfy.samplers.sampler_object("euler")
    with torch.no_grad():
        done = guider.sample(LATENT, torch.zeros_like(LATENT), sampler, torch.tensor([0.0]), disable_pbar=True, seed=0)
    assert done.shape == LATENT.shape


def test_a_range_that_no_step_meets_is_noted(
    model: ModelPatcher, adapter: PSAAdapter, users: Users, caplog: pytest.LogCaptureFixture
) -> None:
    late = (sigma_at(model, 200), sigma_at(model, 100))
    patched = apply_psa(model, adapter, users(0), end_percent=0.3)
    ours = denoise(patched, POSITIVE, NEGATIVE, LATENT, 4.0, sigmas=late)
    assert torch.equal(ours, denoise(model, POSITIVE, NEGATIVE, LATENT, 4.0, sigmas=late))
    assert "no step of this run" in caplog.text


def test_halves_in_two_threads_do_not_mix(model: ModelPatcher, adapter: PSAAdapter, users: Users) -> None:
    patched = apply_psa(model, adapter, users(0))
    expected = denoise(patched, POSITIVE, NEGATIVE, LATENT, 4.0)
    patched.set_model_unet_function_wrapper(in_threads)
    for _ in range(5):
        assert difference(denoise(patched, POSITIVE, NEGATIVE, LATENT, 4.0), expected) < ROUNDING
