"""An interrupted run that goes on is the uninterrupted run, bit by bit; what cannot go on says why."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_runs import (
    Workplace,
    adapter_weights,
    assert_same_end,
    differences,
    folder_bytes,
    full_state,
    interrupt,
    kill,
    resumed,
    steps_kept,
    terminate,
)
from safetensors.torch import load_file, save_file
from training_runs import adapter_file, checkpoint, run

from comfyui_psa.adapter import load_adapter
from comfyui_psa.training.config import TrainConfig
from comfyui_psa.training.dpo.metrics import read_metrics
from comfyui_psa.training.errors import TrainingError

VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {
        "optimizer__betas": (0.9, 0.999),
        "optimizer__schedule": "constant_with_warmup",
        "optimizer__warmup_steps": 4,
    },
    "accumulation, cosine, moving average": {
        "run__accumulation": 2,
        "optimizer__betas": (0.9, 0.999),
        "optimizer__schedule": "cosine",
        "optimizer__warmup_steps": 1,
        "optimizer__ema_decay": 0.9,
    },
    "adafactor": {
        "optimizer__kind": "adafactor",
        "optimizer__betas": (0.9, 0.999),
        "optimizer__schedule": "linear",
        "optimizer__warmup_steps": 2,
    },
}
LOOKING = {"validation__every": 2, "validation__pairs": 1, "validation__held_out": 0.1, "validation__unseen_users": 0.1}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace.write(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def uninterrupted(workplace: Workplace) -> Callable[[str], TrainConfig]:
    """The whole run of a variant, made once."""
    done: dict[str, TrainConfig] = {}

    def get(variant: str) -> TrainConfig:
        if variant not in done:
            config = workplace.config(workplace.folder / f"run{len(done)}", **VARIANTS[variant])
            run(config)
            done[variant] = config
        return done[variant]

    return get


@pytest.fixture
def begun(workplace: Workplace, uninterrupted: Callable[[str], TrainConfig], tmp_path: Path) -> TrainConfig:
    """A copy of a run that was killed after its third step: there is a checkpoint of the second."""
    whole = uninterrupted("adamw")
    config = workplace.config(tmp_path / "run", **VARIANTS["adamw"])
    shutil.copytree(whole.run.output, config.run.output)
    for step in (4, 5):
        shutil.rmtree(checkpoint(config, step))
    adapter_file(config).unlink()
    return config


def _refusal(config: TrainConfig) -> str:
    """Why a run does not start; it has touched nothing."""
    before = folder_bytes(config.run.output) if config.run.output.exists() else {}
    with pytest.raises(TrainingError) as caught:
        run(config)
    assert folder_bytes(config.run.output) == before
    return str(caught.value)


@pytest.mark.parametrize(("after", "act"), [(1, terminate), (3, kill)], ids=["stopped at 2", "killed in 4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_run_ends_as_the_uninterrupted_one(
    workplace: Workplace,
    uninterrupted: Callable[[str], TrainConfig],
    tmp_path: Path,
    variant: str,
    after: int,
    act: Callable[[], None],
) -> None:
    config = workplace.config(tmp_path / "run", **VARIANTS[variant])
    interrupt(config, after, act)
    assert steps_kept(config) == [2]
    assert not adapter_file(config).exists()
    run(resumed(config))
    assert_same_end(config, uninterrupted(variant))


def test_a_run_may_be_interrupted_at_every_step(
    workplace: Workplace, uninterrupted: Callable[[str], TrainConfig], tmp_path: Path
) -> None:
    variant = "accumulation, cosine, moving average"
    config = workplace.config(tmp_path / "run", **VARIANTS[variant] | {"run__checkpoint_every": 1})
    interrupt(config, 1, kill)
    for step in (2, 3):
        interrupt(resumed(config), step, kill)
    run(resumed(config))
    assert_same_end(config, uninterrupted(variant))


def test_every_step_moves_what_is_compared(uninterrupted: Callable[[str], TrainConfig]) -> None:
    config = uninterrupted("accumulation, cosine, moving average")
    states = [full_state(checkpoint(config, step)) for step in (2, 4, 5)]
    moved = set(states[0]["weights"]) - {"adapter.embedding_mean", "adapter.embedding_std"}
    for one, other in ((0, 1), (1, 2)):
        found = set(differences(states[one], states[other]))
        assert {f"/weights/{name}" for name in moved} <= found
        assert any(place.startswith("/optimizer.bin/state/0/exp_avg") for place in found)
        assert any(place.startswith("/parts.pt/schedule") for place in found)  # the schedule
        assert any(place.startswith("/parts.pt/ema/shadow_params") for place in found)


def test_the_metrics_name_each_step_once_with_the_same_values(workplace: Workplace, tmp_path: Path) -> None:
    whole = workplace.config(tmp_path / "whole", **LOOKING)
    run(whole)
    config = workplace.config(tmp_path / "run", **LOOKING)
    interrupt(config, 3, kill)  # the lines of step 3 are taken back
    interrupt(resumed(config), 3, terminate)
    run(resumed(config))
    found, expected = (
        [{name: value for name, value in line.items() if name != "pairs_per_second"} for line in read_metrics(output)]
        for output in (config.run.output, whole.run.output)
    )
    kinds = [(line["step"], "seen/loss" in line, "loss" in line) for line in found]
    trained = [(step, False, True) for step in range(1, 6)]
    looked = [(step, True, False) for step in (0, 2, 4, 5)]
    assert sorted(kinds) == sorted(trained + looked)
    assert found == expected


def test_steps_before_and_after_an_interruption_are_averaged_together(workplace: Workplace, tmp_path: Path) -> None:
    whole = workplace.config(tmp_path / "whole", tracking__every=2)
    run(whole)
    config = workplace.config(tmp_path / "run", tracking__every=2)
    interrupt(config, 2, terminate)  # after step 3, of which no line tells
    assert steps_kept(config) == [2, 3]
    run(resumed(config))
    found, expected = (
        [{**line, "pairs_per_second": 0} for line in read_metrics(output.run.output)] for output in (config, whole)
    )
    assert [line["step"] for line in found] == [2, 4, 5]  # the last step is always told of
    assert found == expected


def test_a_line_of_metrics_that_was_cut_off_is_taken_back(begun: TrainConfig) -> None:
    with (begun.run.output / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')
    run(resumed(begun))
    assert [line["step"] for line in read_metrics(begun.run.output)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("model__base", Path("other"), "model.base"),
        ("model__prediction_type", "v_prediction", "model.prediction_type"),
        ("data__train", Path("other"), "data.train"),
        ("data__embeddings", Path("other"), "data.embeddings"),
        ("data__encoder", {"kind": "llm", "name": "someone/else"}, "data.encoder.kind"),
        ("data__resolution", 40, "data.resolution"),
        ("data__flip", True, "data.flip"),
        ("adapter__standardise", False, "adapter.standardise"),
        ("validation__held_out", 0.5, "validation.held_out"),
        ("optimizer__kind", "adafactor", "optimizer.kind"),
        ("optimizer__learning_rate", 1e-3, "optimizer.learning_rate"),
        ("optimizer__ema_decay", 0.5, "optimizer.ema_decay"),
        ("run__seed", 1, "run.seed"),
    ],
)
def test_another_model_data_or_adapter_is_refused_by_name(
    workplace: Workplace, begun: TrainConfig, setting: str, value: object, named: str
) -> None:
    other = workplace.config(begun.run.output, **VARIANTS["adamw"] | {setting: value})
    message = _refusal(resumed(other))
    assert f"step-000002 was made with {named} = " in message
    assert f"but the configuration says {reduce(getattr, named.split('.'), other)}." in message


def test_changed_data_and_another_split_are_refused(workplace: Workplace, begun: TrainConfig, tmp_path: Path) -> None:
    held_out = workplace.config(tmp_path / "held out", **VARIANTS["adamw"] | LOOKING)
    interrupt(held_out, 2, terminate)
    not_looking = workplace.config(tmp_path / "held out", **VARIANTS["adamw"] | LOOKING | {"validation__every": 0})
    assert "was made with other pairs than" in _refusal(resumed(not_looking))

    copy = shutil.copytree(workplace.folder / "pairs", tmp_path / "pairs")
    config = workplace.config(tmp_path / "copied", **VARIANTS["adamw"] | {"data__train": copy})
    interrupt(config, 2, terminate)
    lines = (copy / "metadata.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for changed in (lines[:-1], [lines[0].replace('"caption": "', '"caption": "another '), *lines[1:]]):
        (copy / "metadata.jsonl").write_text("".join(changed), encoding="utf-8")
        assert changed != lines
        assert "was made with other pairs than" in _refusal(resumed(config))

    (copy / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    base = shutil.copytree(workplace.folder / "base", tmp_path / "base")
    moved = workplace.config(tmp_path / "moved", **VARIANTS["adamw"] | {"model__base": base, "data__train": copy})
    interrupt(moved, 2, terminate)
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: weight + 0.01 for name, weight in load_file(weights).items()}, weights)
    assert "was made with other weights of the base model than" in _refusal(resumed(moved))


class _Code:
    """A pickle that would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["parts.pt", "optimizer.bin", "random_states_0.pkl"])
