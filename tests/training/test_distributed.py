"""Several ranks: two gloo processes on this machine, started by launchers where these are what is tested."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from comfy_testing import difference
from observed_runs import STEPS, Run, train_tiny
from processes import call_in_ranks
from rank_recorder import record
from safetensors.torch import load_file
from training_runs import adapter_file, checkpoint, gradients, metrics, optimizer_state, tiny_config

from comfyui_psa.adapter import load_adapter
from comfyui_psa.training.config import CONFIGS, TrainConfig
from comfyui_psa.training.dpo.plan import to_toml

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
GRADIENT_ROUNDING = 1e-4


def on_cpus(folder: Path) -> dict[str, str]:
    """An environment away from this machine's settings."""
    chosen = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "huggingface")}
    return os.environ | chosen


def launch(folder: Path, *arguments: str | Path) -> str:
    """Run Python on CPUs; return what it said."""
    command = (sys.executable, *arguments)
    done = subprocess.run(command, cwd=folder, env=on_cpus(folder), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def write_config(folder: Path, config: TrainConfig) -> Path:
    path = folder / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def resumed(runs: dict[str, Run]) -> Mapping[str, Any]:
    """Two more steps of four pairs after a run: projection and values have gradients."""
    last = str(checkpoint(runs["sdxl"].config, STEPS))
    # beta multiplies the rounding of the errors
    settings = {"run.resume": last, "run.steps": STEPS + 2, "run.accumulation": 1, "loss.beta": 1.0}
    return {**settings, "run.checkpoint_every": 1, "run.checkpoints_total_limit": None}


@pytest.fixture(scope="module")
def recorded(
    runs: dict[str, Run], resumed: Mapping[str, Any], split: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, list[list[str]]]:
    """A run of two ranks, and what each of them noted."""
    folder = tmp_path_factory.mktemp("recorded")
    config = tiny_config(folder / "run", runs["sdxl"].base.folder, split, {**resumed, "run.batch_size": 2})
    call_in_ranks(2, record, write_config(folder, config), folder)
    return config, [(folder / f"rank-{rank}.txt").read_text().splitlines() for rank in range(2)]


def test_ranks_hold_equal_weights_after_every_step(recorded: tuple[TrainConfig, list[list[str]]]) -> None:
    _, (first, second) = recorded
    assert first == second
    assert [line.split()[0] for line in first] == [str(STEPS + i) for i in range(3)]
    assert len({line.split()[1] for line in first}) == 3


def test_two_ranks_have_the_gradient_of_one_with_the_same_pairs(
    recorded: tuple[TrainConfig, list[list[str]]],
    runs: dict[str, Run],
    resumed: Mapping[str, Any],
    split: Path,
    tmp_path: Path,
) -> None:
    two, _ = recorded
    one = train_tiny(runs["sdxl"].base, split, tmp_path / "run", {**resumed, "run.batch_size": 4}).config
    ours, theirs = (gradients(checkpoint(config, STEPS + 1)) for config in (two, one))
    assert float(theirs.norm()) > 0
    assert difference(ours, theirs) < GRADIENT_ROUNDING
    for ours_line, theirs_line in zip(metrics(two), metrics(one), strict=True):
        for name in ("loss", "margin", "chosen_error", "gradient_norm", "learning_rate"):
            assert ours_line[name] == pytest.approx(theirs_line[name], rel=1e-3, abs=1e-6), name


def test_torchrun_trains_one_adapter(runs: dict[str, Run], split: Path, tmp_path: Path) -> None:
    """The pairs of a step are those of the run on one rank: 2 ranks x 2 micro-batches x 1 pair."""
    base = runs["sdxl"].base.folder
    settings = {"run.batch_size": 1, "data.cache": tmp_path / "cache", "run.checkpoint_every": 1}
    config = tiny_config(tmp_path / "run", base, split, settings)
    said = launch(tmp_path, *TORCHRUN, "-m", "comfyui_psa.training", write_config(tmp_path, config))
    assert said.count("put it into ComfyUI's models/psa_adapters") == 1
    assert "2 x cpu" in (config.run.output / "training_report.md").read_text(encoding="utf-8")
    assert [line["step"] for line in metrics(config)] == [1, 2, 3]
    steps = optimizer_state(checkpoint(config, STEPS)).values()
    assert {int(values["step"]) for values in steps} == {STEPS}
    assert load_adapter(adapter_file(config)).config == load_adapter(adapter_file(runs["sdxl"].config)).config
    ours, theirs = (load_file(adapter_file(c)) for c in (config, runs["sdxl"].config))
    for name, tensor in theirs.items():
        distance = (ours[name].float() - tensor.float()).norm() / tensor.float().norm()
        assert float(distance) < 0.02, name  # Adam's steps are as long for gradients that are mostly rounding


def test_a_signal_to_the_launcher_ends_all_ranks_at_one_step(runs: dict[str, Run], split: Path, tmp_path: Path) -> None:
    settings = {"run.batch_size": 1, "data.cache": tmp_path / "cache", "run.steps": 100_000}
    config = tiny_config(tmp_path / "run", runs["sdxl"].base.folder, split, settings | {"run.checkpoint_every": 99_999})
    command = (sys.executable, *TORCHRUN, "-m", "comfyui_psa.training", write_config(tmp_path, config))
    lines = []
    with subprocess.Popen(command, cwd=tmp_path, env=on_cpus(tmp_path), stderr=subprocess.PIPE, text=True) as process:
        patience = threading.Timer(300, process.kill)
        patience.start()
        for line in process.stderr:
            lines.append(line)
            if line.startswith("step 2/"):
                process.send_signal(signal.SIGTERM)
        patience.cancel()
    assert process.returncode not in (0, -signal.SIGKILL)
    (stopped,) = [line for line in lines if line.startswith("psa: ")]
    step = int(re.fullmatch(r"psa: Stopped at step (\d+) of 100000; .*run\.resume=latest.*\n", stopped)[1])
    (kept,) = (config.run.output / "checkpoints").iterdir()
    assert kept == checkpoint(config, step)
    assert {path.name for path in kept.glob("random_states_*")} == {"random_states_0.pkl", "random_states_1.pkl"}

    more = {"run.resume": "latest", "run.steps": step + 1, "run.batch_size": 2}  # and one rank goes on
    train_tiny(runs["sdxl"].base, split, tmp_path / "run", settings | more)
    assert checkpoint(config, step + 1).is_dir()


def test_accelerate_launches_as_many_ranks_as_it_is_told(runs: dict[str, Run], split: Path, tmp_path: Path) -> None:
    """As on a machine with two GPUs; its ``--cpu`` would start one process, whatever the number."""
    config = tiny_config(tmp_path / "run", runs["sdxl"].base.folder, split, {"run.steps": 1})
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m", "comfyui_psa.training")
    said = launch(tmp_path, *launcher, write_config(tmp_path, config), "--set", "run.batch_size=1")
    assert said.count("step 1/1  loss 0.6931") == 1
    assert "2 x cpu" in (config.run.output / "training_report.md").read_text(encoding="utf-8")
    assert (checkpoint(config, 1) / "adapter.safetensors").is_file()
    assert adapter_file(config).is_file()


@pytest.mark.parametrize(
    ("name", "kind", "processes", "machines"),
    [
        ("one-node-8-gpus", "MULTI_GPU", 8, 1),
        ("two-nodes-16-gpus", "MULTI_GPU", 16, 2),
        ("fsdp", "FSDP", 8, 1),
        ("deepspeed-zero2", "DEEPSPEED", 8, 1),
    ],
)
def test_ready_launcher_files_are_accelerates(name: str, kind: str, processes: int, machines: int) -> None:
    path = CONFIGS / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert config.distributed_type == kind
    assert (config.num_processes, config.num_machines) == (processes, machines)
    assert config.mixed_precision == "no"
    assert not config.use_cpu
    text = path.read_text(encoding="utf-8")
    assert f"accelerate launch --config_file {path.name}" in text
    assert yaml.safe_load(text).keys() <= vars(config).keys()


def test_every_ready_launcher_file_is_tested() -> None:
    names = {path.stem for path in (CONFIGS / "accelerate").iterdir()}
    assert names == {"one-node-8-gpus", "two-nodes-16-gpus", "fsdp", "deepspeed-zero2"}
