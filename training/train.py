"""``psa train``: the recipe of a run, from a configuration to an adapter file, read from top to bottom."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from diffusers import DDPMScheduler
from rich.console import Console

from ..adapter import save_adapter
from ..profiles.encoders.attributes import DIM as ATTRIBUTES_DIM
from ..safe_files import replacing
from .base import BaseModel, open_base
from .config import TrainConfig
from .data.pairs import open_pairs
from .dpo.checkpoints import Checkpoints
from .dpo.draws import Draws
from .dpo.grids import draw_grid
from .dpo.optimizers import check_optimizer
from .dpo.plan import Plan, plan
from .dpo.policy import DTYPES, Policy, configure_unet
from .dpo.report import GRIDS, write_report
from .dpo.signals import StopSignals
from .dpo.trainer import StepReport, Trainer
from .dpo.validation import Validation
from .errors import DataError, TrainingError
from .preparation import TrainingData, make_adapter, prepare_data, seeded
from .progress import progress_bar

# What the progress bar says: a value, what it is called, and how it is written.
_STATE = (
    ("loss", "loss", ".4f"),
    ("implicit_accuracy", "accuracy", ".2f"),
    ("margin", "margin", ".3g"),
    ("deviation", "deviation", ".2g"),
)


class StoppedError(TrainingError):
    """A signal ended the run early; it can go on from its last checkpoint.

    ``signal`` is the signal's number, ``speaks`` says whether this rank is the one that tells people.
    """

    def __init__(self, message: str, signal: int, speaks: bool) -> None:
        """Keep what the command needs to end."""
        super().__init__(message)
        self.signal = signal
        self.speaks = speaks


def dry_run(config: TrainConfig) -> Plan:
    """Return what a run would be, without loading a weight or an image; pairs are counted if they are there."""
    known = config.data.embeddings is None and config.data.encoder.kind == "attributes"
    base = open_base(config.model.base, config.model.prediction_type)
    _make_draws(config, base.noise_scheduler())  # refuses timesteps that the model has not
    try:
        pairs = open_pairs(config.data.train).count()
    except DataError:
        pairs = None
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return plan(config, base, ranks, embedding_dim=ATTRIBUTES_DIM if known else None, pairs=pairs)


def train(config: TrainConfig, console: Console) -> Path:
    """Train an adapter and return its file.

    Raises:
        TrainingError, DataError, BaseModelError, AdapterError, EncoderError: what is wrong, and what to do.
        StoppedError: SIGINT or SIGTERM came; the last step is saved.
    """
    accelerator = _make_accelerator(config)
    # What cannot work is refused before anything is cached.
    Checkpoints(accelerator, config, {}, {}).start()
    base = open_base(config.model.base, config.model.prediction_type)
    check_optimizer(config.optimizer, accelerator.device)
    configure_unet(base.empty_unet(), config.model)
    scheduler = base.noise_scheduler()
    draws = _make_draws(config, scheduler)
    with progress_bar(console, shown=accelerator.is_main_process) as progress:
        data = prepare_data(config, base, accelerator.state, draws, progress)
        adapter = seeded(make_adapter(config, base, data), draws)

        unet = base.unet(DTYPES[config.model.dtype]).to(accelerator.device)
        configure_unet(unet, config.model)
        policy = Policy(unet, scheduler, adapter)
        policy.checkpoint_gradients(config.model)
        if config.model.compile:
            unet.compile()

        validation = Validation(accelerator, dict(data.validation), config.validation.pairs, config.run.batch_size)
        made_from = {"pairs": data.train.digest(), "weights of the base model": base.fingerprint("unet")}
        if config.loss.fidelity:
            made_from["categories or bans"] = data.train.allowed_digest()
        trainer = Trainer(config, accelerator, policy, adapter, data.train, validation, made_from)
        _take_back_grids(accelerator, config, trainer.progress.step)
        _start_trackers(accelerator, config, trainer.progress.step)
        bar = progress.add_task("training", total=config.run.steps, completed=trainer.progress.step, state="")
        with StopSignals() as stop:
            for report in trainer.steps(stop):
                progress.update(bar, completed=report.progress.step, state=_state(report))
                _say_line(console, config, accelerator, report)
                every = config.validation.grid_every
                if every and report.progress.step % every == 0:
                    _draw_grid(config, base, data, trainer)

    finished = trainer.progress.step >= config.run.steps
    target = config.run.output / f"{config.adapter.name}.safetensors"
    trained = trainer.adapter()
    if trained is not None:
        if finished:
            save_adapter(trained, target, DTYPES[config.adapter.dtype])
        write_report(config.run.output, config, _facts(config, accelerator, data, trainer))
    accelerator.end_training()
    if not finished:
        raise StoppedError(
            f"Stopped at step {trainer.progress.step} of {config.run.steps}; everything is saved. Go on with the same "
            "command and --set run.resume=latest.",
            signal=stop.received or signal.SIGTERM,
            speaks=accelerator.is_main_process,
        )
    if accelerator.is_main_process:
        console.print(f"{target}: put it into ComfyUI's models/psa_adapters.", markup=False)
    return target


def _make_accelerator(config: TrainConfig) -> Accelerator:
    try:
        config.run.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"run.output = {config.run.output} cannot be made ({error.strerror}). Name another folder."
        ) from None
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    steps = GradientAccumulationPlugin(num_steps=config.run.accumulation, sync_with_dataloader=False)
    folders = ProjectConfiguration(project_dir=str(config.run.output), logging_dir=str(config.run.output / "logs"))
    try:
        accelerator = Accelerator(
            # Ranks on CPUs find each other only if accelerate is told of the CPU.
            cpu=ranks > 1 and not torch.cuda.is_available(),
            # What is trained is float32; the frozen UNet has its dtype from the configuration.
            mixed_precision="no",
            gradient_accumulation_plugin=steps,
            log_with=list(config.tracking.trackers) or None,
            project_config=folders,
        )
    except ValueError as error:
        raise TrainingError(
            f"tracking.trackers = {list(config.tracking.trackers)} cannot be used ({error}). Name trackers that "
            "accelerate knows and that are installed, or none: []."
        ) from None
    if ranks != accelerator.num_processes:
        raise TrainingError(
            f"The launcher started {ranks} processes, but they do not find each other: accelerate sees "
            f"{accelerator.num_processes}. Start them with `accelerate launch` or `torchrun`."
        )
    return accelerator


def _make_draws(config: TrainConfig, scheduler: DDPMScheduler) -> Draws:
    loss, timesteps = config.loss, int(scheduler.config.num_train_timesteps)
    if loss.min_timestep >= timesteps:
        raise TrainingError(
            f"loss.min_timestep = {loss.min_timestep} leaves nothing to train: the base model has the timesteps 0 to "
            f"{timesteps - 1}. Choose a smaller one."
        )
    return Draws(
        seed=config.run.seed,
        timesteps=timesteps,
        prompt_dropout=loss.prompt_dropout,
        user_dropout=loss.user_dropout,
        noise_offset=loss.noise_offset,
        min_timestep=loss.min_timestep,
        noises_per_pair=loss.noises_per_pair,
    )


def _start_trackers(accelerator: Accelerator, config: TrainConfig, step: int) -> None:
    # They may go to another machine: names instead of paths, and no users.
    settings = {
        f"{section}.{name}": value.name if isinstance(value, Path) else value
        for section, values in config.model_dump().items()
        for name, value in values.items()
        if isinstance(value, (int, float, str, bool, Path))
    }
    # TensorBoard: what an interrupted run wrote after its checkpoint is taken back.
    tensorboard: dict[str, Any] = {"purge_step": step + 1} if step else {}
    wandb = {"dir": str(config.run.output)}
    try:
        accelerator.init_trackers(config.tracking.project, settings, {"tensorboard": tensorboard, "wandb": wandb})
    except _tracker_failures() as error:
        raise TrainingError(
            f"tracking.trackers = {list(config.tracking.trackers)} cannot start ({error}). Make run.output "
            "writable; for wandb, log in or set WANDB_MODE=offline; or leave it out. What was cached stays."
        ) from None


def _tracker_failures() -> tuple[type[Exception], ...]:
    """Return what trackers raise when they cannot start; W&B's own errors only exist where it is in use."""
    wandb = sys.modules.get("wandb")
    return (OSError, RuntimeError, *((wandb.Error,) if wandb else ()))


