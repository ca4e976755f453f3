"""The text kind beside nodes that put in text of their own: it becomes the user's, or the run ends with an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_testing import (
    ROUNDING,
    TINY,
    TINY_SDXL,
    comfy_model,
    conditioning,
    denoise,
    difference,
    noise,
)
from kinds_by_hand import EMBEDDING_DIM, TEXT, changed_text, kinds_adapter
from neighbours import like_attention_couple, like_ip_adapter, like_stored_prompts
from torch import Tensor

from comfyui_psa.adapter import AdapterError, PSAAdapter
from comfyui_psa.nodes.apply import apply_psa
from comfyui_psa.profiles import SafetyEmbedding

Options = dict[str, Any]
Change = Callable[[Tensor], Tensor]

POSITIVE, NEGATIVE, OTHER = (conditioning(TINY, seed) for seed in (1, 2, 6))
LATENT = noise(2, 4, 16, 16)
CFG = 4.0


@pytest.fixture(scope="module")
def adapter() -> PSAAdapter:
    return kinds_adapter((), TINY.context_dim, text=TEXT)


@pytest.fixture(scope="module")
def user() -> SafetyEmbedding:
    return SafetyEmbedding(torch.randn(1, EMBEDDING_DIM, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def change(adapter: PSAAdapter, user: SafetyEmbedding) -> Callable[[Tensor], Tensor]:
    return lambda text: changed_text(adapter, user.vectors[0], text)


def run(patcher: ModelPatcher, positive: list[list[Any]] = POSITIVE) -> Tensor:
    return denoise(patcher, positive, NEGATIVE, LATENT, CFG)


PRECISIONS = {
    "fp16": (torch.float16, None),
    "bf16": (torch.bfloat16, None),
    "fp16 weights, computed in bf16": (torch.float16, torch.bfloat16),
    "fp16 weights, computed in fp32": (torch.float16, torch.float32),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_prompts_of_attention_couple_in_any_precision(
    weights: dict[str, Tensor],
    adapter: PSAAdapter,
    user: SafetyEmbedding,
    change: Change,
    precision: str,
) -> None:
    dtype, cast = PRECISIONS[precision]
    model = comfy_model({name: weight.to(dtype) for name, weight in weights.items()}, dtype, cast)
    rounded = comfy_model({name: weight.to(dtype).float() for name, weight in weights.items()})
    changed = [[change(POSITIVE[0][0]), {}]]
    ours = run(like_attention_couple(apply_psa(model, adapter, user)))
    expected = run(like_attention_couple(rounded, change), changed)
    bound = max(3 * difference(run(like_attention_couple(model)), run(like_attention_couple(rounded))), ROUNDING)
    assert difference(ours, expected) < bound
    twice = [[change(changed[0][0]), {}]]
    assert difference(run(like_attention_couple(rounded, change), twice), expected) > bound
    assert difference(run(like_attention_couple(rounded), changed), expected) > bound


@pytest.mark.parametrize("base_strength", [1.0, 0.5])
def test_couples_of_two_positives_with_a_weaker_base_prompt(
    model: ModelPatcher,
    adapter: PSAAdapter,
    user: SafetyEmbedding,
    change: Change,
    base_strength: float,
) -> None:
    """Both positives come as chunks of one number, and the base prompt no longer looks like the one we changed."""
    prompts = POSITIVE + OTHER

    def couple(patcher: ModelPatcher, do: Callable[[Tensor], Tensor] = lambda text: text) -> ModelPatcher:
        return like_attention_couple(patcher, do, base_strength)

    ours = run(couple(apply_psa(model, adapter, user)), prompts)
    expected = run(couple(model, change), [[change(text), {}] for text, _ in prompts])
    assert difference(ours, expected) < ROUNDING


def test_a_node_that_swaps_text_inside_a_layer_is_an_error(
    model: ModelPatcher, adapter: PSAAdapter, user: SafetyEmbedding
) -> None:
    def swap(n: Tensor, context: Tensor, value: Tensor, extra_options: Options) -> tuple[Tensor, Tensor, Tensor]:
        other = OTHER[0][0].to(context).expand(context.shape[0], -1, -1)
        return n, other, other

    patched = apply_psa(model, adapter, user)
    patched.set_model_attn2_patch(swap)
    with pytest.raises(AdapterError, match="changes the text inside the attention"):
        run(patched)


def with_function(patcher: ModelPatcher, edit: Callable[[Options, list[int]], Options]) -> ModelPatcher:
    """A node that wraps the model's call and edits what it is given."""
    patched = patcher.clone()
    patched.set_model_unet_function_wrapper(
        lambda apply, args: apply(args["input"], args["timestep"], **edit(args["c"], args["cond_or_uncond"]))
    )
    return patched


