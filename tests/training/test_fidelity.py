"""``loss.fidelity``: what a user allows stays as the base draws it, and only what they ban is a preference."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import PartialState
from diffusers import DDPMScheduler
from loss_by_hand import step_by_hand
from observed_runs import STEPS, Base, Run, train_tiny
from pairs import read_metadata, write_metadata, write_sage_split
from safetensors.torch import load_file
from torch import Tensor
from training_runs import adapter_file, metrics, run, tiny_config
from training_testing import pair_batch, tiny_adapter, tiny_unet

from comfyui_psa.adapter import load_adapter
from comfyui_psa.profiles import CATEGORIES
from comfyui_psa.training.base import open_base
from comfyui_psa.training.config import LossSection
from comfyui_psa.training.data.cache import build_cache
from comfyui_psa.training.dpo.batches import Batches
from comfyui_psa.training.dpo.denoising import error_weights
from comfyui_psa.training.dpo.draws import Draws
from comfyui_psa.training.dpo.loss import DPOLoss, PairErrors, diffusion_dpo_loss, with_fidelity
from comfyui_psa.training.dpo.metrics import PairRecords, Unlogged
from comfyui_psa.training.dpo.policy import Policy
from comfyui_psa.training.dpo.trainable import TrainableAdapter
from comfyui_psa.training.errors import DataError, TrainingError

LN_2 = math.log(2)
BANNED: Sequence[list[str]] = (["Violence", "Hate"], ["Hate"], ["Hate"], list(CATEGORIES), ["Shocking", "Hate"])
# Of the twelve rows, which take turns among five users: one is unknown, three are allowed.
SHOWN: Sequence[str | None] = ("Violence", "harmless", "Hate", "hate", "Shocking", "Hate", "Hate", "", "Sexuality")
ALLOWED = (1, 9, 10)
SEED = 1084  # in steps 2 and 3 all four kinds of dropout come up
OPTIONS = {"fidelity": 30.0, "winner_anchor": 5.0, "timestep_weight_limit": 5.0, "noises_per_pair": 1}


def split_of(folder: Path, shown: Sequence[str | None] = SHOWN) -> Path:
    """A split whose rows show categories, with users who say what they ban."""
    write_sage_split(folder, rows=12, users=5, size=(64, 64))
    rows = read_metadata(folder)
    for number, row in enumerate(rows):
        row["category"] = shown[number % len(shown)]
        row["user_data"]["Banned_Categories"] = BANNED[number % len(BANNED)]
    write_metadata(folder, rows)
    return folder


def changed(folder: Path, row: int, changes: Mapping[str, Any]) -> Path:
    """The same split with one row changed."""
    rows = read_metadata(folder)
    rows[row] |= changes
    write_metadata(folder, rows)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split_of(tmp_path_factory.mktemp("pairs") / "split")


@pytest.fixture(scope="module")
def faithful(bases: dict[str, Base], pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with fidelity, beside other options; noises come again, and held-out pairs are looked at."""
    changes = {f"loss.{key}": value for key, value in OPTIONS.items()}
    looking = {"validation.every": STEPS, "validation.pairs": 12, "validation.seen": pairs, "run.seed": SEED}
    looking |= {"validation.held_out": 0.0, "validation.unseen_users": 0.0}
    return train_tiny(bases["sd"], pairs, tmp_path_factory.mktemp("faithful"), changes | looking)