def test_code_in_a_checkpoint_never_runs(begun: TrainConfig, tmp_path: Path, name: str) -> None:
    torch.save({"schedule": _Code(tmp_path / "ran")}, checkpoint(begun, 2) / name)
    with suppress(TrainingError):  # accelerate does without the random states
        run(resumed(begun, str(checkpoint(begun, 2))))
    assert not (tmp_path / "ran").exists()


def test_there_may_be_more_steps_after_a_resume_and_other_sizes_of_what_is_not_trained(
    workplace: Workplace, uninterrupted: Callable[[str], TrainConfig], tmp_path: Path
) -> None:
    config = workplace.config(tmp_path / "run", **VARIANTS["adamw"] | {"run__steps": 3})
    run(config)
    run(resumed(workplace.config(tmp_path / "run", **VARIANTS["adamw"] | {"adapter__gated": {"num_tokens": 2}})))
    weights = (adapter_weights(adapter_file(run)) for run in (config, uninterrupted("adamw")))
    assert differences(*weights) == []


def test_a_finished_run_that_goes_on_trains_no_further(begun: TrainConfig) -> None:
    config = begun.model_copy(update={"run": begun.run.model_copy(update={"steps": 2})})
    run(resumed(config))
    assert steps_kept(config) == [2]
    expected = adapter_weights(checkpoint(config, 2) / "adapter.safetensors")
    assert differences(adapter_weights(adapter_file(config)), expected) == []


