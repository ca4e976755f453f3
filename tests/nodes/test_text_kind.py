"""The text kind on a ComfyUI model: the base with prompts that are changed by the formula, written out elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_testing import (
    ROUNDING,
    TINY,
    TINY_SDXL,
    comfy_model,
    conditioning,
    denoise,
    device_of,
    difference,
    noise,
    sigma_at,
    unet_weights,
)
from kinds_by_hand import MLP, TEXT, changed_text, kinds_adapter, users
from neighbours import like_attention_couple
from torch.utils._python_dispatch import TorchDispatchMode

from comfyui_psa.adapter import AdapterError, PSAAdapter, TextSpec, UserText
from comfyui_psa.nodes.apply import apply_psa

Conditioning = list[list[Any]]

POSITIVE, NEGATIVE = conditioning(TINY, 1), conditioning(TINY, 2)
LATENT = noise(2, 4, 16, 16)
CFG = 4.0


@pytest.fixture(scope="module", params=[TEXT, MLP], ids=["attention", "mlp"])
def adapter(request: pytest.FixtureRequest) -> PSAAdapter:
    return kinds_adapter((), TINY.context_dim, text=request.param)


def by_hand(adapter: PSAAdapter, prompts: Conditioning, user: int = 0) -> Conditioning:
    """The same conditionings with a user's text."""
    vector = users(user).vectors[0]
    return [[changed_text(adapter, vector, text), options] for text, options in prompts]


def test_the_user_reads_another_prompt(model: ModelPatcher, adapter: PSAAdapter) -> None:
    ours = denoise(apply_psa(model, adapter, users(0)), POSITIVE, NEGATIVE, LATENT, CFG)
    assert difference(ours, denoise(model, by_hand(adapter, POSITIVE), NEGATIVE, LATENT, CFG)) < ROUNDING
    assert difference(ours, denoise(model, POSITIVE, NEGATIVE, LATENT, CFG)) > 0.01
    assert difference(ours, denoise(apply_psa(model, adapter, users(1)), POSITIVE, NEGATIVE, LATENT, CFG)) > 0.01


def test_the_unconditional_half_stays_the_base(model: ModelPatcher, adapter: PSAAdapter) -> None:
    ours = denoise(apply_psa(model, adapter, users(0)), POSITIVE, NEGATIVE, LATENT, cfg=0.0)
    assert torch.equal(ours, denoise(model, POSITIVE, NEGATIVE, LATENT, cfg=0.0))


def test_strength_scales_the_change_and_zero_is_exactly_the_base(model: ModelPatcher, adapter: PSAAdapter) -> None:
    base = denoise(model, POSITIVE, NEGATIVE, LATENT, CFG)
    assert torch.equal(denoise(apply_psa(model, adapter, users(0), 0.0), POSITIVE, NEGATIVE, LATENT, CFG), base)
    changed = by_hand(adapter, POSITIVE)[0][0]
    half = [[POSITIVE[0][0] + 0.5 * (changed - POSITIVE[0][0]), {}]]
    ours = denoise(apply_psa(model, adapter, users(0), 0.5), POSITIVE, NEGATIVE, LATENT, CFG)
    assert difference(ours, denoise(model, half, NEGATIVE, LATENT, CFG)) < ROUNDING


