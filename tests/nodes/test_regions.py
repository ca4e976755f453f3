"""Masks on Apply PSA, at layers: against layers written out by hand, and against pictures of the parts alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
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
from kinds_by_hand import GATED, MLP, TEXT, kinds_adapter, users
from masks import constant_by_hand, gated_by_hand, in_pixels, left_half, soft, with_layers_by_hand
from neighbours import like_attention_couple
from torch import Tensor

from comfyui_psa.adapter import AdapterError, PSAAdapter, find_sites
from comfyui_psa.nodes.adapter_nodes import PSAApply
from comfyui_psa.nodes.apply import apply_psa
from comfyui_psa.nodes.curve import Curve
from comfyui_psa.nodes.regions import Region
from comfyui_psa.profiles import SafetyEmbedding

POSITIVE, NEGATIVE = conditioning(TINY, 1), conditioning(TINY, 2)
LATENT = noise(1, 4, 12, 16)
CFG = 4.0
KINDS: dict[str, dict[str, Any]] = {
    "constant": {"constant": True, "null": "zero_embedding"},
    "gated": {"gated": GATED},
    "text": {"text": TEXT},
    "text mlp": {"text": MLP},
    "all": {"constant": True, "null": "zero_embedding", "gated": GATED, "text": TEXT},
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))
at_layers = pytest.mark.parametrize("kind", ["constant", "gated"])


def make(model: ModelPatcher, context_dim: int = TINY.context_dim) -> dict[str, PSAAdapter]:
    sizes = tuple(site.hidden_size for site in find_sites(model.model.diffusion_model))
    return {kind: kinds_adapter(sizes, context_dim, **parts) for kind, parts in KINDS.items()}


@pytest.fixture(scope="module")
def adapters(model: ModelPatcher) -> dict[str, PSAAdapter]:
    return make(model)


def masked(
    model: ModelPatcher, adapter: PSAAdapter, mask: Tensor, person: SafetyEmbedding | None = None, **options: Any
) -> ModelPatcher:
    return apply_psa(model, adapter, person or users(0), region=Region(mask), **options)


def run(model: ModelPatcher, latent: Tensor = LATENT, cfg: float = CFG, **options: Any) -> Tensor:
    return denoise(model, POSITIVE, NEGATIVE, latent, cfg, **options)


def by_hand(
    model: ModelPatcher, adapter: PSAAdapter, kind: str, masks: Tensor, numbers: tuple[int, ...] = (0,)
) -> ModelPatcher:
    """For one person everywhere; the negative half has what the kind gives it."""
    written = {"constant": constant_by_hand, "gated": gated_by_hand}[kind]
    added = {0: written(model, adapter, users(*numbers).vectors[0])}
    if kind == "constant":
        added[1] = written(model, adapter, adapter.embedding_mean)
    return with_layers_by_hand(model, added, masks)


# All and nothing.


@each_kind
@pytest.mark.parametrize("count", [1, 2])
def test_all_ones_are_no_mask(model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str, count: int) -> None:
    latent = LATENT.repeat(2, 1, 1, 1)
    without = run(apply_psa(model, adapters[kind], users(0)), latent)
    for mask in (torch.ones(count, 12, 16), torch.ones(count, 96, 128)):
        assert torch.equal(run(masked(model, adapters[kind], mask), latent), without)


@pytest.mark.parametrize("mask", [torch.zeros(1, 96, 128), torch.zeros(2, 12, 16), torch.full((8, 8), -1.0)])
def test_a_mask_with_nothing_in_it_is_refused(mask: Tensor) -> None:
    with pytest.raises(AdapterError, match="black all over"):
        Region(mask)


@pytest.mark.parametrize("kind", ["constant", "gated"])
def test_ones_and_zeros_in_one_batch(model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str) -> None:
    latent, mask = noise(2, 4, 12, 16), torch.cat((torch.ones(1, 12, 16), torch.zeros(1, 12, 16)))
    ours = run(masked(model, adapters[kind], mask), latent)
    assert torch.equal(ours[:1], run(apply_psa(model, adapters[kind], users(0)), latent)[:1])
    assert torch.equal(ours[1:], run(model, latent)[1:])


# What layers add.


@at_layers
@pytest.mark.parametrize("size", [(12, 16), (9, 13), (8, 8)])
@pytest.mark.parametrize("form", [left_half, soft])
@pytest.mark.parametrize("scaled", [in_pixels, lambda mask: mask], ids=["picture", "latent"])
def test_layers_add_times_the_mask(
    model: ModelPatcher,
    adapters: dict[str, PSAAdapter],
    kind: str,
    size: tuple[int, int],
    form: Callable[[int, int], Tensor],
    scaled: Callable[[Tensor], Tensor],
) -> None:
    latent, mask = noise(1, 4, *size), form(*size)
    ours = run(masked(model, adapters[kind], scaled(mask)), latent)
    assert difference(ours, run(by_hand(model, adapters[kind], kind, mask), latent)) < ROUNDING
    assert difference(ours, run(apply_psa(model, adapters[kind], users(0)), latent)) > 1e-3
    assert difference(ours, run(model, latent)) > 1e-3


@pytest.mark.parametrize("kind", ["constant", "gated"])
def test_on_a_model_like_sdxl(kind: str) -> None:
    model = comfy_model(unet_weights(TINY_SDXL))
    adapter = make(model, TINY_SDXL.context_dim)[kind]
    prompts, mask = (conditioning(TINY_SDXL, 1), conditioning(TINY_SDXL, 2)), soft(10, 14)
    latent = noise(1, 4, 10, 14)
    ours = denoise(masked(model, adapter, in_pixels(mask)), *prompts, latent, CFG)
    assert difference(ours, denoise(by_hand(model, adapter, kind, mask), *prompts, latent, CFG)) < ROUNDING


@at_layers
def test_inside_a_layer_does_what_it_does_without_a_mask(
    model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str
) -> None:
    """At the first one; what lies behind it sees the other half as well."""

    def first_layer(patched: ModelPatcher) -> Tensor:
        seen: list[Tensor] = []
        feed = model.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].norm3
        handle = feed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        run(patched)
        handle.remove()
        return seen[0].unflatten(1, (12, 16))

    half = first_layer(masked(model, adapters[kind], left_half(96, 128)))
    full, base = first_layer(apply_psa(model, adapters[kind], users(0))), first_layer(model)
    assert torch.equal(half[:, :, :8], full[:, :, :8])
    assert torch.equal(half[:, :, 8:], base[:, :, 8:])
    assert difference(full, base) > 1e-3


@each_kind
def test_strength_and_schedule_count_inside(model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str) -> None:
    sigma = float(model.model.model_sampling.percent_to_sigma(0.3))
    mask, curve = left_half(96, 128), Curve("linear")
    along = masked(model, adapters[kind], mask, strength=0.8, start_percent=0.2, end_percent=0.6, curve=curve)
    fixed = masked(model, adapters[kind], mask, strength=0.6)
    assert difference(run(along, sigmas=(sigma,)), run(fixed, sigmas=(sigma,))) < 1e-4
    late = (sigma_at(model, 100),)
    assert torch.equal(run(along, sigmas=late), run(model, sigmas=late))


def test_half_precision(weights: dict[str, Tensor], adapters: dict[str, PSAAdapter]) -> None:
    low = {name: weight.half() for name, weight in weights.items()}
    half, rounded = comfy_model(low, torch.float16), comfy_model({name: w.float() for name, w in low.items()})
    base = difference(run(half), run(rounded))
    ours = (run(masked(patcher, adapters["all"], left_half(96, 128))) for patcher in (half, rounded))
    assert difference(*ours) < 3 * base


# People, pictures, masks.


@each_kind
def test_two_people_have_a_half_each(model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str) -> None:
    left = left_half(96, 128)
    first = masked(model, adapters[kind], left, users(0))
    both = masked(first, adapters[kind], 1 - left, users(1))
    swapped = masked(masked(model, adapters[kind], 1 - left, users(1)), adapters[kind], left, users(0))
    assert difference(run(both), run(swapped)) < ROUNDING
    assert min(difference(run(both), run(apply_psa(model, adapters[kind], users(i)))) for i in (0, 1)) > 1e-3
    same = masked(masked(model, adapters[kind], left), adapters[kind], 1 - left)
    assert difference(run(same), run(apply_psa(model, adapters[kind], users(0)))) < ROUNDING


@each_kind
def test_every_image_has_its_mask(model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str) -> None:
    masks = torch.cat((left_half(12, 16), soft(12, 16)))
    latent = noise(4, 4, 12, 16)
    together = run(masked(model, adapters[kind], in_pixels(masks)), latent)
    for i in range(4):
        alone = run(masked(model, adapters[kind], masks[i % 2 :][:1]), latent[i : i + 1])
        assert difference(together[i : i + 1], alone) < ROUNDING


@each_kind
def test_people_in_a_batch_with_masks(model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str) -> None:
    masks = torch.cat((left_half(12, 16), soft(12, 16)))
    latent = noise(2, 4, 12, 16)
    for mask in (masks, masks[1:]):
        together = run(masked(model, adapters[kind], mask, users(0, 1)), latent)
        for i in (0, 1):
            alone = masked(model, adapters[kind], mask[min(i, len(mask) - 1) :][:1], users(i))
            assert difference(together[i : i + 1], run(alone, latent[i : i + 1])) < ROUNDING


# Parts of a picture.


@each_kind
def test_areas_see_their_part_of_the_mask(model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str) -> None:
    """Two of one size in one call: each is a picture of its own, with what lies there of the mask."""
    mask, places = soft(12, 16), ((0, 0), (4, 8))
    conds = []
    for seed, (top, left) in zip((1, 4), places, strict=True):
        conds += conditioning(TINY, seed, area=(8, 8, top, left), strength=1.0)
    seen: list[int] = []
    patched = masked(model, adapters[kind], in_pixels(mask))
    patched.set_model_unet_function_wrapper(
        lambda apply, args: (
            seen.append(len(args["cond_or_uncond"])) or apply(args["input"], args["timestep"], **args["c"])
        )
    )
    parts = [denoise(patched, [cond], NEGATIVE, LATENT) for cond in conds]
    for (top, left), ours, cond in zip(places, parts, conds, strict=True):
        place = (..., slice(top, top + 8), slice(left, left + 8))
        alone = denoise(masked(model, adapters[kind], mask[place]), [[cond[0], {}]], NEGATIVE, LATENT[place])
        assert difference(ours[place], alone) < ROUNDING
    both = denoise(patched, conds, NEGATIVE, LATENT)
    assert max(seen) >= 2
    # Each counts where it is alone: the first 4 rows and columns of both do not overlap.
    assert difference(both[..., :4, :8], parts[0][..., :4, :8]) < ROUNDING
    assert difference(both[..., 8:, 8:], parts[1][..., 8:, 8:]) < ROUNDING


def in_tiles(edit: Callable[[Tensor], Tensor] = lambda tile: tile) -> Callable[..., Tensor]:
    """As tiled diffusion does: the model sees one part after the other."""

    def tiled(apply: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        out = torch.zeros_like(args["input"])
        for left in (0, 8):
            place = (..., slice(0, 12), slice(left, left + 8))
            out[place] = apply(edit(args["input"][place]), args["timestep"], **args["c"])
        return out

    return tiled


@each_kind
def test_tiles_see_their_part_of_the_mask(model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str) -> None:
    mask = soft(12, 16)
    patched = masked(model, adapters[kind], in_pixels(mask))
    patched.set_model_unet_function_wrapper(in_tiles())
    ours = run(patched)
    for left in (0, 8):
        place = (..., slice(0, 12), slice(left, left + 8))
        alone = run(masked(model, adapters[kind], mask[place]), LATENT[place])
        assert difference(ours[place], alone) < ROUNDING


@at_layers
def test_tiles_of_nowhere_are_refused(model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str) -> None:
    for edit in (lambda tile: 0.9 * tile, torch.zeros_like):
        patched = masked(model, adapters[kind], left_half(96, 128))
        patched.set_model_unet_function_wrapper(in_tiles(edit))
        with pytest.raises(AdapterError, match="part of 64x96 of the picture"):
            run(patched)


def test_a_batch_of_tiles_is_refused(model: ModelPatcher, adapters: dict[str, PSAAdapter]) -> None:
    def batched(apply: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        tiles = torch.cat(args["input"].chunk(2, dim=-1))
        c = {**args["c"], "c_crossattn": args["c"]["c_crossattn"].repeat(2, 1, 1)}
        return torch.cat(apply(tiles, args["timestep"].repeat(2), **c).chunk(2), dim=-1)

    patched = masked(model, adapters["constant"], left_half(96, 128))
    patched.set_model_unet_function_wrapper(batched)
    with pytest.raises(AdapterError, match="2 pictures into one call where 1 times 1"):
        run(patched, cfg=1.0)


@pytest.mark.parametrize("kind", ["constant", "text"])
def test_a_step_on_another_size_is_refused(model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str) -> None:
    class Smaller(comfy.samplers.CFGGuider):  # type: ignore[misc]
        def predict_noise(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
            return super().predict_noise(x[..., ::2, ::2], *args, **options).repeat(1, 1, 2, 2)

    patched = masked(model, adapters[kind], left_half(96, 128))
    with pytest.raises(AdapterError, match="part of 64x48 of the picture"):
        run(patched, guider=Smaller(patched))


def test_layers_on_a_smaller_picture(model: ModelPatcher, adapters: dict[str, PSAAdapter]) -> None:
    """Deep Shrink: what it makes smaller is masked like everything else."""

    def shrunk(patcher: ModelPatcher) -> ModelPatcher:
        (patched,) = PatchModelAddDownscale.execute(patcher, 2, 1.5, 0.0, 1.0, True, "bicubic", "bicubic").args
        return patched

    mask = soft(12, 16)
    ours = run(shrunk(masked(model, adapters["constant"], mask)))
    assert difference(ours, run(shrunk(by_hand(model, adapters["constant"], "constant", mask)))) < ROUNDING
    assert difference(ours, run(masked(model, adapters["constant"], mask))) > 1e-3


@at_layers
def test_beside_attention_couple(model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str) -> None:
    mask = soft(12, 16)
    expected = run(by_hand(like_attention_couple(model), adapters[kind], kind, mask))
    ours = run(like_attention_couple(masked(model, adapters[kind], mask)))
    assert difference(ours, expected) < ROUNDING


def test_a_call_outside_a_sampler(model: ModelPatcher, adapters: dict[str, PSAAdapter]) -> None:
    patched = masked(model, adapters["constant"], left_half(96, 128))
    options = {**patched.model_options["transformer_options"], "wrappers": patched.wrappers}
    device = next(model.model.parameters()).device
    latent, sigma, context = (t.to(device) for t in (LATENT, torch.tensor([sigma_at(model)]), POSITIVE[0][0]))
    with torch.no_grad():
        ours = patched.model.apply_model(latent, sigma, c_crossattn=context, transformer_options=options).cpu()
    assert difference(ours, run(patched, cfg=1.0)) < ROUNDING


# What does not fit.


@pytest.mark.parametrize("scale", [0.5, 1, 3, 8, 16])
def test_masks_in_any_scale(model: ModelPatcher, adapters: dict[str, PSAAdapter], scale: float) -> None:
    mask = left_half(int(12 * scale), int(16 * scale))
    (patched,) = PSAApply.execute(model, users(0), 1.0, 0.0, 1.0, adapters["constant"], mask=mask).args
    assert torch.equal(run(patched), run(masked(model, adapters["constant"], left_half(12, 16))))


def test_a_picture_whose_sides_are_no_multiples_of_eight(model: ModelPatcher, adapters: dict[str, PSAAdapter]) -> None:
    """The VAE takes its middle."""
    mask = torch.nn.functional.pad(in_pixels(soft(12, 16)), (3, 3, 2, 3), value=1.0)
    ours = run(masked(model, adapters["constant"], mask))
    assert difference(ours, run(masked(model, adapters["constant"], soft(12, 16)))) < ROUNDING


@each_kind
@pytest.mark.parametrize("size", [(128, 96), (96, 96), (64, 128), (12, 17), (96, 137), (1, 16)])
@pytest.mark.parametrize("form", [left_half, soft, lambda h, w: torch.ones(1, h, w)])
def test_another_shape_is_refused(
    model: ModelPatcher,
    adapters: dict[str, PSAAdapter],
    kind: str,
    size: tuple[int, int],
    form: Callable[[int, int], Tensor],
) -> None:
    with pytest.raises(AdapterError, match=rf"mask for Apply PSA is {size[1]}x{size[0]}, and the picture 128x96"):
        run(masked(model, adapters[kind], form(*size)))


@pytest.mark.parametrize(("masks", "images"), [(2, 3), (3, 2), (2, 1)])
def test_masks_and_images_that_do_not_divide(
    model: ModelPatcher, adapters: dict[str, PSAAdapter], masks: int, images: int
) -> None:
    with pytest.raises(AdapterError, match=f"got {masks} masks for {images} images"):
        run(masked(model, adapters["all"], soft(12, 16).repeat(masks, 1, 1)), noise(images, 4, 12, 16))


@pytest.mark.parametrize("mask", [torch.ones(16), torch.ones(1, 3, 8, 8), torch.ones(0, 8, 8)])
def test_what_is_no_mask(mask: Tensor) -> None:
    with pytest.raises(AdapterError, match="expected one mask or several"):
        Region(mask)


def test_masks_without_a_batch_and_beyond_their_range() -> None:
    assert torch.equal(Region(torch.tensor([[-1.0, 2.0]])).masks, torch.tensor([[[0.0, 1.0]]]))
    with pytest.raises(AdapterError, match="no numbers"):
        Region(torch.tensor([[float("nan"), 1.0]]))
