"""What may be added to the paper's loss: the anchor, weights of timesteps, a smallest timestep, final values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from loss_by_hand import step_by_hand
from observed_runs import STEPS, Base, Run, train_tiny
from training_runs import adapter_file, metrics, tiny_config

from comfyui_psa.adapter import load_adapter
from comfyui_psa.training.config import LossSection, TrainConfig
from comfyui_psa.training.dpo.denoising import error_weights
from comfyui_psa.training.dpo.loss import PairErrors, diffusion_dpo_loss, safeguarded
from comfyui_psa.training.errors import TrainingError
from comfyui_psa.training.train import dry_run

LN_2 = math.log(2)
OPTIONS = {
    "winner_anchor": 5.0,
    "min_timestep": 300,
    "final_beta": 40.0,
    "final_winner_anchor": 2.0,
    "switch_at": 0.6,  # of three steps: the third has the final values
    "noises_per_pair": 2,
}
# In steps 2 and 3 some errors weigh less than the limit and some as much; all four kinds of dropout come up.
LIMITS = {"sd": 5.0, "v": 0.7}
SEED = 1084


@pytest.fixture(scope="module")
def optional(bases: dict[str, Base], split: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run of each kind of prediction with all options; ``sd`` also looks at held-out pairs."""
    output = tmp_path_factory.mktemp("options")
    looking = {"validation.every": STEPS, "validation.pairs": 1, "validation.seen": split.with_name("seen")}
    looking |= {"validation.held_out": 0.0, "validation.unseen_users": 0.0}
    found = {}
    for name, limit in LIMITS.items():
        loss = {f"loss.{key}": value for key, value in {**OPTIONS, "timestep_weight_limit": limit}.items()}
        changes = {**loss, "run.seed": SEED, **(looking if name == "sd" else {})}
        found[name] = train_tiny(bases[name], split, output / name, changes)
    return found


def test_the_loss_with_all_terms_by_hand() -> None:
    beta, anchor = 500.0, 7.0
    pairs = [  # chosen, rejected; the same of the reference; weight
        (0.31, 0.29, 0.3105, 0.2889, 0.4),
        (0.30, 0.35, 0.2990, 0.3504, 5.0),
    ]
    expected = []
    for chosen, rejected, chosen_reference, rejected_reference, weight in pairs:
        difference = weight * (chosen - chosen_reference) - weight * (rejected - rejected_reference)
        first = math.log(1 + math.exp(beta / 2 * difference))
        expected.append(first + anchor * (weight * chosen - weight * chosen_reference))
    columns = torch.tensor(pairs, dtype=torch.float64).unbind(dim=1)
    model, reference = PairErrors(*columns[:2]), PairErrors(*columns[2:4])
    found = diffusion_dpo_loss(model, reference, beta, anchor, columns[4])
    assert found.loss.tolist() == pytest.approx(expected, rel=1e-12)

    plain = diffusion_dpo_loss(model, reference, beta)
    assert torch.equal(found.margin, plain.margin)
    assert torch.equal(found.accuracy, plain.accuracy)
    assert not torch.allclose(found.loss, plain.loss)


class SharedPrediction:
    """A model that predicts one vector, and an offset of its own, for either image of a pair."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._offsets, self._targets = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64)
        self._vector = torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_()

    def errors(self) -> PairErrors:
        residuals = self._vector + self._offsets - self._targets
        return PairErrors(*residuals.square().mean(dim=1)[:, None], residuals.detach().prod(dim=0).mean()[None])

    def worse_by(self, errors: PairErrors) -> float:
        """How the chosen image's error changes, to first order, along the step that lowers the loss."""
        loss = diffusion_dpo_loss(errors, PairErrors(torch.ones(1), torch.ones(1)), 1.0).loss
        (step,) = torch.autograd.grad(-loss.sum(), self._vector)
        (gradient,) = torch.autograd.grad(self.errors().chosen.sum(), self._vector)
        return float(step @ gradient)


@pytest.mark.parametrize("slack", [0.0, 0.3])
def test_the_safeguard_keeps_a_step_from_making_the_chosen_image_worse(slack: float) -> None:
    harmed, spared = 0, 0
    for seed in range(40):
        model = SharedPrediction(seed)
        plain, safe = model.errors(), safeguarded(model.errors(), slack)
        assert torch.equal(safe.chosen, plain.chosen)
        assert torch.equal(safe.rejected, plain.rejected)
        before, after = model.worse_by(plain), model.worse_by(safe)
        assert after < 1e-12
        assert after <= before + 1e-12
        harmed += before > 0
        spared += after == before  # nothing is taken where nothing is in danger
    assert harmed > 3
    assert spared > 3


def test_at_the_start_all_terms_give_ln_2() -> None:
    errors = PairErrors(torch.rand(6), torch.rand(6))
    loss = diffusion_dpo_loss(errors, errors, 5000.0, 50.0, 50 * torch.rand(6)).loss
    assert torch.equal(loss, torch.full_like(loss, LN_2))