def test_nothing_is_added_to_the_unet(
    model: ModelPatcher, adapter: PSAAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counter(TorchDispatchMode):
        found: list[str]

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.found.append(str(func))
            return func(*args, **(kwargs or {}))

    unet = model.model.diffusion_model
    forward = unet._forward  # within the wrappers, of which PSA's is one

    def operations(patched: ModelPatcher) -> list[str]:
        counter = Counter()
        counter.found = []

        def counted(*arguments: Any, **options: Any) -> torch.Tensor:
            with counter:
                return forward(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(unet, "_forward", counted)
            denoise(patched, POSITIVE, NEGATIVE, LATENT, CFG)
        return counter.found

    base = operations(model)
    assert len(base) > 100
    assert operations(apply_psa(model, adapter, users(0))) == base


PROMPTS: dict[str, Conditioning] = {
    "two positives": POSITIVE + conditioning(TINY, 4),
    "an area": POSITIVE + conditioning(TINY, 4, area=(8, 16, 4, 0), strength=1.0, set_area_to_bounds=False),
    "three chunks of tokens": conditioning(TINY, 5, tokens=15),
    "unequal lengths": conditioning(TINY, 5, tokens=15) + POSITIVE,
}


@pytest.mark.parametrize("name", PROMPTS)
def test_every_prompt_of_the_user_is_changed(model: ModelPatcher, adapter: PSAAdapter, name: str) -> None:
    prompts = PROMPTS[name]
    ours = denoise(apply_psa(model, adapter, users(0)), prompts, NEGATIVE, LATENT, CFG)
    assert difference(ours, denoise(model, by_hand(adapter, prompts), NEGATIVE, LATENT, CFG)) < ROUNDING
    assert difference(ours, denoise(model, prompts, NEGATIVE, LATENT, CFG)) > 0.01


@pytest.mark.parametrize("first", ["psa", "couple"])
def test_prompts_that_attention_couple_puts_in_are_changed(
    model: ModelPatcher, adapter: PSAAdapter, first: str
) -> None:
    psa: Callable[[ModelPatcher], ModelPatcher] = lambda patcher: apply_psa(patcher, adapter, users(0))  # noqa: E731
    chain = (psa, like_attention_couple) if first == "psa" else (like_attention_couple, psa)
    ours = denoise(chain[1](chain[0](model)), POSITIVE, NEGATIVE, LATENT, CFG)

    def change(text: torch.Tensor) -> torch.Tensor:
        return changed_text(adapter, users(0).vectors[0], text)

    expected = denoise(like_attention_couple(model, change), by_hand(adapter, POSITIVE), NEGATIVE, LATENT, CFG)
    assert difference(ours, expected) < ROUNDING
    half_done = denoise(like_attention_couple(model), by_hand(adapter, POSITIVE), NEGATIVE, LATENT, CFG)
    assert difference(half_done, expected) > 0.001


def test_each_image_of_a_batch_has_its_own_user(model: ModelPatcher, adapter: PSAAdapter) -> None:
    together = denoise(apply_psa(model, adapter, users(0, 1)), POSITIVE, NEGATIVE, LATENT, CFG)
    for i in (0, 1):
        alone = denoise(apply_psa(model, adapter, users(i)), POSITIVE, NEGATIVE, LATENT[i : i + 1], CFG)
        assert difference(together[i : i + 1], alone) < ROUNDING
    with pytest.raises(AdapterError, match="2 user embeddings for 3 images"):
        denoise(apply_psa(model, adapter, users(0, 1)), POSITIVE, NEGATIVE, noise(3, 4, 16, 16), CFG)


def test_two_in_a_row_change_the_prompt_one_after_the_other(model: ModelPatcher, adapter: PSAAdapter) -> None:
    both = apply_psa(apply_psa(model, adapter, users(0)), adapter, users(1))
    ours = denoise(both, POSITIVE, NEGATIVE, LATENT, CFG)
    orders = (by_hand(adapter, by_hand(adapter, POSITIVE, a), b) for a, b in ((0, 1), (1, 0)))
    assert min(difference(ours, denoise(model, text, NEGATIVE, LATENT, CFG)) for text in orders) < ROUNDING


def test_range_follows_the_sampling_percent(model: ModelPatcher, adapter: PSAAdapter) -> None:
    sigmas = tuple(sigma_at(model, timestep) for timestep in (999, 700, 400, 100))

    def run(patcher: ModelPatcher) -> list[torch.Tensor]:
        return list(denoise(patcher, POSITIVE, NEGATIVE, LATENT[:1], CFG, sigmas=sigmas))

    base, whole = run(model), run(apply_psa(model, adapter, users(0)))
    part = run(apply_psa(model, adapter, users(0), start_percent=0.25, end_percent=0.75))
    assert [torch.equal(part[i], whole[i]) for i in range(4)] == [False, True, True, False]
    assert [torch.equal(part[i], base[i]) for i in range(4)] == [True, False, False, True]


def test_a_prompt_is_changed_once_in_a_run(
    model: ModelPatcher, adapter: PSAAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    change = UserText.tokens

    def counted(text: UserText, *args: Any) -> torch.Tensor:
        calls.append(1)
        return change(text, *args)

    monkeypatch.setattr(UserText, "tokens", counted)
    sigmas = tuple(sigma_at(model, timestep) for timestep in (999, 700, 400, 100))
    patched = apply_psa(model, adapter, users(0))
    denoise(patched, POSITIVE + conditioning(TINY, 4), NEGATIVE, LATENT, CFG, sigmas=sigmas)
    assert len(calls) == 2  # two prompts of the user, four steps


def test_a_call_outside_a_sampler_is_protected_too(model: ModelPatcher, adapter: PSAAdapter) -> None:
    patched = apply_psa(model, adapter, users(0))
    inputs = LATENT, torch.tensor([sigma_at(model)]), POSITIVE[0][0].repeat(2, 1, 1)
    options = {**patched.model_options["transformer_options"], "wrappers": patched.wrappers}
    latent, sigma, context = (tensor.to(device_of(patched)) for tensor in inputs)
    with torch.no_grad():
        ours = patched.model.apply_model(latent, sigma, c_crossattn=context, transformer_options=options).cpu()
    assert difference(ours, denoise(patched, POSITIVE, NEGATIVE, LATENT)) < ROUNDING


@pytest.mark.parametrize("form", ["attention", "mlp"])
def test_sdxl_reads_the_users_pooled_text_as_well(form: str) -> None:
    model = comfy_model(unet_weights(TINY_SDXL))
    spec = TextSpec(**({**(TEXT if form == "attention" else MLP).model_dump(), "pooled_dim": 16}))
    adapter = kinds_adapter((), TINY_SDXL.context_dim, text=spec)
    prompts, negative = conditioning(TINY_SDXL, 1), conditioning(TINY_SDXL, 2)
    vector = users(0).vectors[0]
    text, options = prompts[0]
    pooled = changed_text(adapter, vector, options["pooled_output"], "pooled")
    changed = [[changed_text(adapter, vector, text), {"pooled_output": pooled}]]
    ours = denoise(apply_psa(model, adapter, users(0)), prompts, negative, LATENT, CFG)
    assert difference(ours, denoise(model, changed, negative, LATENT, CFG)) < ROUNDING
    half_done = [[changed[0][0], options]]
    assert difference(ours, denoise(model, half_done, negative, LATENT, CFG)) > 0.001