def test_there_is_nothing_to_go_on_from(workplace: Workplace, tmp_path: Path) -> None:
    message = _refusal(resumed(workplace.config(tmp_path / "run")))
    assert f"no checkpoint in {tmp_path / 'run' / 'checkpoints'}" in message
    assert "Leave run.resume out" in message


def test_a_new_run_does_not_start_in_the_folder_of_another(begun: TrainConfig) -> None:
    message = _refusal(begun)
    assert f"{begun.run.output} already holds a run (step-000002)" in message
    assert "run.resume=latest" in message


def test_a_run_never_replaces_what_another_one_left(
    workplace: Workplace, uninterrupted: Callable[[str], TrainConfig], begun: TrainConfig, tmp_path: Path
) -> None:
    """Neither by going on from elsewhere into its folder, nor where its checkpoints were deleted for room."""
    before = folder_bytes(begun.run.output)
    elsewhere = str(checkpoint(uninterrupted("adamw"), 2))
    assert "already holds a run (step-000002)" in _refusal(resumed(begun, elsewhere))
    assert folder_bytes(begun.run.output) == before

    left = workplace.config(tmp_path / "left", **VARIANTS["adamw"])
    left.run.output.mkdir()
    adapter_file(left).write_bytes(b"an adapter of weeks")
    for config in (left, resumed(left, elsewhere)):
        assert "is there already, and this run would replace it" in _refusal(config)
    assert adapter_file(left).read_bytes() == b"an adapter of weeks"


def test_a_run_may_go_on_in_a_folder_of_its_own(
    workplace: Workplace, uninterrupted: Callable[[str], TrainConfig], tmp_path: Path
) -> None:
    moved = workplace.config(tmp_path / "moved", **VARIANTS["adamw"])
    run(resumed(moved, str(checkpoint(uninterrupted("adamw"), 2))))
    assert_same_end(moved, uninterrupted("adamw"))


