"""One loop for all that is trained from nothing here: resumable, with a moving average of the weights."""

from __future__ import annotations

import logging
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ...safe_files import DAMAGE, replacing
from ..errors import TrainingError

logger = logging.getLogger(__name__)

_UNREADABLE: tuple[type[Exception], ...] = (*DAMAGE, pickle.UnpicklingError)
_WARMUP = 100
_MAX_GRAD_NORM = 1.0
_SAVE_EVERY = 200


@dataclass(frozen=True)
class Plan:
    """How something is trained; the learning rate rises over 100 steps and falls as a cosine, once in every cycle."""

    name: str
    steps: int
    learning_rate: float
    ema_decay: float = 0.995
    weight_decay: float = 0.0
    cycles: int = 1


# Which rows of a step's batch.
Part = slice
WHOLE = Part(None)

Loss = Callable[[int, Part], Tensor]


def halves(batch: int) -> tuple[Part, Part]:
    """Return the two halves of a batch."""
    return Part(0, batch // 2), Part(batch // 2, batch)


def fit(
    plan: Plan,
    model: nn.Module,
    loss: Loss,
    folder: Path,
    seed: int,
    progress: Progress,
    parts: Sequence[Part] = (WHOLE,),
) -> None:
    """Train ``model`` in place and leave the moving average of its weights in it, ready for inference.

    ``loss`` maps the number of a step and a part of its batch to a scalar; what it draws has to depend on that number
    alone, so that a run that was interrupted goes on from ``<folder>/<name>.pt`` as if it had not been. ``parts`` are
    equally large; each has a thread of its own, because small models gain nothing from two threads in one operation.

    Raises:
        TrainingError: the saved state cannot be read, or is of another plan or seed.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), plan.learning_rate, (0.9, 0.99), weight_decay=plan.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, plan.steps // plan.cycles))
    average = AveragedModel(model, avg_fn=_moving_average(plan.ema_decay))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{plan.name}.pt"
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule, "average": average}
    made = {"seed": seed, **asdict(plan)}
    first = _load(path, state, made) if path.exists() else 0
    task = progress.add_task(f"Training the {plan.name}", total=plan.steps, completed=first, state="")
    model.train()
    with _gradients(model, loss, parts) as gradients:
        for step in range(first, plan.steps):
            value = gradients(step)
            nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            average.update_parameters(model)
            progress.update(task, advance=1, state=f"loss {value.item():.4f}")
            if (step + 1) % _SAVE_EVERY == 0 or step + 1 == plan.steps:
                logger.info("PSA: %s: step %d of %d, loss %.4f", plan.name, step + 1, plan.steps, value.item())
                with replacing(path) as aside:
                    torch.save(
                        {"step": step + 1, "made": made, **{name: part.state_dict() for name, part in state.items()}},
                        aside,
                    )
    model.load_state_dict(average.module.state_dict())
    model.eval().requires_grad_(False)


@contextmanager
def _gradients(model: nn.Module, loss: Loss, parts: Sequence[Part]) -> Iterator[Callable[[int], Tensor]]:
    """Yield a function that leaves the gradient of a step in the weights, and returns its loss."""
    weights = list(model.parameters())

    def share(step: int, part: Part) -> tuple[Tensor, tuple[Tensor, ...]]:
        value = loss(step, part)
        return value.detach(), torch.autograd.grad(value, weights)

    each = max(1, torch.get_num_threads() // len(parts))
    with ThreadPoolExecutor(len(parts), initializer=torch.set_num_threads, initargs=(each,)) as threads:

        def gradients(step: int) -> Tensor:
            values, shares = zip(*threads.map(partial(share, step), parts), strict=True)
            for weight, *found in zip(weights, *shares, strict=True):
                # Laid out as the weight is (channels last): the fused optimizer takes both as rows of numbers.
                weight.grad = torch.empty_like(weight).copy_(torch.stack(found).mean(dim=0))
            return torch.stack(values).mean()

        yield gradients


def _moving_average(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        # Shorter at first, so that the first weights are soon forgotten.
        kept = min(decay, (1 + int(count)) / (10 + int(count)))
        return torch.lerp(current, averaged, kept)

    return average


def _rate(step: int, steps: int) -> float:
    step %= steps
    warm = min(1.0, (step + 1) / _WARMUP)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _load(path: Path, parts: dict[str, Any], made: dict[str, Any]) -> int:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["made"]
        if found == made:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            return int(state["step"])
    except _UNREADABLE as error:
        raise TrainingError(
            f"{path} cannot be continued ({error!r:.200}). Delete it to train this part from its beginning."
        ) from None
    raise TrainingError(
        f"{path} is of another run ({_listed(found)}), and this one is to be made with {_listed(made)}. Name another "
        "folder with --work, or delete that file."
    )


def _listed(made: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in made.items() if name != "name")
