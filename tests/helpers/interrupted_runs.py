"""Training runs that end early: at a line of their output, by a signal, in the middle of a write, on a full disk."""

from __future__ import annotations

import io
import json
import os
import pkgutil
import resource
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from pairs import write_sage_split
from pipelines import write_sd_pipeline
from processes import forkserver
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from training_runs import adapter_file, checkpoint, tiny_config

from comfyui_psa.adapter import load_adapter
from comfyui_psa.training import train as recipe
from comfyui_psa.training.config import TrainConfig
from comfyui_psa.training.dpo.plan import to_toml


@dataclass(frozen=True)
class Workplace:
    """A base model, pairs and their cache, which any number of runs share."""

    folder: Path

    @classmethod
    def write(cls, folder: Path) -> Workplace:
        """Write a tiny pipeline, and eight pairs of four users."""
        write_sd_pipeline(folder / "base")
        write_sage_split(folder / "pairs", rows=8, users=4)
        return cls(folder)

    def config(self, output: Path, **changes: Any) -> TrainConfig:
        """Five steps of two pairs, a checkpoint after every other one; ``changes`` are ``section__key=value``."""
        settings: dict[str, Any] = {
            "data.resolution": 32,
            "run.steps": 5,
            "run.accumulation": 1,
            "run.checkpoint_every": 2,
            "run.checkpoints_total_limit": None,
        }
        settings |= {key.replace("__", "."): value for key, value in changes.items()}
        return tiny_config(output, self.folder / "base", self.folder / "pairs", settings)


class KilledError(Exception):
    """Stands for a death at once, with nothing cleaned up or saved."""


def kill() -> None:
    """Die at once."""
    raise KilledError


def terminate() -> None:
    """Send SIGTERM to this process."""
    signal.raise_signal(signal.SIGTERM)


def step_line(step: int) -> str:
    """How the line of output that is printed after a step begins."""
    return f"step {step}/"


class _Output(io.StringIO):
    def __init__(self, line: str, act: Callable[[], None]) -> None:
        super().__init__()
        self._line, self._act = line, act

    def write(self, text: str) -> int:
        count = super().write(text)
        if text.startswith(self._line):
            self._act()
        return count


def run_with(config: TrainConfig, after: int, act: Callable[[], None]) -> None:
    """Run in this process and ``act`` as soon as step ``after`` is reported."""
    with mock.patch.object(recipe, "write_report"):
        recipe.train(config, Console(file=_Output(step_line(after), act), width=200))


def interrupt(config: TrainConfig, after: int, act: Callable[[], None]) -> None:
    """As ``run_with``, of a run that must not come to its end."""
    with pytest.raises((KilledError, recipe.StoppedError)):
        run_with(config, after, act)


def resumed(config: TrainConfig, resume: str = "latest") -> TrainConfig:
    """The same run, going on."""
    return config.model_copy(update={"run": config.run.model_copy(update={"resume": resume})})


def steps_kept(config: TrainConfig) -> list[int]:
    """The steps of the checkpoints of a run; unfinished ones, too, have a place in the list if they look whole."""
    return sorted(int(path.name[5:]) for path in checkpoint(config, 0).parent.glob("step-*"))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def adapter_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter file, opened as the nodes open it."""
    return load_adapter(path).state_dict()


def full_state(folder: Path) -> dict[str, Any]:
    """Everything that a checkpoint brings back: weights, optimizer, schedule, moving average, progress."""
    pickles = ("optimizer.bin", "parts.pt")
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return {
        "adapter": adapter_weights(folder / "adapter.safetensors"),
        "weights": load_file(folder / "model.safetensors"),
        **{name: torch.load(folder / name, weights_only=True) for name in pickles},
        "progress": (state["step"], state["samples"]),
    }


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two structures of tensors, containers and values are not equal bit by bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [place]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in differences(one[key], other[key], f"{place}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [
            found
            for i, (a, b) in enumerate(zip(one, other, strict=True))
            for found in differences(a, b, f"{place}/{i}")
        ]
    return [] if type(one) is type(other) and one == other else [place]


def assert_same_end(config: TrainConfig, uninterrupted: TrainConfig) -> None:
    """Two runs ended with the same adapter and the same full state, bit by bit."""
    last = config.run.steps
    assert differences(*(full_state(checkpoint(run, last)) for run in (config, uninterrupted))) == []
    assert differences(*(adapter_weights(adapter_file(run)) for run in (config, uninterrupted))) == []
    assert load_adapter(adapter_file(config)).config == load_adapter(adapter_file(uninterrupted)).config


class Ended(NamedTuple):
    """How a process ended (a signal's number is negative), and what it wrote on stdout and stderr."""

    code: int
    stdout: str
    stderr: str


class KillAt(NamedTuple):
    """SIGKILL at the first call of ``function`` while ``path`` is there."""

    function: str
    path: Path


def write_config(config: TrainConfig, path: Path) -> Path:
    """Write a configuration as the TOML file that it could have come from."""
    path.write_text(to_toml(config), encoding="utf-8")
    return path


def command(
    arguments: Sequence[object], folder: Path, largest_file: int | None = None, kill_at: KillAt | None = None
) -> Ended:
    """Run ``python -m comfyui_psa.training`` as a process of its own that has its imports already, in ``folder``."""
    output, error = folder / "stdout.txt", folder / "stderr.txt"
    process = forkserver().Process(
        target=_run_command, args=([str(a) for a in arguments], folder, output, error, largest_file, kill_at)
    )
    process.start()
    process.join()
    assert process.exitcode is not None
    return Ended(process.exitcode, output.read_text(encoding="utf-8"), error.read_text(encoding="utf-8"))


def _run_command(
    arguments: list[str], folder: Path, output: Path, error: Path, largest_file: int | None, kill_at: KillAt | None
) -> None:
    for path, descriptor in ((output, 1), (error, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    os.environ |= {"COLUMNS": "250", "NO_COLOR": "1"}
    os.chdir(folder)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = ["psa", *arguments]
    with _killed(kill_at) if kill_at else nullcontext():
        runpy.run_module("comfyui_psa.training", run_name="__main__", alter_sys=True)


@contextmanager
def _killed(at: KillAt) -> Iterator[None]:
    name, function = at.function.rpartition(".")[::2]
    owner = pkgutil.resolve_name(name)
    original = getattr(owner, function)

    def call(*args: Any, **kwargs: Any) -> Any:
        if at.path.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    with mock.patch.object(owner, function, call):
        yield
