"""What a run writes down: numbers per pair, their means, and ``metrics.jsonl``, one line per logged step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...adapter import PSAAdapter
from ...safe_files import replacing
from ..errors import TrainingError
from .denoising import PairBatch
from .loss import DPOLoss, PairErrors

METRICS = "metrics.jsonl"
QUARTERS = 4


class PairRecords(NamedTuple):
    """What is noted of each pair, ``[pairs]`` each; errors are with the adapter, less those of the reference.

    ``allowed`` is 1 for pairs that are no preferences, see ``loss.fidelity``; ``deviation`` is 0 without it.
    """

    row: Tensor
    timestep: Tensor
    loss: Tensor
    accuracy: Tensor
    margin: Tensor
    chosen_error: Tensor
    rejected_error: Tensor
    reference_error: Tensor
    allowed: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, batch: PairBatch, model: PairErrors, reference: PairErrors, result: DPOLoss) -> PairRecords:
        """Collect them from one micro-batch."""
        none = torch.zeros_like(result.margin)
        return cls(
            row=torch.tensor(batch.rows, dtype=torch.float32, device=result.loss.device),
            timestep=batch.timesteps,
            loss=result.loss.detach(),
            accuracy=result.accuracy,
            margin=result.margin,
            chosen_error=model.chosen.detach() - reference.chosen,
            rejected_error=model.rejected.detach() - reference.rejected,
            reference_error=(reference.chosen + reference.rejected) / 2,
            allowed=none if batch.allowed is None else batch.allowed,
            deviation=none if result.deviation is None else result.deviation,
        )

    def table(self) -> Tensor:
        """Return ``[pairs, columns]`` in float32, which all devices have; rows up to 16 million stay exact."""
        return torch.stack([column.float() for column in self], dim=1)

    @classmethod
    def split(cls, table: Tensor) -> tuple[PairRecords, PairRecords]:
        """Return the records in a table of the pairs that are preferences, and of the others."""
        allowed = cls(*table.unbind(dim=1)).allowed != 0
        return cls(*table[~allowed].unbind(dim=1)), cls(*table[allowed].unbind(dim=1))


def summarise(table: Tensor, timesteps: int) -> dict[str, float]:
    """Return the means over a table of records: ``deviation`` of the pairs that are allowed, if there are any.

    All else is of the pairs that are preferences, if there are any; errors also per quarter of the ``timesteps``.
    """
    records, kept = PairRecords.split(table)
    values = {"deviation": float(kept.deviation.mean())} if len(kept.row) else {}
    if not len(records.row):
        return values
    values |= {
        "loss": float(records.loss.mean()),
        "implicit_accuracy": float(records.accuracy.mean()),
        "margin": float(records.margin.mean()),
        "chosen_error": float(records.chosen_error.mean()),
        "rejected_error": float(records.rejected_error.mean()),
    }
    quarter = (records.timestep * QUARTERS / timesteps).floor()
    for i in range(QUARTERS):
        inside = quarter == i
        if bool(inside.any()):
            values[f"chosen_error/quarter{i + 1}"] = float(records.chosen_error[inside].mean())
            values[f"rejected_error/quarter{i + 1}"] = float(records.rejected_error[inside].mean())
    return values


@torch.no_grad()
def adapter_norms(adapter: PSAAdapter) -> dict[str, float]:
    """Return the norms of the users' projections and of what starts at zero: the weights that bring the user in."""
    projections = [weight for name, weight in adapter.named_parameters() if name.endswith("user_proj.proj.weight")]
    named: dict[str, Sequence[Tensor]] = {
        "adapter/projection_norm": projections,
        "adapter/values_norm": adapter.zero_at_start(),
    }
    return {name: math.sqrt(sum(_norm(weight) ** 2 for weight in weights)) for name, weights in named.items()}


def device_memory(device: torch.device) -> dict[str, float]:
    """Return the largest memory that torch has held on a CUDA device so far, in GB; nothing for other devices."""
    return {"gpu_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {}


def _norm(weight: Tensor) -> float:
    # FSDP holds a shard of a weight, and gives the whole of it on demand.
    return float((weight.full_tensor() if hasattr(weight, "full_tensor") else weight).norm())


class Unlogged:
    """The records of the steps since the last line; a part of checkpoints, so that a resumed run averages the same."""

    def __init__(self) -> None:
        """Nothing is noted yet."""
        self._tables: list[Tensor] = []

    def add(self, table: Tensor) -> None:
        """Note a step's records."""
        self._tables.append(table)

    def take(self) -> Tensor:
        """Return all of them, ``[pairs, columns]``, and forget them."""
        table = torch.cat(self._tables)
        self._tables = []
        return table

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Return what a checkpoint keeps."""
        return {"tables": self._tables}

    def load_state_dict(self, state: Mapping[str, list[Tensor]]) -> None:
        """Bring back what a checkpoint kept; an earlier version had not the last columns, and meant 0."""
        width = len(PairRecords._fields)
        self._tables = [F.pad(table, (0, width - table.shape[1])) for table in state["tables"]]


class MetricsFile:
    """``metrics.jsonl``: curves that survive interruptions and name each step once."""

    def __init__(self, output: Path, resumed_step: int) -> None:
        """Open the file in ``output``; what an interrupted run noted after ``resumed_step`` is taken back."""
        self._path = output / METRICS
        kept = [line for line in read_metrics(output) if line["step"] <= resumed_step and resumed_step]
        with self._writable(), replacing(self._path) as aside:
            aside.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one line; raise TrainingError if it cannot be written."""
        with self._writable(), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{self._path} cannot be written ({error.strerror}). Make room there, or make the folder writable; "
                "then go on from the last checkpoint, if there is one: --set run.resume=latest."
            ) from None


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's ``metrics.jsonl``; a last line that was cut off by a kill is left out."""
    path = output / METRICS
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
