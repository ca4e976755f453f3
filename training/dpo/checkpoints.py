"""Checkpoints: the full state of a run and the adapter as it is now, written aside and renamed when whole."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args

import torch
from accelerate import Accelerator
from pydantic import ValidationError
from safetensors import SafetensorError

from ...adapter import AdapterError, Kind, PSAAdapter, save_adapter
from ...safe_files import DAMAGE
from ..config import TrainConfig
from ..errors import TrainingError

ADAPTER = "adapter.safetensors"
_FOLDER = "checkpoints"
_STATE = "state.json"
_PARTS = "parts.pt"
_TAKEN_BACK = ".taken-back"
_NAME = re.compile(r"step-\d+")
_DAMAGE: tuple[type[Exception], ...] = (*DAMAGE, pickle.UnpicklingError)

# What has to stay the same between the two halves of a run: what is learned, from what, and from whom.
_FIXED = (
    "model.base",
    "model.prediction_type",
    "data.train",
    "data.embeddings",
    "data.encoder.kind",
    "data.encoder.name",
    "data.encoder.template",
    "data.resolution",
    "data.crop",
    "data.flip",
    "adapter.kinds",
    "adapter.gated",
    "adapter.text",
    "adapter.null",
    "adapter.standardise",
    # A checkpoint brings these back, so a changed one would be ignored.
    "optimizer.kind",
    "optimizer.learning_rate",
    "optimizer.betas",
    "optimizer.weight_decay",
    "optimizer.epsilon",
    "optimizer.ema_decay",
    "validation.seen",
    "validation.unseen",
    "validation.held_out",
    "validation.unseen_users",
    "loss.noises_per_pair",
    "loss.fidelity",
    "run.seed",
)
# What remembered errors of the reference depend on besides.
_FIXED_WITH_NOISES = ("loss.prompt_dropout", "loss.noise_offset", "loss.min_timestep", "model.dtype")


class Stateful(Protocol):
    """A part of a run that can be saved: a schedule, a moving average."""

    def state_dict(self) -> Any:
        """Return tensors and plain values."""

    def load_state_dict(self, state_dict: Any) -> None:
        """Bring them back."""


class Progress(NamedTuple):
    """How far a run is: optimizer steps, and samples (pairs) over all ranks."""

    step: int = 0
    samples: int = 0


class Checkpoints:
    """The checkpoints of one run, in ``<output>/checkpoints/step-000500``."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainConfig,
        parts: Mapping[str, Stateful],
        made_from: Mapping[str, str],
    ) -> None:
        """Keep checkpoints in the output folder of ``config``.

        ``parts`` are saved beside what accelerate holds; ``made_from`` are hashes of what has to be the same when the
        run goes on, by what people call it.
        """
        self._accelerator = accelerator
        self._config = config
        self._parts = parts
        self._made_from = dict(made_from)
        self._folder = config.run.output / _FOLDER

    def save(self, progress: Progress, adapter: PSAAdapter | None) -> Path:
        """Save the state of every rank and ``adapter`` (the main rank's); then remove the oldest ones.

        Raises:
            TrainingError: it cannot be written; earlier checkpoints are as they were.
        """
        target = self._folder / f"step-{progress.step:06d}"
        aside = self._folder / f".{target.name}.partial"
        main = self._accelerator.is_main_process
        try:
            if main:
                for killed in self._folder.glob(".step-*.partial"):
                    shutil.rmtree(killed, ignore_errors=True)
                aside.mkdir(parents=True)
            self._accelerator.wait_for_everyone()
            self._accelerator.save_state(str(aside))
            self._accelerator.wait_for_everyone()
            if main and adapter is not None:
                save_adapter(adapter, aside / ADAPTER)
                torch.save({name: part.state_dict() for name, part in self._parts.items()}, aside / _PARTS)
                state = {
                    **progress._asdict(),
                    "made_from": self._made_from,
                    "config": self._config.model_dump(mode="json"),
                }
                (aside / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
                _sync(aside)
                _remove(target)
                aside.rename(target)
                _sync(self._folder)
                self._prune(target)
        except (OSError, RuntimeError, SafetensorError, AdapterError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            last = self.latest()
            advice = "There is no earlier checkpoint. Make room there, and start again."
            if last is not None:
                advice = f"The checkpoint {last} is whole. Make room there, and go on with --set run.resume=latest."
            raise TrainingError(
                f"The checkpoint of step {progress.step} cannot be written to {self._folder} "
                f"({_first_line(error)}). {advice}"
            ) from None
        self._accelerator.wait_for_everyone()
        return target

    def latest(self) -> Path | None:
        """Return the newest whole checkpoint, if there is one."""
        return max((path for path in self._all() if (path / _STATE).is_file()), default=None, key=_step)

    def start(self) -> Path | None:
        """Return the checkpoint that the configuration names, or None for a new run.

        Raises:
            TrainingError: there is none, it is damaged, or it was made with another model, data or adapter; or
                the output folder holds a run that this one would overwrite.
        """
        wish = self._config.run.resume
        if wish is None:
            self._check_nothing_is_replaced()
            return None
        folder = self.latest() if wish == "latest" else Path(wish)
        if folder is None:
            raise TrainingError(
                f"There is no checkpoint in {self._folder} to go on from. Leave run.resume out to start a new run."
            )
        self._check(_read_state(folder)["config"], folder)
        if folder.resolve().parent != self._folder.resolve():
            self._check_nothing_is_replaced()
        return folder

    def resume(self) -> Progress:
        """Load the checkpoint that the configuration names into everything that accelerate holds; take later ones back.

        Raises:
            TrainingError: as ``start`` does, or later ones cannot be renamed.
        """
        folder = self.start()
        if folder is None:
            return Progress()
        state = _read_state(folder)
        changed = [what for what, found in self._made_from.items() if state["made_from"].get(what) != found]
        if changed:
            raise TrainingError(
                f"{folder} was made with other {' and '.join(changed)} than are there now. Resume with the same, or "
                "start a new run in another run.output."
            )
        try:
            # Not registered with accelerate, which would run code that a file brings along.
            parts = torch.load(folder / _PARTS, map_location="cpu", weights_only=True)
            for name, part in self._parts.items():
                part.load_state_dict(parts[name])
            self._accelerator.load_state(str(folder))
        except _DAMAGE as error:
            raise _damaged(folder, error) from None
        # A saved step is whole. accelerate would go on counting micro-batches, and cut steps of another number wrongly.
        self._accelerator.step = 0
        progress = Progress(state["step"], state["samples"])
        if self._accelerator.is_main_process:
            self._take_back(progress)
        return progress

    def _check_nothing_is_replaced(self) -> None:
        run, adapter = self._config.run, self._config.run.output / f"{self._config.adapter.name}.safetensors"
        if (last := self.latest()) is not None:
            raise TrainingError(
                f"{run.output} already holds a run ({last.name}). Go on with it by --set run.resume=latest, or choose "
                "another folder: run.output."
            )
        if adapter.exists():
            raise TrainingError(
                f"{adapter} is there already, and this run would replace it at its end. Choose another folder "
                "(run.output) or name (adapter.name), or move that file away."
            )

    def _check(self, found: dict[str, Any], folder: Path) -> None:
        try:
            before = TrainConfig.model_validate(found)
        except ValidationError as error:
            raise _damaged(folder, error) from None
        for key in (*_FIXED, *(_FIXED_WITH_NOISES if self._config.loss.remembers_reference else ())):
            was, now = (reduce(getattr, key.split("."), config) for config in (before, self._config))
            if key == "loss.fidelity" and bool(was) == bool(now):
                continue  # how much it counts may change, as all weights of the loss may
            if was != now and key.removeprefix("adapter.") not in _untrained(self._config):
                raise TrainingError(
                    f"{folder} was made with {key} = {was}, but the configuration says {now}. Resume with the same "
                    "model, data, split, adapter, optimizer, noises and seed, or start a new run in another run.output."
                )

    def _take_back(self, progress: Progress) -> None:
        """Rename later checkpoints, of a run that is given up: they are never the latest, and a save removes them."""
        for path in [path for path in self._all() if _step(path) > progress.step]:
            aside = path.with_name(f"{path.name}{_TAKEN_BACK}")
            try:
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            except OSError as error:
                raise TrainingError(
                    f"{path} is later than step {progress.step}, from which this run goes on, and cannot be renamed "
                    f"({error.strerror}). Make {self._folder} writable."
                ) from None

    def _prune(self, newest: Path) -> None:
        """Remove the oldest, what was taken back, and remains of later ones: ``newest`` is the latest."""
        paths = sorted(self._all(), key=_step)
        until_now = [path for path in paths if _step(path) <= _step(newest)]
        kept = until_now[-(self._config.run.checkpoints_total_limit or len(until_now)) :]
        for path in (*paths, *self._folder.glob(f"step-*{_TAKEN_BACK}")):
            if path not in kept:
                _remove(path)

    def _all(self) -> Iterator[Path]:
        """Yield the folders of checkpoints; somebody's copy of one under another name is none."""
        return (path for path in self._folder.glob("step-*") if _NAME.fullmatch(path.name))


def _untrained(config: TrainConfig) -> set[Kind]:
    """Return the kinds that are not trained: their sizes do not count."""
    return set(get_args(Kind)) - set(config.adapter.kinds)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint so that it is none from the first moment on."""
    (checkpoint / _STATE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        return {
            "step": int(state["step"]),
            "samples": int(state["samples"]),
            "made_from": dict(state["made_from"]),
            "config": dict(state["config"]),
        }
    except FileNotFoundError:
        raise TrainingError(f"{folder} is not a whole checkpoint: {_STATE} is missing. Choose another one.") from None
    except DAMAGE as error:
        raise _damaged(folder, error) from None


def _damaged(folder: Path, error: Exception) -> TrainingError:
    return TrainingError(
        f"The checkpoint {folder} cannot be read ({_first_line(error)}). It is damaged or from another version: "
        "resume from an earlier one, run.resume = its folder."
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _sync(folder: Path) -> None:
    """Bring a folder's files and entries onto the disk before it is renamed."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    if os.name != "nt":  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
