"""A compiled UNet stays one program: PSA breaks no graph, and other people, strengths and steps compile nothing anew.

Compiled as ComfyUI's TorchCompileModel does it, with a backend that runs what has been traced; what is counted are
the compiler's own counters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import comfy.ldm.modules.attention as attention
import pytest
import torch
import torch._dynamo
from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_testing import ROUNDING, comfy_model, conditioning, denoise, difference, noise, sigma_at, unet_weights
from kinds_by_hand import GATED, TEXT, kinds_adapter, users
from masks import left_half, soft
from torch import Tensor
from torch._dynamo.utils import counters

from comfyui_psa.adapter import PSAAdapter, find_sites
from comfyui_psa.nodes.apply import apply_psa
from comfyui_psa.nodes.curve import Curve
from comfyui_psa.nodes.regions import Region
from comfyui_psa.training.synthetic import UNetShape

SHAPE = UNetShape(channels=32, channel_mult=(1, 2), transformer_depth=(1, 0), context_dim=24)
POSITIVE, NEGATIVE = conditioning(SHAPE, 1), conditioning(SHAPE, 2)
LATENT = noise(1, 4, 8, 8)
KINDS: dict[str, dict[str, Any]] = {
    "constant": {"constant": True, "null": "zero_embedding"},
    "gated": {"gated": GATED},
    "text": {"text": TEXT},
    "all": {"constant": True, "null": "zero_embedding", "gated": GATED, "text": TEXT},
}
Apply = Callable[..., ModelPatcher]


@pytest.fixture(scope="module")
def small() -> ModelPatcher:
    return comfy_model(unet_weights(SHAPE))


@pytest.fixture
def adapter(small: ModelPatcher, kind: str) -> PSAAdapter:
    sizes = tuple(site.hidden_size for site in find_sites(small.model.diffusion_model))
    return kinds_adapter(sizes, SHAPE.context_dim, **KINDS[kind])


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The compiler's counters, from zero; and the attention that ComfyUI computes with on a GPU.

    That for CPUs asks how much memory is free, which breaks the graph of any model.
    """
    # It traces for a log that nobody reads, unless pytest does.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, name, attention.attention_pytorch)
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()
    counters.clear()


def compiled(patcher: ModelPatcher) -> ModelPatcher:
    patched = patcher.clone()
    set_torch_compile_wrapper(patched, backend="eager")
    return patched


def run(patcher: ModelPatcher) -> Tensor:
    sigmas = tuple(sigma_at(patcher, timestep) for timestep in (900, 600, 300, 50))
    return denoise(patcher, POSITIVE, NEGATIVE, LATENT, 4.0, sigmas=sigmas)


def graphs(compiler: Any) -> int:
    """How many graphs have been made; every one made anew counts as well."""
    assert sum(compiler["graph_break"].values()) == 0
    return int(compiler["stats"]["unique_graphs"])


def settings(adapter: PSAAdapter) -> Iterator[Apply]:
    """Apply PSA in all its settings that have one batch."""
    yield lambda model: apply_psa(model, adapter, users(0))
    yield lambda model: apply_psa(model, adapter, users(1))
    yield lambda model: apply_psa(model, adapter, users(0), 0.35)
    yield lambda model: apply_psa(model, adapter, users(2), 2.5, curve=Curve("cosine"))
    yield lambda model: apply_psa(model, adapter, users(0), curve=Curve(points=(0.2, 0.0, 1.0)))
    yield lambda model: apply_psa(model, adapter, users(0), 0.5, start_percent=0.3, end_percent=0.7)
    yield lambda model: apply_psa(model, adapter, users(3), region=Region(torch.ones(1, 64, 64)))


@pytest.mark.parametrize("kind", ["constant", "gated", "text"])
def test_people_strengths_and_steps_share_one_graph(small: ModelPatcher, adapter: PSAAdapter, compiler: Any) -> None:
    run(compiled(small))
    assert graphs(compiler) == 1
    first, *others = settings(adapter)
    picture = run(compiled(first(small)))
    whole = graphs(compiler)
    assert whole <= 2
    assert difference(picture, run(first(small))) < ROUNDING
    assert difference(picture, run(small)) > 1e-3
    for apply in others:
        ours = run(compiled(apply(small)))
        assert difference(ours, run(apply(small))) < ROUNDING
        assert difference(run(apply(compiled(small))), ours) < ROUNDING  # the other way around in the chain
    assert graphs(compiler) == whole


@pytest.mark.parametrize("kind", ["all"])
def test_masks_share_one_graph(small: ModelPatcher, adapter: PSAAdapter, compiler: Any) -> None:
    run(compiled(apply_psa(small, adapter, users(0), region=Region(left_half(64, 64)))))
    whole = graphs(compiler)
    assert whole == 1
    for mask, number, strength in ((soft(8, 8), 0, 1.0), (left_half(8, 8), 1, 1.0), (soft(64, 64), 2, 0.4)):
        patched = apply_psa(small, adapter, users(number), strength, curve=Curve("linear"), region=Region(mask))
        assert difference(run(compiled(patched)), run(patched)) < ROUNDING
    assert graphs(compiler) == whole


@pytest.mark.parametrize("kind", ["all"])
def test_a_mask_on_text_and_steps_that_rest_make_two_graphs(
    small: ModelPatcher, adapter: PSAAdapter, compiler: Any
) -> None:
    """Where PSA rests there is one version of a prompt, else two: the batch has another size. Compiled once each."""
    for mask, number, options in (
        (left_half(8, 8), 0, {"start_percent": 0.3, "end_percent": 0.7}),
        (soft(8, 8), 1, {"start_percent": 0.1, "end_percent": 0.5, "strength": 0.4}),
        (left_half(8, 8), 2, {"curve": Curve("linear")}),
    ):
        patched = apply_psa(small, adapter, users(number), region=Region(mask), **options)
        assert difference(run(compiled(patched)), run(patched)) < ROUNDING
        assert graphs(compiler) == 2


@pytest.mark.parametrize("kind", ["text", "all"])
def test_two_in_a_row_share_one_graph(small: ModelPatcher, adapter: PSAAdapter, compiler: Any) -> None:
    def both(first: int, second: int, strength: float) -> ModelPatcher:
        left = apply_psa(small, adapter, users(first), strength)
        return apply_psa(left, adapter, users(second), 0.8, start_percent=0.2)

    run(compiled(both(0, 1, 1.0)))
    whole = graphs(compiler)
    assert whole == 1
    for numbers in ((1, 0, 1.0), (2, 2, 0.3)):
        assert difference(run(compiled(both(*numbers))), run(both(*numbers))) < ROUNDING
    assert graphs(compiler) == whole


@pytest.mark.parametrize("kind", ["all"])
def test_a_step_in_which_psa_rests_is_the_base(small: ModelPatcher, adapter: PSAAdapter, compiler: Any) -> None:
    patched = apply_psa(small, adapter, users(0), start_percent=0.3, end_percent=0.7)
    ours, base = run(compiled(patched)).chunk(4), run(compiled(small)).chunk(4)
    assert [torch.equal(ours[i], base[i]) for i in range(4)] == [True, False, False, True]
