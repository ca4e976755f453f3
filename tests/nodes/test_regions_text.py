"""Masks on Apply PSA, for adapters that act on text: against prompts that have ComfyUI's own masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.hooks
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_testing import (
    ROUNDING,
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
from kinds_by_hand import TEXT, changed_text, kinds_adapter, users
from masks import in_pixels, left_half, soft
from neighbours import controlnet, like_attention_couple
from torch import Tensor

from comfyui_psa.adapter import AdapterError, PSAAdapter, TextSpec, UserText
from comfyui_psa.nodes.apply import apply_psa
from comfyui_psa.nodes.explanation import changes_in_picture
from comfyui_psa.nodes.patch import patches_of
from comfyui_psa.nodes.regions import Region

Conditioning = list[list[Any]]

POSITIVE, NEGATIVE, OTHER = (conditioning(TINY, seed) for seed in (1, 2, 6))
LATENT = noise(2, 4, 12, 16)
CFG = 4.0
LEFT, SOFT = left_half(12, 16), soft(12, 16)
each_mask = pytest.mark.parametrize("mask", [LEFT, SOFT], ids=["half", "soft"])


@pytest.fixture(scope="module")
def adapter() -> PSAAdapter:
    return kinds_adapter((), TINY.context_dim, text=TEXT)


@pytest.fixture(scope="module")
def change(adapter: PSAAdapter) -> Callable[..., Tensor]:
    return lambda text, user=0: changed_text(adapter, users(user).vectors[0], text)


def masked(model: ModelPatcher, adapter: PSAAdapter, mask: Tensor, user: int = 0, **options: Any) -> ModelPatcher:
    return apply_psa(model, adapter, users(user), region=Region(mask), **options)


def divided(prompts: Conditioning, mask: Tensor, change: Callable[[Tensor], Tensor]) -> Conditioning:
    """The user's prompt with the mask and the given one with the rest, where the prompts have no mask or one."""
    parts = []
    for text, options in prompts:
        own = options.get("mask", torch.ones_like(mask))
        parts.append([change(text), {**options, "mask": own * mask}])
        parts.append([text, {**options, "mask": own * (1 - mask)}])
    return parts


def run(model: ModelPatcher, positive: Conditioning = POSITIVE, cfg: float = CFG, **options: Any) -> Tensor:
    return denoise(model, positive, NEGATIVE, LATENT, cfg, **options)


