"""Held-out pairs and unseen users, each looked at with the same noise every time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..config import LossSection
from .batches import Batches
from .metrics import QUARTERS, PairRecords, summarise
from .policy import Policy


@dataclass(frozen=True)
class Validation:
    """What to look at: named splits, at most ``pairs`` of each, in batches of ``batch_size`` per rank."""

    accelerator: Accelerator
    splits: dict[str, Batches]
    pairs: int
    batch_size: int

    @torch.no_grad()
    def run(self, policy: Policy, effects: nn.Module, loss: LossSection) -> dict[str, float]:
        """Return what ``summarise`` says of each split, as ``seen/loss`` and so on."""
        timesteps = int(policy.scheduler.config.num_train_timesteps)
        model = self.accelerator.unwrap_model(effects)
        values: dict[str, float] = {}
        for name, batches in self.splits.items():
            table = self._table(policy, model, batches, loss, timesteps)
            if len(table):
                values |= {f"{name}/{key}": value for key, value in summarise(table, timesteps).items()}
        return values

    def _table(self, policy: Policy, model: nn.Module, batches: Batches, loss: LossSection, timesteps: int) -> Tensor:
        """Every pair once in the middle of each quarter of the timesteps that are trained; ranks take turns."""
        trained = timesteps - loss.min_timestep
        middles = [loss.min_timestep + trained * (2 * quarter + 1) // (2 * QUARTERS) for quarter in range(QUARTERS)]
        positions = range(min(self.pairs, len(batches.indices)))
        work = [
            (positions[start : start + self.batch_size], middle)
            for middle in middles
            for start in range(0, len(positions), self.batch_size)
        ]
        ranks = self.accelerator.num_processes
        tables: list[list[list[float]]] = []
        for turn in range(math.ceil(len(work) / ranks)):
            # Every rank calls the adapter equally often, as wrappers that gather it need; the last may have no work.
            mine = turn * ranks + self.accelerator.process_index
            chunk, timestep = work[mine % len(work)]
            batch = batches.fixed(chunk, timestep).to(self.accelerator.device)
            reference = policy.reference_errors(batch)
            with policy.errors(model, batch) as errors:
                result = policy.loss(errors, reference, batch, loss)
            if mine < len(work):
                tables.append(PairRecords.of(batch, errors, reference, result).table().tolist())
        gathered = [row for table in gather_object(tables) for row in table]
        return torch.tensor(gathered, dtype=torch.float64)
