"""The training loop: Diffusion-DPO of an adapter on a frozen UNet, on any number of ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from PIL.Image import Image
from torch import Tensor

from ...adapter import PSAAdapter
from ..config import LossSection, TrainConfig
from ..errors import TrainingError
from .batches import Batches
from .checkpoints import Checkpoints, Progress, Stateful
from .denoising import PairBatch, error_weights
from .metrics import MetricsFile, PairRecords, Unlogged, adapter_norms, device_memory, summarise
from .optimizers import make_optimizer, make_schedule
from .policy import Policy, RememberedReference
from .signals import StopSignals
from .trainable import TrainableAdapter
from .validation import Validation


@dataclass(frozen=True)
class StepReport:
    """What an optimizer step reports: progress, means over its pairs on all ranks (``summarise``), pairs per second."""

    progress: Progress
    values: dict[str, float]


class Trainer:
    """One training run. ``steps()`` is the loop; the rest is what it needs."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        policy: Policy,
        adapter: PSAAdapter,
        batches: Batches,
        validation: Validation,
        made_from: Mapping[str, str],
    ) -> None:
        """Prepare the adapter for training and load the checkpoint that the configuration names.

        ``made_from``: see ``Checkpoints``.
        """
        self.config = config
        self.accelerator = accelerator
        self.policy = policy
        self.adapter_config = adapter.config
        self._batches = batches
        self._validation = validation
        section = config.optimizer
        effects = TrainableAdapter(adapter.to(accelerator.device))
        optimizer = make_optimizer(effects.parameters(), section, accelerator.device)
        if (deepspeed := accelerator.state.deepspeed_plugin) is not None:
            # It takes the batch size from a data loader, and there is none; and it clips by itself.
            deepspeed.deepspeed_config["train_micro_batch_size_per_gpu"] = config.run.batch_size
            deepspeed.deepspeed_config["gradient_clipping"] = section.max_grad_norm
        self.effects, self._optimizer = accelerator.prepare(effects, optimizer)
        # Not prepared: accelerate would step it once per rank.
        self._schedule = make_schedule(optimizer, section, config.run.steps)
        self._ema = EMAModel(self._parameters(), decay=section.ema_decay) if section.ema_decay else None
        self._unlogged = Unlogged()
        noises = config.loss.noises_per_pair if config.loss.remembers_reference else 0
        self._reference = RememberedReference(policy, accelerator.gather, batches.row_count if noises else 0, noises)
        parts: dict[str, Stateful] = {"schedule": self._schedule, "unlogged": self._unlogged}
        if self._ema is not None:
            parts["ema"] = self._ema
        if noises:
            parts["reference"] = self._reference
        self._checkpoints = Checkpoints(accelerator, config, parts, made_from)
        self.progress = self._checkpoints.resume()
        if self._ema is not None:
            self._ema.to(accelerator.device)
        self._metrics = None
        if accelerator.is_main_process:
            self._metrics = MetricsFile(config.run.output, self.progress.step)

    @property
    def pairs_per_step(self) -> int:
        """Pairs of one optimizer step, over all ranks and micro-batches."""
        return self.config.run.batch_size * self.config.run.accumulation * self.accelerator.num_processes

    def steps(self, stop: StopSignals) -> Iterator[StepReport]:
        """Train to the end, or until ``stop`` has received a signal; yield a report after each step.

        Raises:
            TrainingError: a number is no longer finite, or a checkpoint cannot be written.
        """
        run, tracking = self.config.run, self.config.tracking
        seconds, counted = 0.0, 0
        stopped = False
        if self.progress.step == 0:
            self._validate()
        while self.progress.step < run.steps and not stopped:
            started = time.perf_counter()
            rate = float(self._schedule.get_last_lr()[0])
            table, norm, stopped = self._step(stop)
            seconds += time.perf_counter() - started
            counted += len(table)
            self._unlogged.add(table)
            self.progress = Progress(self.progress.step + 1, self.progress.samples + self.pairs_per_step)
            step = self.progress.step
            state = {"gradient_norm": norm, "learning_rate": rate, "pairs_per_second": counted / seconds}
            ended = step == run.steps
            if ended or step % tracking.every == 0:
                self._log(step, self._summary(self._unlogged.take()) | state | self._adapter_values())
                seconds, counted = 0.0, 0
            if ended or stopped or step % run.checkpoint_every == 0:
                self._checkpoints.save(self.progress, self.adapter())
            if self.config.validation.every and (ended or step % self.config.validation.every == 0):
                self._validate()
            yield StepReport(self.progress, self._summary(table) | state)

    def adapter(self) -> PSAAdapter | None:
        """Return a copy of the adapter as it would be used (the moving average, if there is one); main rank only."""
        with self.averaged():
            state = self.accelerator.get_state_dict(self.effects)
            if not self.accelerator.is_main_process:
                return None
            training = {**self.adapter_config.training, "steps": self.progress.step}
            adapter = PSAAdapter(self.adapter_config.model_copy(update={"training": training}))
            # Within the block: the state shares memory with the weights, which get their own values back after it.
            adapter.load_state_dict({name.removeprefix("adapter."): value for name, value in state.items()})
        return adapter.requires_grad_(False).eval()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the weights are those of the moving average, if there is one."""
        if self._ema is None:
            yield
            return
        self._ema.store(self._parameters())
        self._ema.copy_to(self._parameters())
        try:
            yield
        finally:
            self._ema.restore(self._parameters())

    def log_image(self, name: str, image: Image) -> None:
        """Give an image to the trackers that take images."""
        for tracker in self.accelerator.trackers:
            if tracker.name in ("tensorboard", "wandb"):
                # TensorBoard takes arrays [images, channels, height, width].
                pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)[None]
                images = [image] if tracker.name == "wandb" else pixels
                tracker.log_images({name: images}, step=self.progress.step)

    def _step(self, stop: StopSignals) -> tuple[Tensor, float, bool]:
        """One optimizer step; return the records of its pairs, the gradient norm and whether to stop."""
        tables = []
        norm = torch.zeros(())
        for micro in range(self.config.run.accumulation):
            batch = self._batch(micro).to(self.accelerator.device)
            with self.accelerator.accumulate(self.effects):
                tables.append(self._micro_batch(batch))
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self._parameters(), self.config.optimizer.max_grad_norm)
                    table, stopped = self._gather(torch.cat(tables), stop)
                    self._check_finite(table, float(norm))
                    self._reference.end_step()
                self._optimizer.step()
                self._optimizer.zero_grad()
        self._schedule.step()
        if self._ema is not None:
            self._ema.step(self._parameters())
        return table, float(norm), stopped

    def _micro_batch(self, batch: PairBatch) -> Tensor:
        known = self._reference.known_errors(batch)
        with self.policy.compared_errors(self.effects, batch, known) as (model, reference):
            result = self.policy.loss(model, reference, batch, self._loss)
            self.accelerator.backward(result.loss.mean())
        return PairRecords.of(batch, model, reference, result).table()

    def _batch(self, micro: int) -> PairBatch:
        """The pairs of this rank: ranks and micro-batches divide a step's pairs among them, in order."""
        size = self.config.run.batch_size
        place = micro * self.accelerator.num_processes + self.accelerator.process_index
        return self._batches.training(self.progress.samples + place * size, size)

    def _gather(self, table: Tensor, stop: StopSignals) -> tuple[Tensor, bool]:
        """Collect all ranks' records, and whether any rank was told to stop."""
        told = torch.full((len(table), 1), float(stop.received is not None), dtype=table.dtype, device=table.device)
        gathered = self.accelerator.gather(torch.cat((table, told), dim=1)).cpu().double()
        return gathered[:, :-1], bool(gathered[:, -1].any())

    def _check_finite(self, table: Tensor, norm: float) -> None:
        records = PairRecords(*table.unbind(dim=1))
        if bool(table.isfinite().all()) and math.isfinite(norm):
            return
        bad = ~table.isfinite().all(dim=1)
        rows = sorted({int(row) for row in records.row[bad]}) or sorted({int(row) for row in records.row})
        named = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        if not bool(records.reference_error.isfinite().all()):
            likely = "the cached latents of these rows are damaged (delete the folder data.cache and start again), or "
            likely += f'the base model itself overflows with model.dtype = "{self.config.model.dtype}"'
            likely += "" if self.config.model.dtype == "fp32" else " (use bf16 or fp32)"
        elif self.config.model.dtype == "fp16":
            likely = 'model.dtype = "fp16" overflows: use bf16 or fp32'
        else:
            likely = f"optimizer.learning_rate = {self.config.optimizer.learning_rate:g} is too high, or loss.beta"
            likely += " or loss.fidelity" if self.config.loss.fidelity else ""
        last = self._checkpoints.latest()
        raise TrainingError(
            f"Step {self.progress.step + 1} gave numbers that are not finite (rows {named} of the training data, "
            f"counted from 0). Most likely {likely}. Nothing of this step was kept; "
            + (f"the last checkpoint is {last}." if last else "there is no checkpoint yet.")
        )

    def _validate(self) -> None:
        if not self.config.validation.every:
            return
        with self.averaged():
            values = self._validation.run(self.policy, self.effects, self._loss)
        if values:
            self._log(self.progress.step, values)

    def _summary(self, table: Tensor) -> dict[str, float]:
        values = summarise(table, self._timesteps)
        loss = self.config.loss
        if (loss.winner_anchor or loss.final_winner_anchor) and "loss" in values:  # there are preferences
            # Before it is multiplied by either value, so that the curve does not jump at the switch.
            records, _ = PairRecords.split(table)
            weights = error_weights(self.policy.scheduler, records.timestep.long(), loss.timestep_weight_limit)
            values["anchor"] = float((weights * records.chosen_error).mean())
        return values

    def _adapter_values(self) -> dict[str, float]:
        adapter = self.accelerator.unwrap_model(self.effects).adapter
        return adapter_norms(adapter) | device_memory(self.accelerator.device)

    def _log(self, step: int, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=step)
        if self._metrics is not None:
            self._metrics.write(step, values)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return list(self.effects.parameters())

    @property
    def _loss(self) -> LossSection:
        return self.config.loss.at(self.progress.step, self.config.run.steps)

    @property
    def _timesteps(self) -> int:
        return int(self.policy.scheduler.config.num_train_timesteps)