def chunks_of(patcher: ModelPatcher) -> list[list[int]]:
    """What every call of the model will be made of."""
    seen: list[list[int]] = []

    def call(apply: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        seen.append(args["cond_or_uncond"])
        return apply(args["input"], args["timestep"], **args["c"])

    patcher.set_model_unet_function_wrapper(call)
    return seen


@each_mask
def test_the_prompt_is_the_users_inside(
    model: ModelPatcher, adapter: PSAAdapter, change: Callable[..., Tensor], mask: Tensor
) -> None:
    ours = run(masked(model, adapter, in_pixels(mask)))
    assert difference(ours, run(model, divided(POSITIVE, mask, change))) < ROUNDING
    assert difference(ours, run(apply_psa(model, adapter, users(0)))) > 1e-3
    assert difference(ours, run(model)) > 1e-3


def test_each_half_is_the_picture_of_its_prompt(model: ModelPatcher, adapter: PSAAdapter) -> None:
    ours = run(masked(model, adapter, LEFT))
    assert difference(ours[..., :8], run(apply_psa(model, adapter, users(0)))[..., :8]) < ROUNDING
    assert difference(ours[..., 8:], run(model)[..., 8:]) < ROUNDING


PROMPTS: dict[str, Conditioning] = {
    "two": POSITIVE + conditioning(TINY, 4, strength=0.7),
    "of other lengths": conditioning(TINY, 5, tokens=15) + POSITIVE,
    "with a mask": [[POSITIVE[0][0], {"mask": soft(12, 16, 3), "mask_strength": 0.8}], *conditioning(TINY, 4)],
    "with a mask and its bounds": [
        [POSITIVE[0][0], {"mask": torch.nn.functional.pad(soft(9, 9, 3), (2, 5, 2, 1)), "set_area_to_bounds": True}],
        *conditioning(TINY, 4),
    ],
}


@each_mask
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_with_masks_of_their_own(
    model: ModelPatcher, adapter: PSAAdapter, change: Callable[..., Tensor], mask: Tensor, name: str
) -> None:
    prompts = PROMPTS[name]
    parts = divided(prompts, mask, change)
    if "bounds" in name:  # ComfyUI would take other bounds for each part
        place = {"area": (9, 9, 2, 2), "set_area_to_bounds": False}
        parts = [[text, options | (place if "set_area_to_bounds" in options else {})] for text, options in parts]
    # At CFG 1: by hand, ComfyUI would give the negative half the areas of the parts.
    expected = run(model, parts, cfg=1.0)
    assert difference(run(masked(model, adapter, mask), prompts, cfg=1.0), expected) < ROUNDING
    assert difference(expected, run(model, prompts, cfg=1.0)) > 1e-3


@each_mask
@pytest.mark.parametrize("area", [(8, 8, 2, 4), (12, 8, 0, 8), (20, 20, 2, 4)])
def test_an_area_still_fades_out(
    model: ModelPatcher, adapter: PSAAdapter, change: Callable[..., Tensor], mask: Tensor, area: tuple[int, ...]
) -> None:
    """ComfyUI mixes an area in with edges that fade, unless it has a mask."""
    place = conditioning(TINY, 4, area=area, strength=1.5)
    prompts = POSITIVE + place
    high, wide, top, left = min(area[0], 12 - area[2]), min(area[1], 16 - area[3]), area[2], area[3]
    fade = torch.zeros(1, 12, 16)
    fade[:, top : top + high, left : left + wide] = 1
    for axis, start, length, whole in ((1, top, high, 12), (2, left, wide, 16)):
        steps = min(8, length // 4)
        for t in range(steps):
            if start:
                fade.select(axis, start + t).mul_((t + 1) / steps)
            if start + length < whole:
                fade.select(axis, start + length - 1 - t).mul_((t + 1) / steps)
    faded = [[place[0][0], {**place[0][1], "mask": fade}]]
    assert difference(run(model, POSITIVE + faded), run(model, prompts)) < ROUNDING  # by hand as ComfyUI does it
    expected = run(model, divided(POSITIVE + faded, mask, change), cfg=1.0)
    assert difference(run(masked(model, adapter, mask), prompts, cfg=1.0), expected) < ROUNDING
    negative = run(masked(model, adapter, mask), prompts, cfg=0.0)
    assert difference(negative, run(model, prompts, cfg=0.0)) < ROUNDING


def test_a_part_that_nobody_sees_is_not_computed(model: ModelPatcher, adapter: PSAAdapter) -> None:
    def parts(mask: Tensor, prompts: Conditioning = POSITIVE) -> list[int]:
        patched = masked(model, adapter, mask)
        seen = chunks_of(patched)
        denoise(patched, prompts, NEGATIVE, LATENT)
        return sorted(len(chunks) for chunks in seen)

    right = conditioning(TINY, 4, area=(12, 8, 0, 8))
    assert parts(SOFT) == [2]
    assert parts(torch.ones(1, 12, 16)) == [1]
    assert parts(LEFT, right) == [1]
    assert parts(1 - LEFT, right) == [1]
    assert parts(SOFT, right) == [2]


def test_two_people_cost_as_much_as_one(
    model: ModelPatcher, adapter: PSAAdapter, change: Callable[..., Tensor]
) -> None:
    both = masked(masked(model, adapter, LEFT, 0), adapter, 1 - LEFT, 1)
    expected = [[change(POSITIVE[0][0], user), {"mask": part}] for user, part in ((0, LEFT), (1, 1 - LEFT))]
    assert difference(run(both), run(model, expected)) < ROUNDING
    seen = chunks_of(both)
    run(both)
    assert sorted(seen[0]) == [0, 0, 1]


def test_two_people_who_overlap(model: ModelPatcher, adapter: PSAAdapter, change: Callable[..., Tensor]) -> None:
    first, second = soft(12, 16, 1), soft(12, 16, 2)
    both = masked(masked(model, adapter, first, 0), adapter, second, 1)
    inner = divided(divided(POSITIVE, first, change), second, lambda text: change(text, 1))
    outer = divided(divided(POSITIVE, second, lambda text: change(text, 1)), first, change)
    assert min(difference(run(both), run(model, prompts)) for prompts in (inner, outer)) < ROUNDING


def test_one_with_a_mask_and_one_without(
    model: ModelPatcher, adapter: PSAAdapter, change: Callable[..., Tensor]
) -> None:
    everywhere = [[change(POSITIVE[0][0], 1), {}]]
    for both in (
        apply_psa(masked(model, adapter, LEFT), adapter, users(1)),
        masked(apply_psa(model, adapter, users(1)), adapter, LEFT),
    ):
        orders = (
            divided(everywhere, LEFT, change),
            [[change(text, 1), options] for text, options in divided(POSITIVE, LEFT, change)],
        )
        assert min(difference(run(both), run(model, prompts)) for prompts in orders) < ROUNDING


def test_a_mask_for_each_image_and_prompts_for_each(
    model: ModelPatcher, adapter: PSAAdapter, change: Callable[..., Tensor]
) -> None:
    masks, own = torch.cat((LEFT, SOFT)), torch.cat((soft(12, 16, 4), soft(12, 16, 5)))
    prompts = [[torch.cat((POSITIVE[0][0], OTHER[0][0])), {"mask": own}], *conditioning(TINY, 4)]
    together = run(masked(model, adapter, masks), prompts)
    for i in (0, 1):
        alone = [[prompts[0][0][i : i + 1], {"mask": own[i : i + 1]}], prompts[1]]
        expected = denoise(model, divided(alone, masks[i : i + 1], change), NEGATIVE, LATENT[i : i + 1], CFG)
        assert difference(together[i : i + 1], expected) < ROUNDING


def test_the_pooled_text_of_sdxl() -> None:
    model = comfy_model(unet_weights(TINY_SDXL))
    adapter = kinds_adapter((), TINY_SDXL.context_dim, text=TextSpec(**(TEXT.model_dump() | {"pooled_dim": 16})))
    prompts, negative = conditioning(TINY_SDXL, 1), conditioning(TINY_SDXL, 2)
    vector, (text, options) = users(0).vectors[0], prompts[0]
    pooled = changed_text(adapter, vector, options["pooled_output"], "pooled")
    parts = [
        [changed_text(adapter, vector, text), {"pooled_output": pooled, "mask": SOFT}],
        [text, {**options, "mask": 1 - SOFT}],
    ]
    ours = denoise(masked(model, adapter, SOFT), prompts, negative, LATENT, CFG)
    assert difference(ours, denoise(model, parts, negative, LATENT, CFG)) < ROUNDING


def test_every_positive_of_dual_cfg(model: ModelPatcher, adapter: PSAAdapter, change: Callable[..., Tensor]) -> None:
    class Guider(Guider_DualCFG):  # type: ignore[misc]
        middle: Conditioning

        def set_conds(self, positive: Any, negative: Any) -> None:
            super().set_conds(positive, self.middle, negative)

        def set_cfg(self, cfg: float) -> None:
            super().set_cfg(cfg, 2.0, False)

    def dual(patcher: ModelPatcher, positive: Conditioning, middle: Conditioning) -> Tensor:
        guider = Guider(patcher)
        guider.middle = middle
        return run(patcher, positive, guider=guider)

    parts = (divided(prompts, SOFT, change) for prompts in (POSITIVE, OTHER))
    assert difference(dual(masked(model, adapter, SOFT), POSITIVE, OTHER), dual(model, *parts)) < ROUNDING


def test_a_step_outside_of_the_range_is_the_base(model: ModelPatcher, adapter: PSAAdapter) -> None:
    sigmas = tuple(sigma_at(model, timestep) for timestep in (999, 700, 400, 100))
    part = run(masked(model, adapter, LEFT, start_percent=0.25, end_percent=0.75), sigmas=sigmas).chunk(4)
    whole, base = (run(patcher, sigmas=sigmas).chunk(4) for patcher in (masked(model, adapter, LEFT), model))
    assert [torch.equal(part[i], whole[i]) for i in range(4)] == [False, True, True, False]
    assert [torch.equal(part[i], base[i]) for i in range(4)] == [True, False, False, True]


def test_a_prompt_is_changed_once_in_a_run(
    model: ModelPatcher, adapter: PSAAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    change = UserText.tokens

    def counted(text: UserText, *args: Any) -> Tensor:
        calls.append(1)
        return change(text, *args)

    monkeypatch.setattr(UserText, "tokens", counted)
    run(masked(model, adapter, SOFT), sigmas=tuple(sigma_at(model, t) for t in (999, 700, 400)))
    assert len(calls) == 1


def test_each_version_has_a_number_that_stays(model: ModelPatcher, adapter: PSAAdapter) -> None:
    """Nodes that cache what the model has made of a prompt go by them."""
    seen: list[list[Any]] = []

    def note(executor: Any, *args: Any, **kwargs: Any) -> Any:
        (options,) = (arg for arg in args if isinstance(arg, dict) and "uuids" in arg)
        seen.append(options["uuids"])
        return executor(*args, **kwargs)

    patched = masked(model, adapter, SOFT)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "note", note)
    run(patched, sigmas=tuple(sigma_at(model, t) for t in (999, 700)))
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 3


def test_text_that_a_wrapper_puts_in_is_the_users_inside(
    model: ModelPatcher, adapter: PSAAdapter, change: Callable[..., Tensor]
) -> None:
    other = [[OTHER[0][0], {}]]

    def swap(apply: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        parts = [
            other[0][0].expand_as(part).to(part) if chunk == 0 else part
            for part, chunk in zip(
                args["c"]["c_crossattn"].chunk(len(args["cond_or_uncond"])), args["cond_or_uncond"], strict=True
            )
        ]
        return apply(args["input"], args["timestep"], **{**args["c"], "c_crossattn": torch.cat(parts)})

    patched = masked(model, adapter, SOFT)
    patched.set_model_unet_function_wrapper(swap)
    assert difference(run(patched), run(model, divided(other, SOFT, change))) < ROUNDING


@pytest.mark.parametrize("first", ["psa", "couple"])
def test_prompts_that_attention_couple_puts_in(
    model: ModelPatcher, adapter: PSAAdapter, change: Callable[..., Tensor], first: str
) -> None:
    if first == "psa":
        ours = run(like_attention_couple(masked(model, adapter, LEFT)))
    else:
        ours = run(masked(like_attention_couple(model), adapter, LEFT))
    inside = run(like_attention_couple(model, change), [[change(POSITIVE[0][0]), {}]])
    outside = run(like_attention_couple(model))
    assert difference(ours, inside * LEFT + outside * (1 - LEFT)) < ROUNDING
    assert difference(inside, outside) > 1e-3


def test_beside_a_lora_on_one_conditioning_only(
    model: ModelPatcher,
    weights: dict[str, Tensor],
    adapter: PSAAdapter,
    change: Callable[..., Tensor],
    paths: list[str],
) -> None:
    generator = torch.Generator().manual_seed(3)
    keyed = {
        f"lora_unet_{path.replace('.', '_')}_to_out_0.diff": 0.1
        * torch.randn(weights[f"{path}.to_out.0.weight"].shape, generator=generator)
        for path in paths
    }
    hooks = comfy.hooks.create_hook_lora(keyed, 1.0, 1.0)
    hooked = comfy.hooks.set_hooks_for_conditioning(POSITIVE, hooks)
    ours = run(masked(model, adapter, SOFT), hooked)
    assert difference(ours, run(model, divided(hooked, SOFT, change))) < ROUNDING
    assert difference(ours, run(masked(model, adapter, SOFT))) > 1e-3


def test_both_versions_have_the_controlnet(
    model: ModelPatcher, adapter: PSAAdapter, change: Callable[..., Tensor]
) -> None:
    guided = [[POSITIVE[0][0], {"control": controlnet(model, (96, 128)), "control_apply_to_uncond": True}]]
    expected = run(model, divided(guided, SOFT, change))
    assert difference(run(masked(model, adapter, SOFT), guided), expected) < ROUNDING
    assert difference(expected, run(model, divided(POSITIVE, SOFT, change))) > 1e-3


def test_explain_sees_changes_inside_alone(model: ModelPatcher, adapter: PSAAdapter) -> None:
    patched = masked(model, adapter, LEFT)
    changes = changes_in_picture(patched, patches_of(patched), POSITIVE, LATENT)
    assert changes[..., :8].mean() > 0.1
    assert changes[..., 8:].max() < 1e-4


def test_a_default_conditioning_is_refused(model: ModelPatcher, adapter: PSAAdapter) -> None:
    prompts = [[POSITIVE[0][0], {"mask": LEFT}], [OTHER[0][0], {"default": True}]]
    with pytest.raises(AdapterError, match="is the default for what others leave"):
        run(masked(model, adapter, SOFT), prompts)
