"""What the patch promises by itself: exact zeros, exact sums, users in a batch, ranges, nothing left behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_testing import ROUNDING, TINY, conditioning, denoise, device_of, difference, noise, sigma_at
from torch import Tensor

from comfyui_psa.adapter import AdapterError, PSAAdapter
from comfyui_psa.nodes.apply import apply_psa
from comfyui_psa.nodes.patch import Run
from comfyui_psa.profiles import SafetyEmbedding

POSITIVE = conditioning(TINY, 1)
NEGATIVE = conditioning(TINY, 2)
LATENT = noise(1, 4, 16, 16)
Users = Callable[..., SafetyEmbedding]


def run(model: ModelPatcher, latent: Tensor = LATENT, cfg: float = 5.0, **options: object) -> Tensor:
    return denoise(model, POSITIVE, NEGATIVE, latent, cfg, **options)  # type: ignore[arg-type]


def test_strength_zero_is_exactly_the_base(model: ModelPatcher, adapter: PSAAdapter, users: Users) -> None:
    patched = apply_psa(model, adapter, users(0), strength=0.0)
    assert torch.equal(run(patched), run(model))
    assert patched is not model


def test_patching_a_clone_leaves_the_model_alone(model: ModelPatcher, adapter: PSAAdapter, users: Users) -> None:
    before = run(model)
    assert difference(run(apply_psa(model, adapter, users(0))), before) > 0.01
    assert torch.equal(run(model), before)


def test_users_in_a_batch_equal_single_runs(model: ModelPatcher, adapter: PSAAdapter, users: Users) -> None:
    latent = noise(2, 4, 16, 16)
    together = run(apply_psa(model, adapter, users(0, 1)), latent)
    for i in (0, 1):
        alone = run(apply_psa(model, adapter, users(i)), latent[i : i + 1])
        assert difference(together[i : i + 1], alone) < ROUNDING
    assert difference(together[:1], run(apply_psa(model, adapter, users(1)), latent[:1])) > 0.01


def test_one_user_serves_a_whole_batch(model: ModelPatcher, adapter: PSAAdapter, users: Users) -> None:
    latent = noise(2, 4, 16, 16)
    shared = run(apply_psa(model, adapter, users(3)), latent)
    assert difference(run(apply_psa(model, adapter, users(3, 3)), latent), shared) < ROUNDING


def test_another_number_of_users_than_images_is_refused(model: ModelPatcher, adapter: PSAAdapter, users: Users) -> None:
    with pytest.raises(AdapterError, match="2 user embeddings for 3 images"):
        run(apply_psa(model, adapter, users(0, 1)), noise(3, 4, 16, 16))


def test_two_in_a_row_add_up(model: ModelPatcher, adapter: PSAAdapter, users: Users) -> None:
    halves = apply_psa(apply_psa(model, adapter, users(0), 0.75), adapter, users(0), 0.5)
    assert difference(run(halves), run(apply_psa(model, adapter, users(0), 1.25))) < ROUNDING
    both = apply_psa(apply_psa(model, adapter, users(0)), adapter, users(1))
    swapped = apply_psa(apply_psa(model, adapter, users(1)), adapter, users(0))
    assert difference(run(both), run(swapped)) < ROUNDING
    assert difference(run(both), run(apply_psa(model, adapter, users(0)))) > 0.01


def test_clones_of_clones_share_the_patch(model: ModelPatcher, adapter: PSAAdapter, users: Users) -> None:
    patched = apply_psa(model, adapter, users(0))
    twice = patched.clone().clone()
    assert torch.equal(run(twice), run(patched))

    def patch_of(patcher: ModelPatcher) -> object:
        return patcher.model_options["transformer_options"]["patches"]["attn2_output_patch"][0]

    assert patch_of(twice) is patch_of(patched)


def test_strength_can_change_between_runs(model: ModelPatcher, adapter: PSAAdapter, users: Users) -> None:
    weak = run(apply_psa(model, adapter, users(0), 0.5))
    strong = run(apply_psa(model, adapter, users(0), 2.0))
    assert torch.equal(run(apply_psa(model, adapter, users(0), 0.5)), weak)
    assert difference(strong, weak) > 0.01


def test_unconditional_choices(model: ModelPatcher, adapter: PSAAdapter, users: Users) -> None:
    base = run(model, cfg=0.0)
    assert torch.equal(run(apply_psa(model, adapter, users(0), null="none"), cfg=0.0), base)
    zero = run(apply_psa(model, adapter, users(0), null="zero_embedding"), cfg=0.0)
    assert difference(zero, base) > 0.01
    assert torch.equal(run(apply_psa(model, adapter, users(1)), cfg=0.0), zero)  # as trained; whoever the user is


def test_range_follows_the_sampling_percent(model: ModelPatcher, adapter: PSAAdapter, users: Users) -> None:
    sigmas = tuple(sigma_at(model, timestep) for timestep in (999, 700, 400, 100))
    base = run(model, sigmas=sigmas)
    whole = run(apply_psa(model, adapter, users(0)), sigmas=sigmas)
    part = run(apply_psa(model, adapter, users(0), start_percent=0.25, end_percent=0.75), sigmas=sigmas)
    acts = [torch.equal(part[i], whole[i]) for i in range(4)]
    rests = [torch.equal(part[i], base[i]) for i in range(4)]
    assert acts == [False, True, True, False]
    assert rests == [True, False, False, True]


def test_ranges_that_follow_each_other_make_a_whole(model: ModelPatcher, adapter: PSAAdapter, users: Users) -> None:
    middle = float(model.model.model_sampling.percent_to_sigma(0.5))
    sigmas = (sigma_at(model, 900), middle, sigma_at(model, 100))
    first = apply_psa(model, adapter, users(0), end_percent=0.5)
    joined = apply_psa(first, adapter, users(0), start_percent=0.5)
    assert torch.equal(run(joined, sigmas=sigmas), run(apply_psa(model, adapter, users(0)), sigmas=sigmas))


@pytest.mark.parametrize(("start", "end"), [(0.8, 0.2), (0.5, 0.5)])
def test_an_empty_range_is_refused(
    model: ModelPatcher, adapter: PSAAdapter, users: Users, start: float, end: float
) -> None:
    with pytest.raises(AdapterError, match="would never act"):
        apply_psa(model, adapter, users(0), start_percent=start, end_percent=end)


def test_one_operation_per_layer_and_step(model: ModelPatcher, adapter: PSAAdapter, users: Users) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.adds: list[tuple[int, ...]] = []
            self.all = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if not func.is_view:
                self.all += 1
            return out

    def operations(patched: ModelPatcher, steps: int) -> int:
        with Counter() as counter:
            run(patched, cfg=1.0, sigmas=tuple(sigma_at(model, 900 - i) for i in range(steps)))
        return counter.all

    patched = apply_psa(model, adapter, users(0))
    per_step_base = operations(model, 4) - operations(model, 3)
    per_step = operations(patched, 4) - operations(patched, 3)
    assert per_step - per_step_base == adapter.config.num_sites


def test_nothing_of_a_run_is_held_afterwards(
    model: ModelPatcher, adapter: PSAAdapter, users: Users, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[weakref.ref[Run]] = []
    begin = Run.__init__

    def remember(self: Run, *args: object) -> None:
        begin(self, *args)  # type: ignore[arg-type]
        runs.append(weakref.ref(self))

    monkeypatch.setattr(Run, "__init__", remember)
    patched = apply_psa(model, adapter, users(0))
    run(patched)
    gc.collect()
    assert len(runs) == 1
    assert runs[0]() is None


def test_a_call_outside_a_sampler_is_protected_too(model: ModelPatcher, adapter: PSAAdapter, users: Users) -> None:
    patched = apply_psa(model, adapter, users(0))
    inputs = LATENT, torch.tensor([sigma_at(model)]), POSITIVE[0][0]

    def call(patcher: ModelPatcher) -> Tensor:
        options = {**patcher.model_options["transformer_options"], "wrappers": patcher.wrappers}
        latent, sigma, context = (tensor.to(device_of(patcher)) for tensor in inputs)
        with torch.no_grad():
            return patcher.model.apply_model(latent, sigma, c_crossattn=context, transformer_options=options).cpu()

    assert difference(call(patched), denoise(patched, POSITIVE, NEGATIVE, LATENT)) < ROUNDING


def test_a_call_that_skips_the_preparation_is_an_error(model: ModelPatcher, adapter: PSAAdapter, users: Users) -> None:
    options = apply_psa(model, adapter, users(0)).model_options["transformer_options"]
    inputs = (tensor.to(device_of(model)) for tensor in (LATENT, torch.tensor([500.0]), POSITIVE[0][0]))
    with torch.no_grad(), pytest.raises(AdapterError, match="would not be protected"):
        model.model.diffusion_model(*inputs, transformer_options=options)