def test_text_that_a_wrapper_puts_in_is_changed(
    model: ModelPatcher, adapter: PSAAdapter, user: SafetyEmbedding, change: Change
) -> None:
    def swap(c: Options, chunks: list[int]) -> Options:
        parts = [
            OTHER[0][0].expand_as(part).to(part) if chunk == 0 else part
            for part, chunk in zip(c["c_crossattn"].chunk(len(chunks)), chunks, strict=True)
        ]
        return {**c, "c_crossattn": torch.cat(parts)}

    ours = run(with_function(apply_psa(model, adapter, user), swap))
    assert difference(ours, run(model, [[change(OTHER[0][0]), {}]])) < ROUNDING


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("kind", [WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL])
def test_text_that_any_other_wrapper_puts_in_is_changed(
    model: ModelPatcher, adapter: PSAAdapter, user: SafetyEmbedding, change: Change, kind: str, place: str
) -> None:
    """Wherever its node stands, ours looks last."""

    def swap(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        place = 2 if kind == WrappersMP.APPLY_MODEL else 1  # behind t and c_concat, or behind timesteps
        (chunks,) = (arg["cond_or_uncond"] for arg in args if isinstance(arg, dict) and "cond_or_uncond" in arg)
        parts = [
            OTHER[0][0].expand_as(part).to(part) if chunk == 0 else part
            for part, chunk in zip(args[place].chunk(len(chunks)), chunks, strict=True)
        ]
        return executor(x, *args[:place], torch.cat(parts), *args[place + 1 :], **kwargs)

    def with_wrapper(patcher: ModelPatcher) -> ModelPatcher:
        patched = patcher.clone()
        patched.add_wrapper_with_key(kind, "swap", swap)
        return patched

    ours = apply_psa(with_wrapper(model), adapter, user)
    ours = ours if place == "before" else with_wrapper(apply_psa(model, adapter, user))
    assert difference(run(ours), run(model, [[change(OTHER[0][0]), {}]])) < ROUNDING


def test_a_node_that_reorders_conditionings_does_not_make_the_negative_one_the_users(
    model: ModelPatcher, adapter: PSAAdapter, user: SafetyEmbedding
) -> None:
    def swapped(executor: Any, model: Any, conds: Any, *args: Any) -> Any:
        return executor(model, conds[::-1], *args)[::-1]

    patched = apply_psa(model, adapter, user)
    expected = run(patched)
    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "swapped", swapped)
    assert difference(run(patched), expected) < ROUNDING


def test_text_that_a_wrapper_copies_is_not_changed_twice(
    model: ModelPatcher, adapter: PSAAdapter, user: SafetyEmbedding
) -> None:
    patched = apply_psa(model, adapter, user)
    copied = with_function(patched, lambda c, _: {**c, "c_crossattn": c["c_crossattn"].clone()})
    assert torch.equal(run(copied), run(patched))


def test_the_text_of_a_controlnet_is_changed_too(
    model: ModelPatcher, adapter: PSAAdapter, user: SafetyEmbedding, change: Change
) -> None:
    """CLIP Text Encode ControlNet gives it a prompt of its own; of another text encoder, it stays."""
    seen: list[Options] = []
    patched = with_function(apply_psa(model, adapter, user), lambda c, _: seen.append(c) or c)
    own, foreign = OTHER[0][0], conditioning(TINY_SDXL, 3)[0][0]
    for text, expected in ((own, change(own)), (foreign, foreign)):
        seen.clear()
        run(patched, [[POSITIVE[0][0], {"cross_attn_controlnet": text}]])
        (found,) = (c["crossattn_controlnet"] for c in seen if "crossattn_controlnet" in c)
        assert difference(found[:1].cpu(), expected) < ROUNDING


def test_a_node_that_replaces_attention_with_prompts_of_its_own_is_an_error(
    model: ModelPatcher, adapter: PSAAdapter, user: SafetyEmbedding
) -> None:
    for patched in (
        like_stored_prompts(apply_psa(model, adapter, user), OTHER[0][0]),
        apply_psa(like_stored_prompts(model, OTHER[0][0]), adapter, user),
    ):
        with pytest.raises(AdapterError, match="reads prompts of its own"):
            run(patched)
    run(like_stored_prompts(model, OTHER[0][0]))  # nothing of it stays on the model that they share


def test_ip_adapter_reads_the_users_text_beside_its_image(
    model: ModelPatcher, adapter: PSAAdapter, user: SafetyEmbedding, change: Change, paths: list[str]
) -> None:
    expected = run(like_ip_adapter(model, paths), [[change(POSITIVE[0][0]), {}]])
    for patched in (
        like_ip_adapter(apply_psa(model, adapter, user), paths),
        apply_psa(like_ip_adapter(model, paths), adapter, user),
    ):
        assert difference(run(patched), expected) < ROUNDING


UNCHANGEABLE: dict[str, tuple[list[list[Any]], str]] = {
    "no text": ([[None, {}]], "without text"),
    "text of another width": (
        conditioning(TINY_SDXL, 3),
        "text of width 40, and this adapter changes text of width 24",
    ),
}


@pytest.mark.parametrize("name", UNCHANGEABLE)
def test_what_cannot_be_changed_is_an_error(
    model: ModelPatcher, adapter: PSAAdapter, user: SafetyEmbedding, name: str
) -> None:
    positive, message = UNCHANGEABLE[name]
    with pytest.raises(AdapterError, match=message):
        run(apply_psa(model, adapter, user), positive)


def test_gligen_boxes_are_an_error(model: ModelPatcher, adapter: PSAAdapter, user: SafetyEmbedding) -> None:
    boxes = ("position", model, [])  # any loaded model in place of the one that turns boxes into layers
    with pytest.raises(AdapterError, match="GLIGEN"):
        run(apply_psa(model, adapter, user), [[POSITIVE[0][0], {"gligen": boxes}]])


def test_users_and_prompts_of_one_conditioning_must_match(model: ModelPatcher, adapter: PSAAdapter) -> None:
    users = SafetyEmbedding(torch.randn(3, EMBEDDING_DIM, generator=torch.Generator().manual_seed(0)))
    prompts = [[torch.cat((POSITIVE[0][0], OTHER[0][0])), {}]]
    with pytest.raises(AdapterError, match="3 user embeddings for 2 prompts"):
        denoise(apply_psa(model, adapter, users), prompts, NEGATIVE, noise(3, 4, 16, 16), CFG)
