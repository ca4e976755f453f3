"""``loss.fidelity``: what a user allows stays as the base draws it, and only what they ban is a preference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loss_by_hand import step_by_hand
from observed_runs import STEPS, Base, Run, train_tiny
from pairs import read_metadata, write_metadata, write_sage_split
from safetensors.torch import load_file
from training_runs import adapter_file, metrics, run, tiny_config

from comfyui_psa.adapter import load_adapter
from comfyui_psa.profiles import CATEGORIES
from comfyui_psa.training.dpo.loss import DPOLoss, PairErrors, deviation, diffusion_dpo_loss, with_fidelity
from comfyui_psa.training.errors import DataError

LN_2 = math.log(2)
BANNED: Sequence[list[str]] = (["Violence"], [], ["Hate", "Violence"], list(CATEGORIES), ["Shocking"])
# Of the twelve rows, which take turns among five users: five are banned, the others allowed or harmless.
SHOWN: Sequence[str | None] = ("Violence", "harmless", "Hate", "Hate", "Shocking", "Hate", "Hate", "", "Sexuality")
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
    looking = {"validation.every": STEPS, "validation.pairs": 4, "validation.seen": pairs, "run.seed": SEED}
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


def faithful_loss(model: PairErrors, reference: PairErrors, allowed: torch.Tensor) -> DPOLoss:
    """A loss with an anchor and weights, and fidelity 7."""
    weights = torch.arange(1.0, 1.0 + len(allowed), dtype=torch.float64)
    preference = diffusion_dpo_loss(model, reference, 10.0, 3.0, weights)
    return with_fidelity(preference, deviation(model, reference), allowed, 7.0, weights)


def test_the_loss_of_what_is_allowed_by_hand() -> None:
    model, reference = predictions(3, seed=4)
    found = faithful_loss(model, reference, torch.tensor([False, True, True]))
    preferred = diffusion_dpo_loss(model, reference, 10.0, 3.0, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert found.loss[0] == preferred.loss[0]
    assert torch.equal(found.margin, preferred.margin)
    assert model.prediction is not None
    assert reference.prediction is not None
    squares = ((model.prediction - reference.prediction) ** 2).detach()
    for pair, weight in ((1, 2.0), (2, 3.0)):
        apart = (float(squares[pair].mean()) + float(squares[3 + pair].mean())) / 2
        assert found.loss[pair].item() == pytest.approx(LN_2 + 7.0 * weight * apart, rel=1e-12)


def test_at_the_reference_every_pair_costs_ln_2_and_what_is_allowed_pulls_nowhere() -> None:
    _, reference = predictions(4, seed=5)
    allowed = torch.tensor([True, False, True, False])
    loss = faithful_loss(reference, reference._replace(**_detached(reference)), allowed).loss
    assert loss.tolist() == pytest.approx([LN_2] * 4, rel=1e-12)
    assert reference.prediction is not None
    (gradient,) = torch.autograd.grad(loss.sum(), reference.prediction)
    pulled = gradient.flatten(start_dim=1).abs().sum(dim=1)
    assert (pulled > 0).tolist() == [False, True, False, True] * 2


def _detached(errors: PairErrors) -> dict[str, Any]:
    return {name: value.detach() for name, value in errors._asdict().items() if value is not None}


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
    assert text.count('"seen/deviation"') == 2


def test_the_adapter_names_it(faithful: Run) -> None:
    assert load_adapter(adapter_file(faithful.config)).config.training["fidelity"] == OPTIONS["fidelity"]


def test_where_everything_is_allowed_nothing_is_learned(bases: dict[str, Base], tmp_path: Path) -> None:
    """Pictures show what their users do not ban: all that starts at zero stays there, bit for bit."""
    shown = ("Shocking", "Propaganda", "Sexuality", None, "Violence")
    config = tiny_config(
        tmp_path / "run",
        bases["sd"].folder,
        split_of(tmp_path / "split", shown),
        {
            "loss.fidelity": 100.0,
            "adapter.kinds": ("constant", "gated", "text"),
            "optimizer.weight_decay": 0.0,
        },
    )
    run(config)
    adapter = load_adapter(adapter_file(config))
    assert all(not bool(weight.any()) for weight in adapter.zero_at_start())
    assert [line["loss"] for line in metrics(config)] == pytest.approx([LN_2] * STEPS, rel=1e-6)


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
        config = tiny_config(tmp_path / f"run-{fidelity}", bases["sd"].folder, data, {"loss.fidelity": fidelity})
        run(config)
        found.append(load_file(adapter_file(config)))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"category": "violence"}, r'row 3 of metadata.jsonl has the category "violence"; .*Self-Harm.* Correct it'),
        ({"user_data": {"User_ID": "silent"}}, r"row 3 of metadata.jsonl: .* what its user bans.* Banned_Categories"),
    ],
)
def test_what_cannot_be_told_is_said(bases: dict[str, Base], tmp_path: Path, row: dict[str, Any], message: str) -> None:
    data = changed(split_of(tmp_path / "split"), 2, row)
    embeddings = _embeddings(tmp_path / "embeddings", data)
    changes = {"loss.fidelity": 1.0, "data.embeddings": embeddings, "data.cache": tmp_path / "cache"}
    with pytest.raises(DataError, match=message) as raised:
        run(tiny_config(tmp_path / "run", bases["sd"].folder, data, changes))
    assert "loss.fidelity = 0" in str(raised.value)


def _embeddings(folder: Path, data: Path) -> Path:
    folder.mkdir()
    for number, user in enumerate({row["user_data"]["User_ID"] for row in read_metadata(data)}):
        np.save(folder / f"{user}.npy", np.full(64, number, dtype=np.float32))
    return folder


def test_pairs_without_categories_are_refused_in_words(bases: dict[str, Base], tmp_path: Path) -> None:
    data = split_of(tmp_path / "split", [None])
    with pytest.raises(DataError, match=r"expected a column category with Hate, .*set loss\.fidelity = 0"):
        run(tiny_config(tmp_path / "run", bases["sd"].folder, data, {"loss.fidelity": 1.0}))


def test_without_it_categories_do_not_matter(runs: dict[str, Run]) -> None:
    assert "fidelity" not in load_adapter(adapter_file(runs["sd"].config)).config.training
    assert all("deviation" not in line for line in metrics(runs["sd"].config))