def _state(report: StepReport) -> str:
    values = report.values
    found = [f"{title} {values[name]:{form}}" for name, title, form in _STATE if name in values]
    return "  ".join((*found, f"{values['pairs_per_second']:.2f} pairs/s"))


def _say_line(console: Console, config: TrainConfig, accelerator: Accelerator, report: StepReport) -> None:
    """Where no bar can be drawn (a log file), a line now and then says the same."""
    step = report.progress.step
    if accelerator.is_main_process and not console.is_terminal and step % config.tracking.every == 0:
        console.print(f"step {step}/{config.run.steps}  {_state(report)}", highlight=False)


def _take_back_grids(accelerator: Accelerator, config: TrainConfig, step: int) -> None:
    """Delete what a run drew after the checkpoint that this one goes on from, as its metrics are taken back."""
    if accelerator.is_main_process and step:
        for path in (config.run.output / GRIDS).glob("step-*.png"):
            drawn_at = path.stem.removeprefix("step-")
            if drawn_at.isdigit() and int(drawn_at) > step:
                path.unlink(missing_ok=True)


def _draw_grid(config: TrainConfig, base: BaseModel, data: TrainingData, trainer: Trainer) -> None:
    adapter = trainer.adapter()
    if adapter is not None and data.grid_users:
        device = trainer.accelerator.device
        adapter.to(device)
        columns = {name: adapter.effect(user[None].to(device)) for name, user in data.grid_users.items()}
        captions = config.validation.grid_prompts
        texts = {caption: data.cached.text(caption) for caption in (*captions, "")}
        step = trainer.progress.step
        image = draw_grid(
            base,
            trainer.policy,
            columns={"base": None, **columns},
            captions=captions,
            texts=texts,
            config=config.validation,
            device=device,
            seed=config.run.seed,
            resolution=config.data.resolution,
        )
        path = config.run.output / GRIDS / f"step-{step:06d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as aside:
                image.save(aside, format="PNG")
        except OSError as error:
            raise TrainingError(
                f"{path} cannot be written ({error.strerror}). Make room there, and go on from the last checkpoint: "
                "--set run.resume=latest."
            ) from None
        trainer.log_image("grid", image)
    trainer.accelerator.wait_for_everyone()


def _facts(config: TrainConfig, accelerator: Accelerator, data: TrainingData, trainer: Trainer) -> dict[str, str]:
    return {
        "steps": f"{trainer.progress.step} of {config.run.steps}",
        "pairs per step": str(trainer.pairs_per_step),
        "training pairs": f"{len(data.train.indices)} of {len(data.users)} users",
        **({"preferences among them": str(data.train.preferences)} if config.loss.fidelity else {}),
        **{f"{name} pairs": f"{len(batches.indices)}" for name, batches in data.validation.items()},
        **{f"rows of {source} left out": str(count) for source, count in data.left_out.items()},
        "base model": config.model.base.name,
        "devices": f"{accelerator.num_processes} x {accelerator.device.type}",
        "torch": torch.__version__,
    }