def predictions(count: int, seed: int) -> tuple[PairErrors, PairErrors]:
    """Model and reference: random predictions of a target of zeros."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(2):
        prediction = torch.randn((2 * count, 4, 3, 3), generator=generator, dtype=torch.float64).requires_grad_()
        chosen, rejected = prediction.square().mean(dim=(1, 2, 3)).chunk(2)
        found.append(PairErrors(chosen, rejected, None, prediction))
    return found[0], found[1]


def faithful_loss(model: PairErrors, reference: PairErrors, allowed: Tensor) -> DPOLoss:
    """A loss with an anchor and weights, and fidelity 7."""
    weights = torch.arange(1.0, 1.0 + len(allowed), dtype=torch.float64)
    preference = diffusion_dpo_loss(model, reference, 10.0, 3.0, weights)
    return with_fidelity(preference, model, reference, allowed, 7.0, weights)


def test_the_loss_of_what_is_allowed_by_hand() -> None:
    model, reference = predictions(3, seed=4)
    found = faithful_loss(model, reference, torch.tensor([False, True, True]))
    preferred = diffusion_dpo_loss(model, reference, 10.0, 3.0, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert found.loss[0] == preferred.loss[0]
    assert torch.equal(found.margin, preferred.margin)
    assert model.prediction is not None
    assert reference.prediction is not None
    assert found.deviation is not None
    squares = ((model.prediction - reference.prediction) ** 2).detach()
    for pair, weight in ((1, 2.0), (2, 3.0)):
        apart = (squares[pair].mean().item() + squares[3 + pair].mean().item()) / 2
        assert found.deviation[pair].item() == pytest.approx(apart, rel=1e-12)
        assert found.loss[pair].item() == pytest.approx(7.0 * weight * apart, rel=1e-12)


def test_at_the_reference_what_is_allowed_costs_nothing_and_pulls_nowhere() -> None:
    model, _ = predictions(4, seed=5)
    reference = PairErrors(*(None if value is None else value.detach() for value in model))
    loss = faithful_loss(model, reference, torch.tensor([True, False, True, False])).loss
    assert loss.tolist() == pytest.approx([0, LN_2, 0, LN_2], rel=1e-12)
    assert model.prediction is not None
    (gradient,) = torch.autograd.grad(loss.sum(), model.prediction)
    pulled = gradient.flatten(start_dim=1).abs().sum(dim=1)
    assert (pulled > 0).tolist() == [False, True, False, True] * 2


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_an_adapter_is_held_to_what_the_unet_says_without_it(kind: str) -> None:
    """Beside the safeguard."""
    unet = tiny_unet()
    policy = Policy(unet, DDPMScheduler(prediction_type=kind), tiny_adapter(unet, trained=True))
    effects = TrainableAdapter(tiny_adapter(unet, trained=True))
    said: list[Tensor] = []
    hook = unet.register_forward_hook(lambda _unet, _args, output: said.append(output.sample.detach()))
    batch = replace(pair_batch(pairs=3), allowed=torch.tensor([True, False, True]))
    section = LossSection(beta=100, fidelity=7, timestep_weight_limit=5, safeguard=0.0)
    reference = policy.reference_errors(batch)
    with policy.errors(effects, batch) as model:
        loss = policy.loss(model, reference, batch, section).loss
    without, with_adapter = said
    weights = error_weights(policy.scheduler, batch.timesteps, 5)
    apart = (with_adapter - without).square().mean(dim=(1, 2, 3))
    assert isinstance(weights, Tensor)
    for pair in (0, 2):
        expected = 7 * float(weights[pair]) * float(apart[pair] + apart[3 + pair]) / 2
        assert loss[pair].item() == pytest.approx(expected, rel=1e-5)
    hook.remove()


def test_where_everything_is_allowed_nothing_pulls() -> None:
    """At its start, exactly."""
    unet = tiny_unet()
    adapter = tiny_adapter(unet)
    policy, effects = Policy(unet, DDPMScheduler(), adapter), TrainableAdapter(adapter)
    batch = replace(pair_batch(pairs=3), allowed=torch.ones(3, dtype=torch.bool))
    reference = policy.reference_errors(batch)
    with policy.errors(effects, batch) as model:
        policy.loss(model, reference, batch, LossSection(winner_anchor=5, fidelity=7)).loss.sum().backward()
    gradients = [weight.grad for weight in adapter.parameters() if weight.grad is not None]
    assert gradients
    assert not any(bool(gradient.any()) for gradient in gradients)


def test_a_run_has_the_loss_of_the_pipelines_own_parts(faithful: Run, pairs: Path) -> None:
    lines = metrics(faithful.config)
    assert lines[0]["loss"] == pytest.approx(LN_2, rel=1e-6)
    assert lines[0]["deviation"] == 0
    for step in (2, 3):
        expected = step_by_hand(faithful, pairs, step)
        assert abs(expected.loss - LN_2) > 5e-3
        assert expected.deviation > 1e-4
        assert abs(expected.anchor) > 1e-4
        for name in ("loss", "deviation", "anchor"):
            assert lines[step - 1][name] == pytest.approx(getattr(expected, name), rel=2e-3, abs=1e-6)


def test_held_out_pairs_are_kept_as_well(faithful: Run) -> None:
    text = (faithful.config.run.output / "metrics.jsonl").read_text(encoding="utf-8")
    looked = [line["seen/deviation"] for line in map(json.loads, text.splitlines()) if "seen/loss" in line]
    assert len(looked) == 2
    assert looked[0] == 0 < looked[1]


def test_the_adapter_and_the_report_name_it(faithful: Run) -> None:
    assert load_adapter(adapter_file(faithful.config)).config.training["fidelity"] == OPTIONS["fidelity"]
    assert "deviation" in faithful.said


def test_nothing_to_prefer_is_said(bases: dict[str, Base], tmp_path: Path) -> None:
    data = split_of(tmp_path / "split", ["harmless"])
    with pytest.raises(DataError, match=r"nothing to learn .* all 12 .* are allowed.* loss\.fidelity = 0"):
        run(tiny_config(tmp_path / "run", bases["sd"].folder, data, {"loss.fidelity": 1.0}))


def test_rows_that_are_left_out_shift_nothing(bases: dict[str, Base], pairs: Path, tmp_path: Path) -> None:
    """What is allowed belongs to rows of the source, and the third of them is broken."""
    shutil.copytree(pairs, tmp_path / "split")
    (tmp_path / "split" / read_metadata(pairs)[2]["chosen"]).write_bytes(b"broken")
    changes = {"loss.fidelity": 1.0, "data.max_skipped": 1}
    config = tiny_config(tmp_path / "run", bases["sd"].folder, tmp_path / "split", changes)
    base = open_base(config.model.base)
    cached = build_cache(config, config.data.train, base, (), {}, PartialState())
    found = {cached.source_rows[i]: cached.row(i).allowed for i in range(len(cached))}
    assert found == {row: row in ALLOWED for row in range(12) if row != 2}


def test_a_resumed_run_has_to_agree_on_what_is_allowed(faithful: Run, pairs: Path, tmp_path: Path) -> None:
    shutil.copytree(faithful.config.run.output, tmp_path / "run")
    shutil.copytree(pairs, tmp_path / "split")
    rows = read_metadata(pairs)
    rows[0]["category"] = "harmless"
    write_metadata(tmp_path / "split", rows)
    config = faithful.config
    data = config.data.model_copy(update={"train": tmp_path / "split"})
    state = tmp_path / "run" / "checkpoints" / f"step-{STEPS:06d}" / "state.json"
    state.write_text(state.read_text().replace(str(pairs), str(tmp_path / "split")), encoding="utf-8")
    again = config.run.model_copy(update={"output": tmp_path / "run", "resume": "latest", "steps": STEPS + 1})
    validation = config.validation.model_copy(update={"seen": tmp_path / "split"})
    with pytest.raises(TrainingError, match="other categories or bans than"):
        run(config.model_copy(update={"data": data, "run": again, "validation": validation}))


@pytest.mark.parametrize("fidelity", [0.0, 60.0])
def test_it_may_count_more_or_less_later_but_not_begin_or_end_midway(
    faithful: Run, tmp_path: Path, fidelity: float
) -> None:
    shutil.copytree(faithful.config.run.output, tmp_path / "run")
    config = faithful.config
    again = config.run.model_copy(update={"output": tmp_path / "run", "resume": "latest", "steps": STEPS + 1})
    changed_loss = config.loss.model_copy(update={"fidelity": fidelity})
    resumed = config.model_copy(update={"loss": changed_loss, "run": again})
    if fidelity:
        run(resumed)
        return
    with pytest.raises(TrainingError, match=r"made with loss\.fidelity = 30\.0, but the configuration says 0"):
        run(resumed)


def test_an_interrupted_run_ends_with_the_same_bits(faithful: Run, tmp_path: Path) -> None:
    shutil.copytree(faithful.config.run.output, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("step-00000[23]"):
        shutil.rmtree(path)
    whole = load_file(adapter_file(faithful.config))
    (tmp_path / "run" / adapter_file(faithful.config).name).unlink()
    again = faithful.config.run.model_copy(update={"output": tmp_path / "run", "resume": "latest"})
    config = faithful.config.model_copy(update={"run": again})
    run(config)
    resumed = load_file(adapter_file(config))
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_steps_without_a_preference_are_logged_as_what_they_are(bases: dict[str, Base], tmp_path: Path) -> None:
    """One pair a step, and only the first of twelve is banned."""
    data = split_of(tmp_path / "split", ["Violence", *["harmless"] * 11])
    changes = {"loss.fidelity": 5.0, "loss.winner_anchor": 2.0, "loss.user_dropout": 0.0, "run.steps": 12}
    changes |= {"run.batch_size": 1, "run.accumulation": 1}
    config = tiny_config(tmp_path / "run", bases["sd"].folder, data, changes)
    said = run(config, report=True)
    lines = [json.loads(line) for line in (config.run.output / "metrics.jsonl").read_text().splitlines()]
    assert sorted("loss" in line for line in lines) == [False] * 11 + [True]
    assert all(("deviation" in line) != ("loss" in line) == ("anchor" in line) for line in lines)
    assert len([line for line in said.splitlines() if line.startswith("step ") and "deviation" in line]) == 11
    report = (config.run.output / "training_report.md").read_text(encoding="utf-8")
    assert "| preferences among them | 1 |" in report
    with PIL.Image.open(config.run.output / "report" / "loss.png") as picture:
        assert picture.width < 3 * picture.height  # five plots in two rows


def test_the_null_user_allows_everything(bases: dict[str, Base], pairs: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", bases["sd"].folder, pairs, {"loss.fidelity": 1.0})
    cached = build_cache(config, pairs, open_base(config.model.base), (), {}, PartialState())
    for dropout, expected in ((1.0, set(range(12))), (0.0, set(ALLOWED))):
        draws = Draws(seed=1, timesteps=1000, prompt_dropout=0.0, user_dropout=dropout, noise_offset=0.0)
        batch = Batches(cached, range(12), draws, 64).training(0, 12)
        assert batch.allowed is not None
        assert {row for row, allowed in zip(batch.rows, batch.allowed.tolist(), strict=True) if allowed} == expected


def test_records_of_an_earlier_version_are_of_preferences() -> None:
    noted, table = Unlogged(), torch.rand(3, len(PairRecords._fields) - 2)
    noted.load_state_dict({"tables": [table]})
    found = noted.take()
    assert torch.equal(found[:, :-2], table)
    preferences, kept = PairRecords.split(found)
    assert (len(preferences.row), len(kept.row)) == (3, 0)


def test_other_pairs_train_as_without_it(bases: dict[str, Base], tmp_path: Path) -> None:
    """Everything banned: the same weights with fidelity as without."""
    data = split_of(tmp_path / "split")
    write_metadata(
        data,
        [
            row | {"category": "Hate", "user_data": row["user_data"] | {"Banned_Categories": ["Hate"]}}
            for row in read_metadata(data)
        ],
    )
    found = []
    for fidelity in (0.0, 50.0):
        changes = {"loss.fidelity": fidelity, "loss.user_dropout": 0.0}  # the null user would allow all
        config = tiny_config(tmp_path / f"run-{fidelity}", bases["sd"].folder, data, changes)
        run(config)
        found.append(load_file(adapter_file(config)))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ({}, r"row 3 of metadata.jsonl: .* what its user bans. Add Banned_Categories .* loss\.fidelity = 0"),
        ({"Banned_Categories": ""}, r"row 3 of metadata.jsonl: .* what its user bans"),
        ({"Banned_Categories": "Hate, wexlemind"}, r"row 3 .*Banned_Categories should be a list"),
    ],
)
def test_a_user_whose_bans_are_not_said_is_refused_before_anything_is_computed(
    bases: dict[str, Base], tmp_path: Path, user: dict[str, Any], message: str
) -> None:
    """Rules do not guess them, and the error says nothing of anyone; embeddings of others do not help."""
    marked = {"User_ID": "qanzibel", "Mental_Condition": "depression", **user}
    data = changed(split_of(tmp_path / "split"), 2, {"user_data": marked})
    embeddings = _embeddings(tmp_path / "embeddings", data)
    changes = {"loss.fidelity": 1.0, "data.embeddings": embeddings, "data.cache": tmp_path / "cache"}
    with pytest.raises(DataError, match=message) as raised:
        run(tiny_config(tmp_path / "run", bases["sd"].folder, data, changes))
    assert not any(word in str(raised.value) for word in ("depression", "qanzibel", "wexlemind"))
    assert [path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir()] == ["pairs"]


def _embeddings(folder: Path, data: Path) -> Path:
    folder.mkdir()
    for number, user in enumerate({row["user_data"]["User_ID"] for row in read_metadata(data)}):
        np.save(folder / f"{user}.npy", np.full(64, number, dtype=np.float32))
    return folder


def test_pairs_without_categories_are_refused_in_words(bases: dict[str, Base], tmp_path: Path) -> None:
    data = split_of(tmp_path / "split", [None, "politics"])
    with pytest.raises(DataError, match=r"split does not say .* column category with Hate, .*set loss\.fidelity = 0"):
        run(tiny_config(tmp_path / "run", bases["sd"].folder, data, {"loss.fidelity": 1.0}))


def test_without_it_categories_do_not_matter(runs: dict[str, Run]) -> None:
    assert "fidelity" not in load_adapter(adapter_file(runs["sd"].config)).config.training
    assert all("deviation" not in line for line in metrics(runs["sd"].config))
