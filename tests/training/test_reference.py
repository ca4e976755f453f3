"""Pairs whose noise comes again: the reference is measured once, and remembered through checkpoints and over ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from interrupted_runs import assert_same_end, differences
from loss_by_hand import loss_by_hand
from observed_runs import ROWS, Base, Run, train_tiny
from torch import Tensor
from training_runs import checkpoint, metrics
from training_testing import pair_batch, tiny_adapter, tiny_unet

from comfyui_psa.training.dpo.denoising import PairBatch
from comfyui_psa.training.dpo.policy import Policy, RememberedReference
from comfyui_psa.training.errors import TrainingError

NOISES, STEPS = 2, 9  # three epochs of three steps: two of them new to the reference
SETTINGS: dict[str, Any] = {
    "loss.noises_per_pair": NOISES,
    "run.batch_size": 4,
    "run.accumulation": 1,
    "run.steps": STEPS,
    "run.seed": 8,
}
NEW, KNOWN = [(8, False), (8, True)], [(8, True)]  # calls of the UNet in a step: images, with gradients


@pytest.fixture(scope="module")
def remembering(bases: dict[str, Base], split: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_tiny(bases["sd"], split, tmp_path_factory.mktemp("remembering") / "run", SETTINGS)


def table(run_: Run, step: int) -> Tensor:
    """What a checkpoint remembers, ``[rows, noises, 2]``."""
    return torch.load(checkpoint(run_.config, step) / "parts.pt", weights_only=True)["reference"]["errors"]


def going_on(run_: Run, split: Path, output: Path, step: int, **changes: Any) -> Run:
    start = {"run.resume": str(checkpoint(run_.config, step))}
    return train_tiny(run_.base, split, output, {**SETTINGS, **start, **changes})


def test_the_reference_runs_once_for_each_pair_and_noise(remembering: Run) -> None:
    assert remembering.unet_calls == NEW * 6 + KNOWN * 3
    known = [int(table(remembering, step).isfinite().all(dim=2).sum()) for step in range(1, STEPS + 1)]
    assert known == [4, 8, 12, 16, 20, 24, 24, 24, 24]
    assert table(remembering, STEPS).shape == (ROWS, NOISES, 2)


def test_the_loss_is_the_same_as_with_a_reference_that_is_measured_anew(
    remembering: Run, split: Path, tmp_path: Path
) -> None:
    """By hand, and by a run that was made to forget."""
    lines = metrics(remembering.config)
    assert lines[7]["loss"] == pytest.approx(loss_by_hand(remembering, split, step=8), abs=1e-4)

    parts = checkpoint(remembering.config, 6) / "parts.pt"
    kept = parts.read_bytes()
    content = torch.load(parts, weights_only=True)
    content["reference"]["errors"].fill_(torch.nan)
    torch.save(content, parts)
    try:
        forgetful = going_on(remembering, split, tmp_path / "run", 6)
    finally:
        parts.write_bytes(kept)
    assert forgetful.unet_calls == NEW * 3
    # The pairs of an epoch come in another order, so in another place of a batch: up to the kernels' rounding.
    for ours, theirs in zip(lines[6:], metrics(forgetful.config), strict=True):
        for name in ("loss", "margin", "chosen_error", "rejected_error", "gradient_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    first, second = (table(run_, STEPS)[:, 0] for run_ in (remembering, forgetful))
    assert torch.allclose(first, second, rtol=1e-5)


@pytest.mark.parametrize("step", [4, 7])
def test_a_resumed_run_remembers_and_ends_with_the_same_bits(
    remembering: Run, split: Path, tmp_path: Path, step: int
) -> None:
    resumed = going_on(remembering, split, tmp_path / "run", step)
    assert resumed.unet_calls == NEW * max(0, 6 - step) + KNOWN * min(3, STEPS - step)
    assert_same_end(resumed.config, remembering.config)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("loss.noises_per_pair", 3),
        ("loss.noises_per_pair", 0),
        ("loss.prompt_dropout", 0.1),
        ("loss.noise_offset", 0.1),
        ("loss.min_timestep", 10),
        ("model.dtype", "bf16"),
    ],
)
def test_what_is_remembered_is_not_used_for_other_draws(
    remembering: Run, split: Path, tmp_path: Path, setting: str, value: object
) -> None:
    with pytest.raises(TrainingError, match=f"was made with {setting} = .*says {value}. Resume with the same"):
        going_on(remembering, split, tmp_path / "run", 4, **{setting: value})


# The memory alone


def policy() -> Policy:
    unet = tiny_unet()
    return Policy(unet, DDPMScheduler(beta_schedule="scaled_linear"), tiny_adapter(unet))


def calls_of(policy: Policy) -> list[int]:
    calls: list[int] = []
    policy.unet.register_forward_pre_hook(lambda _unet, args: calls.append(len(args[0])))
    return calls


def again(batch: PairBatch, *rows: int, variant: int = 0) -> PairBatch:
    """Some pairs of a batch that has one for each row, with one of their noises."""
    tensors = {name: value[list(rows)] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, rows=rows, variants=(variant,) * len(rows), **tensors)


def alone(tensor: Tensor) -> Tensor:
    return tensor


def test_a_batch_with_something_new_runs_the_unet_and_one_without_does_not() -> None:
    base = policy()
    calls, batch = calls_of(base), pair_batch(pairs=4)
    reference = RememberedReference(base, alone, rows=4, variants=2)
    first = reference.known_errors(again(batch, 0, 1))
    assert first is not None
    reference.known_errors(again(batch, 0, 1))
    assert len(calls) == 2  # what a step has measured counts from the next one on, on all ranks
    reference.end_step()
    found = reference.known_errors(again(batch, 1, 0))
    assert found is not None
    assert len(calls) == 2
    assert torch.equal(found.chosen, first.chosen.flip(0))
    assert torch.equal(found.rejected, first.rejected.flip(0))
    reference.known_errors(again(batch, 1, 2))
    assert len(calls) == 3
    reference.known_errors(again(batch, 0, 1, variant=1))
    assert len(calls) == 4


def test_fresh_noise_is_never_remembered() -> None:
    base = policy()
    calls, batch = calls_of(base), pair_batch()
    reference = RememberedReference(base, alone, rows=0, variants=0)
    for _ in range(2):
        assert reference.known_errors(batch) is None
        reference.end_step()
    assert not calls


def test_ranks_remember_what_any_of_them_has_measured() -> None:
    """Two ranks as threads; gathering waits for both and joins in the order of ranks, as collectives do."""
    batch, policies = pair_batch(pairs=4), [policy(), policy()]
    calls = [calls_of(base) for base in policies]
    barrier, given = threading.Barrier(2, timeout=60), [torch.empty(0)] * 2

    def gather(rank: int) -> Callable[[Tensor], Tensor]:
        def joined(tensor: Tensor) -> Tensor:
            given[rank] = tensor
            barrier.wait()
            both = torch.cat(given)
            barrier.wait()
            return both

        return joined

    ranks = [RememberedReference(base, gather(i), rows=4, variants=1) for i, base in enumerate(policies)]

    def both(steps: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[int]:
        """Let each rank see its pairs, step by step; return how often their UNets ran by then."""

        def one(rank: int) -> None:
            for step in steps:
                ranks[rank].known_errors(again(batch, *step[rank]))
                ranks[rank].end_step()

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(one, range(2)))
        return [len(found) for found in calls]

    assert both([((0,), (1,))]) == [1, 1]
    assert both([((1,), (0,))]) == [1, 1]
    # One knows its pair, the other does not: they still gather equally much.
    assert both([((0,), (2,)), ((2,), (3,)), ((3,), (1,))]) == [1, 3]
    states = [reference.state_dict() for reference in ranks]
    assert differences(*states) == []
    assert bool(states[0]["errors"].isfinite().all())
