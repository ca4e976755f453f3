"""Masks on Apply PSA in a second pass, in context windows and threads, and beside a node that takes positions away."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy.context_windows import ContextFuseMethods, ContextSchedules
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_testing import ROUNDING, TINY, conditioning, denoise, difference, noise, sigma_at
from kinds_by_hand import GATED, TEXT, kinds_adapter, users
from masks import in_pixels, left_half, soft
from threads import in_threads
from torch import Tensor

from comfyui_psa.adapter import AdapterError, PSAAdapter, find_sites
from comfyui_psa.nodes.apply import apply_psa
from comfyui_psa.nodes.regions import Region
from comfyui_psa.profiles import SafetyEmbedding

POSITIVE, NEGATIVE = conditioning(TINY, 1), conditioning(TINY, 2)


@pytest.fixture(scope="module")
def adapter(model: ModelPatcher) -> PSAAdapter:
    """One of all kinds at once."""
    sizes = tuple(site.hidden_size for site in find_sites(model.model.diffusion_model))
    parts = {"constant": True, "null": "zero_embedding", "gated": GATED, "text": TEXT}
    return kinds_adapter(sizes, TINY.context_dim, **parts)


def masked(
    model: ModelPatcher, adapter: PSAAdapter, mask: Tensor, people: SafetyEmbedding | None = None
) -> ModelPatcher:
    return apply_psa(model, adapter, people or users(0), region=Region(mask))


def run(model: ModelPatcher, latent: Tensor) -> Tensor:
    return denoise(model, POSITIVE, NEGATIVE, latent, 4.0)


def test_a_second_pass_has_the_same_mask_in_its_size(model: ModelPatcher, adapter: PSAAdapter) -> None:
    """Half as large again, as artists do: the same patched model makes both pictures."""
    patched = masked(model, adapter, left_half(96, 128))
    for size in ((12, 16), (18, 24)):
        latent = noise(1, 4, *size)
        assert difference(run(patched, latent), run(masked(model, adapter, left_half(*size)), latent)) < ROUNDING


# ComfyUI 0.3.75 indexes in a way that a later torch will take differently.
in_windows = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")


def steps(model: ModelPatcher, windows: bool) -> Tensor:
    """Three steps on four images, of which the model sees two at a time in ``windows``."""
    if windows:
        schedule, fuse = ContextSchedules.STATIC_STANDARD, ContextFuseMethods.FLAT
        (model,) = ContextWindowsManualNode.execute(model, 2, 0, schedule, 1, False, fuse, 0).args
    # As many noise levels, with the last 0, as images: ComfyUI 0.3.75 compares them one by one.
    sigmas = tuple(sigma_at(model, timestep) for timestep in (900, 600, 300))
    return denoise(model, POSITIVE, NEGATIVE, noise(4, 4, 12, 16), 4.0, sigmas)


@in_windows
def test_one_mask_in_context_windows(model: ModelPatcher, adapter: PSAAdapter) -> None:
    patched = masked(model, adapter, in_pixels(soft(12, 16)))
    assert difference(steps(patched, windows=True), steps(patched, windows=False)) < ROUNDING


@in_windows
@pytest.mark.parametrize(
    ("masks", "numbers", "words"), [(2, (0,), "2 masks"), (4, (0,), "4 masks"), (1, (0, 1), "2 user embeddings")]
)
def test_several_in_context_windows_are_refused(
    model: ModelPatcher, adapter: PSAAdapter, masks: int, numbers: tuple[int, ...], words: str
) -> None:
    patched = masked(model, adapter, soft(12, 16).repeat(masks, 1, 1), users(*numbers))
    with pytest.raises(AdapterError, match=f"got {words}, and a context window .* Use one for all images"):
        steps(patched, windows=True)


def test_chunks_in_threads_share_the_masks(model: ModelPatcher, adapter: PSAAdapter) -> None:
    masks, latent = torch.cat((left_half(12, 16), soft(12, 16))), noise(2, 4, 12, 16)
    patched = masked(model, adapter, masks)
    expected = run(patched, latent)
    assert difference(expected, run(apply_psa(model, adapter, users(0)), latent)) > 1e-3
    patched.set_model_unet_function_wrapper(in_threads)
    for _ in range(3):
        assert difference(run(patched, latent), expected) < ROUNDING


def test_a_node_that_takes_positions_away_is_refused(model: ModelPatcher, adapter: PSAAdapter) -> None:
    def every_second(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
        return n[:, ::2], context, value

    patched = masked(model, adapter, left_half(12, 16))
    patched.set_model_attn2_patch(every_second)
    with pytest.raises(AdapterError, match=r"a layer work on 96 positions, and PSA cannot tell .* Remove that node"):
        run(patched, noise(1, 4, 12, 16))
