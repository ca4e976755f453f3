"""Several people in one picture or one batch, and strength along a run: each kind of adapter against single people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.sample
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_testing import ROUNDING, TINY, conditioning, denoise, difference, noise, sigma_at
from kinds_by_hand import GATED, MLP, TEXT, changed_text, kinds_adapter, users
from torch import Tensor

from comfyui_psa.adapter import AdapterError, PSAAdapter, find_sites, load_adapter
from comfyui_psa.nodes.adapter_nodes import PSAApply
from comfyui_psa.nodes.apply import apply_psa
from comfyui_psa.nodes.curve import Curve
from comfyui_psa.nodes.people import Group, Mixture, People, count, effect
from comfyui_psa.nodes.people_nodes import PSABatchProfiles, PSAMixProfiles, PSARepeatLatent, PSASafetyLevels
from comfyui_psa.profiles import EncoderError, SafetyEmbedding, levels
from comfyui_psa.profiles.encoders import AttributesEncoder
from comfyui_psa.training.miniature import MINIATURE

POSITIVE, NEGATIVE = conditioning(TINY, 1), conditioning(TINY, 2)
LATENT = noise(1, 4, 8, 8)
KINDS: dict[str, dict[str, Any]] = {
    "constant": {"constant": True, "null": "zero_embedding"},
    "gated": {"gated": GATED},
    "text": {"text": TEXT},
    "text mlp": {"text": MLP},
    "all": {"constant": True, "gated": GATED, "text": TEXT},
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))
AT_LAYERS = ("constant", "gated")


@pytest.fixture(scope="module")
def adapters(model: ModelPatcher) -> dict[str, PSAAdapter]:
    sizes = tuple(site.hidden_size for site in find_sites(model.model.diffusion_model))
    return {kind: kinds_adapter(sizes, TINY.context_dim, **parts) for kind, parts in KINDS.items()}


def run(model: ModelPatcher, latent: Tensor = LATENT, cfg: float = 4.0, **options: Any) -> Tensor:
    return denoise(model, POSITIVE, NEGATIVE, latent, cfg, **options)


def mixture(*parts: tuple[People, float]) -> Mixture:
    people: People = parts[0][0]
    weight = parts[0][1]
    for other, more in parts[1:]:
        (people,) = PSAMixProfiles.execute(people, weight, other, more).args
        weight += more
    assert isinstance(people, Mixture)
    return people


# Mixtures.


@pytest.mark.parametrize("kind", AT_LAYERS)
def test_a_mixture_adds_up_what_layers_add(model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str) -> None:
    adapter = adapters[kind]
    chained = apply_psa(apply_psa(model, adapter, users(0), 0.75, null="none"), adapter, users(1), 0.25, null="none")
    mixed = apply_psa(model, adapter, mixture((users(0), 3.0), (users(1), 1.0)), null="none")
    assert difference(run(mixed), run(chained)) < ROUNDING
    assert difference(run(mixed), run(apply_psa(model, adapter, users(0), null="none"))) > 1e-3


@pytest.mark.parametrize("kind", ["text", "text mlp"])
def test_a_mixture_adds_up_what_becomes_of_words(
    model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str
) -> None:
    adapter, text = adapters[kind], POSITIVE[0][0]
    first, second = (changed_text(adapter, users(number).vectors[0], text) for number in (0, 1))
    expected = (0.75 * first + 0.25 * second).float()
    theirs = denoise(model, [[expected, {}]], NEGATIVE, LATENT, 4.0)
    assert difference(run(apply_psa(model, adapter, mixture((users(0), 0.75), (users(1), 0.25)))), theirs) < ROUNDING


@each_kind
def test_the_ends_of_the_slider_are_exactly_the_two_people(
    model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str
) -> None:
    adapter = adapters[kind]
    for weights, person in (((1.0, 0.0), users(0)), ((0.0, 0.2), users(1))):
        mixed = mixture((users(0), weights[0]), (users(1), weights[1]))
        assert torch.equal(run(apply_psa(model, adapter, mixed)), run(apply_psa(model, adapter, person)))


@each_kind
def test_a_mixture_of_three(model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str) -> None:
    adapter = adapters[kind]
    three = mixture((users(0), 1.0), (users(1), 1.0), (users(2), 2.0))
    flat = Mixture((users(0), users(1), users(2)), (1.0, 1.0, 2.0))
    assert difference(run(apply_psa(model, adapter, three)), run(apply_psa(model, adapter, flat))) < ROUNDING


def test_the_unconditional_half_is_nobodys(model: ModelPatcher, adapters: dict[str, PSAAdapter]) -> None:
    adapter = adapters["constant"]
    mixed = apply_psa(model, adapter, mixture((users(0), 0.5), (users(1), 0.5)))
    assert torch.equal(run(mixed, cfg=0.0), run(apply_psa(model, adapter, users(0)), cfg=0.0))


@pytest.mark.parametrize("pair", [(0.0, 0.0), (-1.0, 2.0), (float("nan"), 1.0)])
def test_weights_that_mean_nothing(
    model: ModelPatcher, adapters: dict[str, PSAAdapter], pair: tuple[float, float]
) -> None:
    with pytest.raises(AdapterError, match=r"weights of a mixture .* Set at least one above 0"):
        apply_psa(model, adapters["constant"], mixture((users(0), pair[0]), (users(1), pair[1])))


def test_parts_of_other_sizes_and_of_other_widths(model: ModelPatcher, adapters: dict[str, PSAAdapter]) -> None:
    two_and_three = mixture((users(0, 1), 0.5), (users(0, 1, 2), 0.5))
    with pytest.raises(AdapterError, match="2 users in one part and 3 in another"):
        apply_psa(model, adapters["constant"], two_and_three)
    wide = SafetyEmbedding(torch.zeros(1, 5))
    with pytest.raises(AdapterError, match=r"has shape \[1, 5\]"):
        apply_psa(model, adapters["constant"], mixture((users(0), 0.5), (wide, 0.5)))


@pytest.mark.parametrize("together", [lambda *people: Mixture(people, (0.5, 0.5)), lambda *people: Group(people)])
def test_one_of_them_from_another_encoder_is_refused(
    model: ModelPatcher, adapters: dict[str, PSAAdapter], together: Callable[..., People]
) -> None:
    other = SafetyEmbedding(users(1).vectors, "llm:Other:0")
    with pytest.raises(EncoderError, match="comes from the encoder llm:Other:0"):
        apply_psa(model, adapters["constant"], together(users(0), other))


# One batch, many people.


@each_kind
def test_every_image_of_a_batch_is_one_persons(model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str) -> None:
    adapter = adapters[kind]
    members: list[People] = [users(0), mixture((users(1), 0.5), (users(2), 0.5)), users(3)]
    (first,) = PSABatchProfiles.execute(*members[:2]).args
    (everybody,) = PSABatchProfiles.execute(first, members[2]).args
    together = run(apply_psa(model, adapter, everybody), LATENT.repeat(3, 1, 1, 1))
    alone = [run(apply_psa(model, adapter, person)) for person in members]
    for i, picture in enumerate(alone):
        assert difference(together[i : i + 1], picture) < ROUNDING
    assert min(difference(alone[i], alone[j]) for i, j in ((0, 1), (1, 2), (0, 2))) > 1e-3


@each_kind
def test_people_take_turns_where_there_are_more_images(
    model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str
) -> None:
    adapter, latents = adapters[kind], noise(2, 4, 8, 8)
    (repeated,) = PSARepeatLatent.execute({"samples": latents}, users(0, 1)).args
    together = run(apply_psa(model, adapter, users(0, 1)), repeated["samples"])
    for i in range(4):
        alone = run(apply_psa(model, adapter, users(i % 2)), latents[i // 2 :][:1])
        assert difference(together[i : i + 1], alone) < ROUNDING


def test_a_mixture_of_many_with_one(model: ModelPatcher, adapters: dict[str, PSAAdapter]) -> None:
    adapter = adapters["all"]
    many = mixture((users(0, 1), 0.5), (users(2), 0.5))
    together = run(apply_psa(model, adapter, many), LATENT.repeat(2, 1, 1, 1))
    for i in (0, 1):
        alone = run(apply_psa(model, adapter, mixture((users(i), 0.5), (users(2), 0.5))))
        assert difference(together[i : i + 1], alone) < ROUNDING


def test_everybody_begins_with_the_same_noise() -> None:
    masks = torch.rand(2, 64, 64)
    latent = {"samples": torch.zeros(2, 4, 8, 8), "noise_mask": masks}
    (repeated,) = PSARepeatLatent.execute(latent, Group((users(0, 1), users(2)))).args
    assert repeated["samples"].shape == (6, 4, 8, 8)
    assert torch.equal(repeated["noise_mask"], torch.cat((masks[:1].repeat(3, 1, 1), masks[1:].repeat(3, 1, 1))))
    drawn = comfy.sample.prepare_noise(repeated["samples"], 5, repeated["batch_index"])
    assert torch.equal(drawn, comfy.sample.prepare_noise(latent["samples"], 5, [0, 1]).repeat_interleave(3, dim=0))
    assert not torch.equal(drawn[0], drawn[3])
    assert "batch_index" not in latent
    assert len(latent["samples"]) == 2


def test_a_latent_of_a_batch_keeps_its_own_noise() -> None:
    (repeated,) = PSARepeatLatent.execute({"samples": torch.zeros(1, 4, 8, 8), "batch_index": [7]}, users(0, 1)).args
    assert repeated["batch_index"] == [7, 7]


@pytest.mark.parametrize("masks", [1, 2])
def test_one_mask_for_all_latents_is_one_for_everybody(masks: int) -> None:
    latent = {"samples": torch.zeros(2, 4, 8, 8), "noise_mask": torch.rand(masks, 64, 64)}
    (repeated,) = PSARepeatLatent.execute(latent, users(0, 1)).args
    assert torch.equal(repeated["noise_mask"][::2], repeated["noise_mask"][1::2])
    assert torch.equal(repeated["noise_mask"][2], latent["noise_mask"][-1])


def test_all_levels_from_the_mildest_to_the_strictest(model: ModelPatcher) -> None:
    adapter = load_adapter(MINIATURE / "adapters" / "psa_miniature.safetensors")
    (everybody,) = PSASafetyLevels.execute(adapter).args
    assert count(everybody) == 6
    text = effect(everybody, adapter).text
    assert text is not None
    prompt = torch.randn(1, 77, text.text_dim, generator=torch.Generator().manual_seed(1))
    for number, level in enumerate(levels()):
        alone = adapter.effect(AttributesEncoder().encode([level.profile])).text
        assert alone is not None
        assert torch.allclose(text.tokens(prompt)[number], alone.tokens(prompt)[0], atol=1e-5)


def test_prompts_that_are_there_for_each_image_take_turns_too(
    model: ModelPatcher, adapters: dict[str, PSAAdapter]
) -> None:
    """As nodes that encode several prompts make them: four prompts for four images of two people."""
    prompts = torch.cat([conditioning(TINY, seed)[0][0] for seed in (11, 12, 13, 14)])
    patched = apply_psa(model, adapters["all"], users(0, 1))
    together = denoise(patched, [[prompts, {}]], NEGATIVE, LATENT.repeat(4, 1, 1, 1), 4.0)
    for i in range(4):
        patched = apply_psa(model, adapters["all"], users(i % 2))
        assert difference(together[i : i + 1], denoise(patched, [[prompts[i : i + 1], {}]], NEGATIVE, LATENT, 4.0)) < (
            ROUNDING
        )


def test_tiles_of_several_people_are_refused_even_alone(model: ModelPatcher, adapters: dict[str, PSAAdapter]) -> None:
    """At CFG 1 there is one chunk: nothing else would tell tiles from people who take turns."""

    def tiles(apply_model: Any, given: dict[str, Any]) -> Tensor:
        x = torch.cat((given["input"], given["input"]))
        c = {**given["c"], "c_crossattn": torch.cat((given["c"]["c_crossattn"],) * 2)}
        return apply_model(x, torch.cat((given["timestep"],) * 2), **c)[: len(x) // 2]

    tiled = model.clone()
    tiled.set_model_unet_function_wrapper(tiles)
    with pytest.raises(AdapterError, match="Another node put 4 pictures into one call"):
        run(apply_psa(tiled, adapters["constant"], users(0, 1)), LATENT.repeat(2, 1, 1, 1), cfg=1.0)


# Strength along a run.


@each_kind
@pytest.mark.parametrize(
    ("curve", "share"),
    [
        (Curve("linear"), 0.75),
        (Curve("cosine"), 0.8535533905932737),  # (1 + cos(pi / 4)) / 2
        (Curve(points=(0.2, 1.0)), 0.4),
        (Curve(points=(0.0, 0.5, 3.0)), 0.25),
        (Curve(points=(0.5,)), 0.5),
    ],
    ids=["linear", "cosine", "two numbers", "three numbers", "one number"],
)
def test_a_quarter_of_the_way(
    model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str, curve: Curve, share: float
) -> None:
    """Of the way from 0.2 to 0.6 of the run: what the curve says there is the strength."""
    adapter, sigma = adapters[kind], float(model.model.model_sampling.percent_to_sigma(0.3))
    along = run(apply_psa(model, adapter, users(0), 0.8, 0.2, 0.6, curve=curve), sigmas=(sigma,))
    fixed = run(apply_psa(model, adapter, users(0), 0.8 * share), sigmas=(sigma,))
    assert difference(along, fixed) < 1e-4  # ComfyUI knows noises at whole timesteps alone
    assert difference(fixed, run(model, sigmas=(sigma,))) > 1e-3


@each_kind
def test_steps_of_one_run_have_their_own_strengths(
    model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str
) -> None:
    adapter = adapters[kind]
    sigmas = tuple(sigma_at(model, timestep) for timestep in (899, 500, 100))
    first, second, third = run(apply_psa(model, adapter, users(0), curve=Curve("linear")), sigmas=sigmas).chunk(3)
    strong = run(apply_psa(model, adapter, users(0)), sigmas=sigmas).chunk(3)
    base = run(model, sigmas=sigmas).chunk(3)
    assert difference(first, strong[0]) < difference(first, base[0])
    assert difference(third, strong[2]) > difference(third, base[2])
    assert 0 < difference(second, base[1]) < difference(strong[1], base[1])


@each_kind
def test_where_the_curve_is_zero_it_is_exactly_the_base(
    model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str
) -> None:
    (patched,) = PSAApply.execute(model, users(0), 1.0, 0.0, 1.0, adapters[kind], strengths=[0.0, 0.0, 1.0]).args
    early, late = (sigma_at(model, timestep) for timestep in (900, 100))
    assert torch.equal(run(patched, sigmas=(early,)), run(model, sigmas=(early,)))
    assert difference(run(patched, sigmas=(late,)), run(model, sigmas=(late,))) > 1e-3


@each_kind
def test_a_flat_curve_is_the_strength(model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str) -> None:
    (patched,) = PSAApply.execute(model, users(0), 1.0, 0.0, 1.0, adapters[kind], strengths=[1.0, 1.0]).args
    assert torch.equal(run(patched), run(apply_psa(model, adapters[kind], users(0))))


@each_kind
def test_one_number_is_a_flat_curve(model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str) -> None:
    (patched,) = PSAApply.execute(model, users(0), 1.0, 0.0, 1.0, adapters[kind], strengths=0.5).args
    assert difference(run(patched), run(apply_psa(model, adapters[kind], users(0), 0.5))) < ROUNDING


@pytest.mark.parametrize("strengths", [[-1.0], [float("inf")], [], ["much"], [0.0, 0.0], 0.0])
def test_other_strengths_are_refused(
    model: ModelPatcher, adapters: dict[str, PSAAdapter], strengths: list[float] | float
) -> None:
    expected = "would never act" if strengths in ([0.0, 0.0], 0.0) else "strengths"
    with pytest.raises(AdapterError, match=expected):
        PSAApply.execute(model, users(0), 1.0, 0.0, 1.0, adapters["constant"], strengths=strengths)


def test_who_wants_the_base_model_may_say_so_twice(model: ModelPatcher, adapters: dict[str, PSAAdapter]) -> None:
    (patched,) = PSAApply.execute(model, users(0), 0.0, 0.0, 1.0, adapters["constant"], strengths=[0.0]).args
    assert torch.equal(run(patched), run(model))