def test_a_copy_of_a_checkpoint_under_another_name_is_nobodys_business(
    begun: TrainConfig, uninterrupted: Callable[[str], TrainConfig]
) -> None:
    copy = checkpoint(begun, 2).with_name("step-000002-keep")
    shutil.copytree(checkpoint(begun, 2), copy)
    kept = folder_bytes(copy)
    run(resumed(begun))
    assert_same_end(begun, uninterrupted("adamw"))
    assert folder_bytes(copy) == kept


def test_what_was_left_half_saved_is_no_checkpoint(
    begun: TrainConfig, uninterrupted: Callable[[str], TrainConfig]
) -> None:
    whole, latest = checkpoint(begun, 2), checkpoint(begun, 3)
    shutil.copytree(whole, latest)
    (latest / "state.json").unlink()
    partial = latest.with_name(".step-000003.partial")
    shutil.copytree(whole, partial)
    assert "state.json is missing" in _refusal(resumed(begun, str(latest)))
    run(resumed(begun))
    assert_same_end(begun, uninterrupted("adamw"))
    assert not partial.exists()


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "optimizer.bin", "parts.pt"])
def test_a_damaged_checkpoint_is_named_and_an_earlier_one_goes_on(
    workplace: Workplace, uninterrupted: Callable[[str], TrainConfig], begun: TrainConfig, name: str
) -> None:
    shutil.copytree(checkpoint(uninterrupted("adamw"), 4), checkpoint(begun, 4))
    damaged = checkpoint(begun, 4) / name
    os.truncate(damaged, damaged.stat().st_size // 2)
    message = _refusal(resumed(begun))
    assert f"{checkpoint(begun, 4)} cannot be read" in message
    assert "resume from an earlier one" in message
    run(resumed(begun, str(checkpoint(begun, 2))))
    assert_same_end(begun, uninterrupted("adamw"))


def test_going_on_from_an_earlier_checkpoint_takes_the_later_ones_back(
    workplace: Workplace, uninterrupted: Callable[[str], TrainConfig], tmp_path: Path
) -> None:
    changes = VARIANTS["adamw"] | {"run__checkpoint_every": 1, "run__checkpoints_total_limit": 2}
    config = workplace.config(tmp_path / "run", **changes)
    for step in (1, 4, 5):
        source = checkpoint(uninterrupted("adamw"), max(step, 2))
        shutil.copytree(source, checkpoint(config, step))
    state = json.loads((checkpoint(config, 1) / "state.json").read_text(encoding="utf-8"))
    assert state["step"] == 2
    shutil.move(checkpoint(config, 1), checkpoint(config, 2))
    interrupt(resumed(config, str(checkpoint(config, 2))), 3, kill)
    # Else `latest` would be of a run that was given up, and the limit would be spent on it.
    assert steps_kept(config) == [2, 3]


@pytest.mark.parametrize(("limit", "kept"), [(1, [5]), (2, [4, 5]), (None, [1, 2, 3, 4, 5])])
def test_the_oldest_checkpoints_go(workplace: Workplace, tmp_path: Path, limit: int | None, kept: list[int]) -> None:
    changes = {"run__checkpoint_every": 1, "run__checkpoints_total_limit": limit}
    config = workplace.config(tmp_path / "run", **changes)
    run(config)
    assert steps_kept(config) == kept


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_adapter_of_a_checkpoint_is_what_was_trained(
    uninterrupted: Callable[[str], TrainConfig], variant: str
) -> None:
    config = uninterrupted(variant)
    averaged = config.optimizer.ema_decay > 0
    for step in (2, 4, 5):
        folder = checkpoint(config, step)
        found = adapter_weights(folder / "adapter.safetensors")
        expected = {
            name.removeprefix("adapter."): value for name, value in load_file(folder / "model.safetensors").items()
        }
        same = differences(found, expected) == []
        assert same != averaged
        if averaged:
            shadow = torch.load(folder / "parts.pt", weights_only=True)["ema"]["shadow_params"]
            parameters = [found[name] for name in _parameter_names(config)]
            assert differences(parameters, shadow) == []
    assert differences(adapter_weights(adapter_file(config)), found) == []


def _parameter_names(config: TrainConfig) -> list[str]:
    return [name for name, _ in load_adapter(adapter_file(config)).named_parameters()]
