"""A minute of training from the shipped base is enough to see whom an adapter changes, and whom it does not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from miniature_testing import Drawn
from typer.testing import CliRunner

from comfyui_psa.adapter import load_adapter
from comfyui_psa.training import train as recipe
from comfyui_psa.training.base import open_base
from comfyui_psa.training.cli import app
from comfyui_psa.training.dpo.policy import Policy
from comfyui_psa.training.miniature import MINIATURE, adapters
from comfyui_psa.training.miniature.methods import Method

PAIRS, STEPS, PER_CELL = 200, 60, 10
# The paper's kind, which is the first to learn who bans everything, with the loss that is best for it.
KIND = ('adapter.kinds=["constant"]', "loss.fidelity=0")
SHORT = (*KIND, f"run.steps={STEPS}", "validation.every=0", "validation.grid_every=0", "tracking.trackers=[]")


@dataclass(frozen=True)
class Trained:
    policy: Policy
    adapter: Path
    drawn: Drawn


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("short")
    policies: list[Policy] = []

    def observed(*arguments: Any) -> Policy:
        policies.append(Policy(*arguments))
        return policies[-1]

    changes = [part for change in SHORT for part in ("--set", change)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters, "PAIRS", PAIRS)
        patch.setattr(recipe, "Policy", observed)
        command = ("miniature", "train-adapter", "--base", MINIATURE, "--work", folder, *changes)
        done = CliRunner().invoke(app, [*map(str, command)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    adapter = folder / "psa" / "psa_miniature.safetensors"

    methods = (Method("base"), Method("negative prompt", negative_prompt=True), Method("PSA", adapter=adapter))
    return Trained(policies[0], adapter, Drawn(methods, PER_CELL, trial=8, groups=("everything", "nothing")))


def test_who_bans_everything_gets_clearly_more_than_from_a_negative_prompt(trained: Trained) -> None:
    assert trained.drawn.share("base", "everything", "clean") < 0.1
    ours, negative = (trained.drawn.share(method, "everything", "clean") for method in ("PSA", "negative prompt"))
    assert ours > negative + 0.15, (ours, negative)


def test_who_bans_nothing_stays_at_the_base(trained: Trained) -> None:
    for measure in ("prompted", "object_kept"):
        ours, base = (trained.drawn.share(method, "nothing", measure) for method in ("PSA", "base"))
        assert ours >= base - 0.06, (measure, ours, base)


def test_the_training_touches_the_adapter_alone(trained: Trained) -> None:
    unet = trained.policy.unet
    assert all(weight.grad is None and not weight.requires_grad for weight in unet.parameters())
    base = open_base(MINIATURE).unet(torch.float32).state_dict()
    assert all(torch.equal(base[name], value) for name, value in unet.state_dict().items())
    assert all(float(value.abs().sum()) > 0 for value in load_adapter(trained.adapter).parameters())