def test_the_anchor_pulls_at_the_chosen_image_alone() -> None:
    model = PairErrors(torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True))
    reference = PairErrors(torch.rand(3), torch.rand(3))
    gradients = []
    for anchor in (0.0, 7.0):
        loss = diffusion_dpo_loss(model, reference, 10.0, anchor).loss.sum()
        gradients.append(torch.autograd.grad(loss, model[:2]))
    (chosen, rejected), (anchored, same) = gradients
    assert torch.allclose(anchored - chosen, torch.full((3,), 7.0))
    assert torch.equal(same, rejected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_weights_turn_errors_into_those_of_the_picture(kind: str) -> None:
    """With diffusers' own step to the picture: that of a wrong prediction against that of the right one."""
    scheduler = DDPMScheduler(prediction_type=kind, clip_sample=False)
    generator = torch.Generator().manual_seed(1)
    noisy, right, wrong = (torch.randn((1, 4, 8, 8), generator=generator, dtype=torch.float64) for _ in range(3))
    for timestep in (3, 250, 500, 750, 990):
        pictures = [scheduler.step(said, timestep, noisy).pred_original_sample for said in (right, wrong)]
        in_picture = (pictures[1] - pictures[0]).square().mean()
        in_prediction = (wrong - right).square().mean()
        weight = error_weights(scheduler, torch.tensor([timestep]), limit=1e9)
        assert float(weight * in_prediction) == pytest.approx(float(in_picture), rel=1e-4)
        limited = error_weights(scheduler, torch.tensor([timestep]), limit=0.2)
        assert float(limited) == pytest.approx(min(float(weight), 0.2), rel=1e-6)


def test_weights_are_finite_where_nothing_of_the_picture_is_left() -> None:
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    assert float(scheduler.alphas_cumprod[-1]) < 1e-6
    assert error_weights(scheduler, torch.tensor([999]), limit=50.0).tolist() == [50.0]


@pytest.mark.parametrize("name", LIMITS)
def test_a_run_with_all_options_has_the_loss_of_the_pipelines_own_parts(
    optional: dict[str, Run], split: Path, name: str
) -> None:
    """Before and after the switch, from the images on."""
    lines = metrics(optional[name].config)
    assert lines[0]["loss"] == pytest.approx(LN_2, rel=1e-6)
    assert lines[0]["anchor"] == 0
    for step in (2, 3):
        expected = step_by_hand(optional[name], split, step)
        assert abs(expected.loss - LN_2) > 5e-3
        assert abs(expected.anchor) > 1e-4
        assert lines[step - 1]["loss"] == pytest.approx(expected.loss, rel=1e-3)
        assert lines[step - 1]["anchor"] == pytest.approx(expected.anchor, rel=2e-3, abs=1e-6)


def test_held_out_pairs_are_looked_at_where_timesteps_are_trained(optional: dict[str, Run]) -> None:
    """From 300 on, the middles are 387, 562, 737 and 912: none in the first quarter, two in the third."""
    lines = (optional["sd"].config.run.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    looked = [line for line in map(json.loads, lines) if "seen/loss" in line]
    assert [line["step"] for line in looked] == [0, STEPS]
    assert looked[0]["seen/loss"] == pytest.approx(LN_2, rel=1e-6)
    quarters = {name[-1] for name in looked[1] if name.startswith("seen/chosen_error/")}
    assert quarters == {"2", "3", "4"}


def test_the_adapter_names_what_was_on(optional: dict[str, Run]) -> None:
    for name, limit in LIMITS.items():
        history = load_adapter(adapter_file(optional[name].config)).config.training
        expected = {**OPTIONS, "timestep_weight_limit": limit}
        assert {key: history[key] for key in expected} == expected


@pytest.mark.parametrize("final", [{"final_beta": 100.0}, {"final_winner_anchor": 0.0}])
def test_final_values_count_from_the_share_of_the_run_on(final: dict[str, float]) -> None:
    section = LossSection.model_validate({"beta": 500.0, "winner_anchor": 50.0, "switch_at": 0.55, **final})
    late = section.model_copy(update={name.removeprefix("final_"): value for name, value in final.items()})
    found = [section.at(step, 100) for step in range(100)]
    assert found == [section] * 55 + [late] * 45
    assert found[60].beta == final.get("final_beta", 500.0)
    assert found[60].winner_anchor == final.get("final_winner_anchor", 50.0)


def test_without_final_values_nothing_changes() -> None:
    section = LossSection(winner_anchor=3.0)
    assert [section.at(step, 10) for step in range(10)] == [section] * 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"winner_anchor": -1.0}, "winner_anchor"),
        ({"timestep_weight_limit": -1.0}, "timestep_weight_limit"),
        ({"final_beta": 0.0}, "final_beta"),
        ({"noises_per_pair": -1}, "noises_per_pair"),
        ({"final_beta": 1.0, "switch_at": 1.1}, "switch_at"),
        ({"switch_at": 0.5}, "neither is given: add one of them, or leave switch_at out"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSection.model_validate(changes)


def test_all_options_are_off_by_default(runs: dict[str, Run]) -> None:
    history = load_adapter(adapter_file(runs["v"].config)).config.training
    assert history.keys().isdisjoint({*OPTIONS, "timestep_weight_limit"})
    assert all("anchor" not in line for line in metrics(runs["v"].config))


@pytest.mark.parametrize("smallest", [1000, 1500])
def test_a_smallest_timestep_that_leaves_none_is_refused_before_anything_starts(
    bases: dict[str, Base], split: Path, tmp_path: Path, smallest: int
) -> None:
    def with_smallest(timestep: int) -> TrainConfig:
        return tiny_config(tmp_path / "run", bases["sd"].folder, split, {"loss.min_timestep": timestep})

    with pytest.raises(TrainingError, match=f"loss.min_timestep = {smallest} .* the timesteps 0 to 999. Choose"):
        dry_run(with_smallest(smallest))
    assert dry_run(with_smallest(999)).steps == STEPS
