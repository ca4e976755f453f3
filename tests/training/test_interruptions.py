"""Signals, kills, full disks and numbers that are not finite: what was saved stays whole and can go on."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState
from interrupted_runs import (
    KillAt,
    Workplace,
    assert_same_end,
    command,
    folder_bytes,
    full_state,
    interrupt,
    kill,
    resumed,
    run_with,
    steps_kept,
    terminate,
    write_config,
)
from training_runs import adapter_file, checkpoint, metrics, run

from comfyui_psa.training.base import open_base
from comfyui_psa.training.config import TrainConfig
from comfyui_psa.training.data.cache import build_cache
from comfyui_psa.training.dpo.signals import StopSignals
from comfyui_psa.training.errors import TrainingError

# Larger than everything that a run writes before a checkpoint, smaller than a checkpoint's weights.
FULL = 64 * 1024


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    workplace = Workplace.write(tmp_path_factory.mktemp("interruptions"))
    run(workplace.config(workplace.folder / "whole"))
    return workplace


@pytest.fixture(scope="module")
def whole(workplace: Workplace) -> TrainConfig:
    """An uninterrupted run of five steps."""
    return workplace.config(workplace.folder / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    workplace: Workplace, tmp_path: Path, number: signal.Signals
) -> None:
    config = workplace.config(tmp_path / "run", run__steps=100_000, run__checkpoint_every=100_000)
    file = write_config(config, tmp_path / "run.toml")
    process = subprocess.Popen(
        [sys.executable, "-m", "comfyui_psa.training", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("step 2/"):
            process.send_signal(number)
    output = process.stdout.read()
    assert process.wait() == 128 + number, lines
    *_, last = lines
    stopped = re.fullmatch(r"psa: Stopped at step (\d+) of 100000; (.*)\n", last)
    assert stopped is not None, last
    step = int(stopped[1])
    assert "--set run.resume=latest" in stopped[2]
    assert output == ""
    assert steps_kept(config) == [step]
    assert not adapter_file(config).exists()

    # Two steps further, here and in a run that nobody interrupted.
    longer = {"run__steps": step + 2}
    uninterrupted = workplace.config(tmp_path / "uninterrupted", **longer)
    run(uninterrupted)
    config = workplace.config(tmp_path / "run", **longer)
    run(resumed(config))
    assert_same_end(config, uninterrupted)


def test_a_signal_in_the_last_step_changes_nothing(workplace: Workplace, whole: TrainConfig, tmp_path: Path) -> None:
    config = workplace.config(tmp_path / "run")
    run_with(config, 4, terminate)
    assert_same_end(config, whole)


@pytest.mark.parametrize(("number", "acts"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_only_the_first_signal_waits(number: signal.Signals, acts: type[BaseException]) -> None:
    def end(*_: object) -> None:
        raise SystemExit

    # A shell may have started this in the background, without SIGINT.
    usual = {signal.SIGTERM: end, signal.SIGINT: signal.default_int_handler}
    before = {which: signal.signal(which, handler) for which, handler in usual.items()}
    try:
        with StopSignals() as stop:
            assert stop.received is None
            signal.raise_signal(number)
            assert stop.received == number
            with pytest.raises(acts):
                signal.raise_signal(number)
        with pytest.raises(acts):
            signal.raise_signal(number)
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


@pytest.mark.parametrize(
    ("function", "seen", "kept"),
    [
        ("comfyui_psa.training.dpo.checkpoints.save_adapter", ".step-000004.partial", [2]),
        ("os.fsync", ".step-000004.partial/state.json", [2]),
        ("pathlib.Path.rename", ".step-000004.partial", [2]),
        ("shutil.rmtree", "step-000004", [2, 4]),
    ],
    ids=["adapter not written", "nothing on the disk", "not renamed", "old one not removed"],
)
def test_a_kill_while_saving_leaves_a_whole_checkpoint(
    workplace: Workplace, whole: TrainConfig, tmp_path: Path, function: str, seen: str, kept: list[int]
) -> None:
    config = workplace.config(tmp_path / "run", run__checkpoints_total_limit=1)
    file = write_config(config, tmp_path / "run.toml")
    place = config.run.output / "checkpoints" / seen
    assert command([file], tmp_path, kill_at=KillAt(function, place)).code == -signal.SIGKILL
    assert steps_kept(config) == kept
    assert full_state(checkpoint(config, kept[-1]))["progress"] == (kept[-1], 2 * kept[-1])
    run(resumed(config))
    assert_same_end(config, whole)
    assert [path.name for path in checkpoint(config, 0).parent.iterdir()] == ["step-000005"]


def test_a_kill_after_going_back_does_not_mix_two_runs(
    workplace: Workplace, whole: TrainConfig, tmp_path: Path
) -> None:
    config = workplace.config(tmp_path / "run")
    shutil.copytree(whole.run.output, config.run.output)
    before = folder_bytes(checkpoint(config, 5))
    interrupt(resumed(config, str(checkpoint(config, 2))), 3, kill)
    folder = checkpoint(config, 0).parent
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-000002",
        "step-000004.taken-back",
        "step-000005.taken-back",
    ]
    assert folder_bytes(folder / "step-000005.taken-back") == before  # nothing is lost before the next save

    run(resumed(config))
    assert [line["step"] for line in metrics(config)] == [1, 2, 3, 4, 5]
    assert_same_end(config, whole)
    assert steps_kept(config) == [2, 4, 5]


def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_half_written(
    workplace: Workplace, whole: TrainConfig, tmp_path: Path
) -> None:
    config = workplace.config(tmp_path / "run")
    interrupt(config, 3, kill)
    before = folder_bytes(config.run.output / "checkpoints")
    assert all(len(before[f"step-000002/{name}"]) > FULL for name in ("model.safetensors", "adapter.safetensors"))
    file = write_config(config, tmp_path / "run.toml")
    ended = command([file, "--set", "run.resume=latest"], tmp_path, largest_file=FULL)
    assert ended.code == 1
    message = ended.stderr.splitlines()[-1]
    assert message.startswith("psa: The checkpoint of step 4 cannot be written to ")
    assert f"The checkpoint {checkpoint(config, 2)} is whole." in message
    assert "Make room there" in message
    assert "Traceback" not in ended.stderr
    assert folder_bytes(config.run.output / "checkpoints") == before
    assert sorted(path.name for path in config.run.output.iterdir()) == ["checkpoints", "metrics.jsonl"]
    run(resumed(config))
    assert_same_end(config, whole)


def test_a_disk_that_is_full_for_the_metrics_is_one_sentence(workplace: Workplace, tmp_path: Path) -> None:
    config = workplace.config(tmp_path / "run", run__checkpoint_every=5)
    file = write_config(config, tmp_path / "run.toml")
    ended = command([file], tmp_path, largest_file=1500)
    assert ended.code == 1
    assert ended.stderr.splitlines()[-1].startswith(f"psa: {config.run.output / 'metrics.jsonl'} cannot be written (")
    assert "Traceback" not in ended.stderr


def test_a_learning_rate_that_blows_up_stops_and_nothing_is_overwritten(workplace: Workplace, tmp_path: Path) -> None:
    changes = {"optimizer__learning_rate": 1e30, "run__checkpoint_every": 1}
    run(workplace.config(tmp_path / "run", **changes, run__steps=1))  # the first step starts from zeros
    before = folder_bytes(tmp_path / "run")
    config = workplace.config(tmp_path / "run", **changes)
    assert {"psa_adapter.safetensors", "checkpoints/step-000001/optimizer.bin"} <= before.keys()
    with pytest.raises(TrainingError) as caught:
        run(resumed(config))
    assert folder_bytes(tmp_path / "run") == before
    message = str(caught.value)
    assert re.match(
        r"Step 2 gave numbers that are not finite \(rows \d, \d of the training data, counted from 0\)\. ", message
    )
    assert "optimizer.learning_rate = 1e+30 is too high" in message
    assert f"the last checkpoint is {checkpoint(config, 1)}" in message


def test_latents_that_are_not_finite_name_their_row(workplace: Workplace, tmp_path: Path) -> None:
    config = workplace.config(tmp_path / "run", data__cache=tmp_path / "cache", run__steps=8)
    base = open_base(config.model.base)
    row = build_cache(config, config.data.train, base, (), {}, PartialState()).row(5)
    (shard,) = (tmp_path / "cache").glob("latents-*/shard-*.arrow")
    content, latents = shard.read_bytes(), row.rejected.numpy().astype(np.float32).tobytes()
    assert content.count(latents) == 1
    shard.write_bytes(content.replace(latents, np.float32(np.inf).tobytes() + latents[4:]))
    with pytest.raises(TrainingError) as caught:
        run(config)
    message = str(caught.value)
    found = re.match(
        r"Step (\d) gave numbers that are not finite \(rows 5 of the training data, counted from 0\)", message
    )
    assert found is not None, message
    assert "the cached latents of these rows are damaged" in message
    saved = [step for step in (2, 4, 6) if step < int(found[1])]
    assert steps_kept(config) == saved
    assert ("there is no checkpoint yet" in message) == (not saved)
    assert not adapter_file(config).exists()
    assert {path.name for path in config.run.output.iterdir()} == {"metrics.jsonl", *(["checkpoints"] if saved else [])}
