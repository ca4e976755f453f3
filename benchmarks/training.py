"""What training costs: pairs per second and peak memory, against a straightforward trainer, and how they grow.

Run it with ``python benchmarks/training.py``. Each trainer has a process of its own; they take steps in turns. On a
CUDA device it measures SDXL, elsewhere SD1.5, both of full size with random weights, and prints Markdown tables for
docs/benchmarks.md.
"""

from __future__ import annotations

import math
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from rich.console import Console
from rich.progress import track
from trainers import NARROW, SD15, SDXL, PSATrainer, Setting, StraightforwardTrainer

ROUNDS = 10
GROWTH_ROUNDS = 3
COLUMNS = ("measured", "this package", "straightforward", "ratio")

console = Console()


class Load(NamedTuple):
    """How much one step has to do."""

    pairs: int
    resolution: int


class Seconds(NamedTuple):
    """What a step took: by the clock, and on the processor."""

    clock: float
    processor: float


@dataclass(frozen=True)
class Plan:
    """What is measured on a device."""

    setting: Setting
    load: Load
    batch_sizes: tuple[int, ...]
    resolutions: tuple[int, ...]


# With gradient checkpointing, as the paper trained SDXL: without it two pairs of 1024 px fill the largest devices.
CUDA = Plan(Setting(SDXL, "cuda", "bf16", checkpointing=True), Load(2, 1024), (1, 2, 4), (512, 768, 1024))
CPU = Plan(Setting(SD15, "cpu", "fp32", checkpointing=False), Load(1, 256), (1, 2, 4), (128, 256, 384))
CALLS = Load(2, 64)  # for NARROW


class Worker:
    """A trainer in a process of its own."""

    def __init__(self, connection: Connection) -> None:
        """Talk to the trainer through ``connection``."""
        self._connection = connection

    def step(self, load: Load) -> Seconds:
        """Let the trainer take a step and wait for it."""
        self._connection.send(load)
        return self._connection.recv()

    def peak_memory(self) -> int:
        """Return the largest number of bytes that the trainer has held so far."""
        self._connection.send(None)
        return self._connection.recv()


@contextmanager
def working(trainer: type, setting: Setting) -> Iterator[Worker]:
    """Start a trainer; it ends with the block."""
    # Forked processes would share the parent's memory, and cannot use CUDA.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, trainer, setting), daemon=True)
    process.start()
    there.close()
    try:
        yield Worker(here)
    finally:
        here.close()
        process.join()


def _serve(connection: Connection, trainer_class: type, setting: Setting) -> None:
    cuda = setting.device == "cuda"
    diffusers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="psa-benchmark-") as output:
        torch.manual_seed(0)
        trainer = trainer_class(setting, Path(output))
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        while True:
            try:
                load = connection.recv()
            except EOFError:
                return
            if load is None:
                # Kibibytes; loading takes less than a step, so this is a step's peak.
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                connection.send(torch.cuda.max_memory_allocated() if cuda else peak)
                continue
            batch = trainer.batch(*load)
            start = time.perf_counter(), time.process_time()
            loss = trainer.step(batch)  # reading the loss waits for the device
            connection.send(Seconds(time.perf_counter() - start[0], time.process_time() - start[1]))
            if not math.isfinite(loss):
                raise ArithmeticError(f"The loss of {trainer_class.__name__} is {loss}.")


def compare(setting: Setting, load: Load, rounds: int) -> tuple[list[Seconds], list[Seconds], int, int]:
    """Let both trainers take steps in turns; return the times and the peak memory of each, ours first."""
    ours: list[Seconds] = []
    theirs: list[Seconds] = []
    with working(PSATrainer, setting) as psa, working(StraightforwardTrainer, setting) as other:
        sides = [(psa, ours), (other, theirs)]
        for worker, _ in sides:
            worker.step(load)  # the optimizer makes its state
        for _ in track(range(rounds), "Both trainers", console=Console(stderr=True)):
            for worker, seconds in sides:
                seconds.append(worker.step(load))
            sides.reverse()
        return ours, theirs, psa.peak_memory(), other.peak_memory()


def growth(plan: Plan) -> dict[Load, float]:
    """Return the median seconds of our step over the number of pairs and the resolution."""
    loads = [Load(pairs, plan.load.resolution) for pairs in plan.batch_sizes]
    loads += [Load(plan.load.pairs, size) for size in plan.resolutions if size != plan.load.resolution]
    seconds: dict[Load, list[float]] = {load: [] for load in loads}
    with working(PSATrainer, plan.setting) as psa:
        for load in loads:
            psa.step(load)
        for _ in track(range(GROWTH_ROUNDS), "Growth", console=Console(stderr=True)):
            for load in loads:
                seconds[load].append(psa.step(load).clock)
    return {load: statistics.median(values) for load, values in seconds.items()}


def spread(values: list[float]) -> str:
    """Write a median with its quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.2f} (quartiles {low:.2f} to {high:.2f})"


def comparison_rows(plan: Plan) -> Iterator[tuple[str, str, str, str]]:
    """Measure both trainers; yield the rows: what, ours, the straightforward one's, the ratio."""
    ours, theirs, our_peak, their_peak = compare(plan.setting, plan.load, ROUNDS)
    yield from _speed_rows(plan, "", ours, theirs)
    remembered, others, *_ = compare(replace(plan.setting, remembered=True), plan.load, ROUNDS)
    yield from _speed_rows(plan, ", reference remembered", remembered, others)
    yield _memory_row("peak memory", our_peak, their_peak)
    if not plan.setting.checkpointing:
        _, _, *peaks = compare(replace(plan.setting, checkpointing=True), plan.load, 1)
        yield _memory_row("the same with gradient checkpointing", *peaks)


def calls_rows(plan: Plan) -> Iterator[tuple[str, str, str, str]]:
    """Measure both trainers where calls cost more than what they compute; rows as above."""
    setting = replace(plan.setting, family=NARROW, checkpointing=True)
    for what, remembered in (("", False), (", reference remembered", True)):
        ours, theirs, *_ = compare(replace(setting, remembered=remembered), CALLS, ROUNDS)
        yield from _speed_rows(replace(plan, setting=setting, load=CALLS), what, ours, theirs)


def _speed_rows(
    plan: Plan, what: str, ours: list[Seconds], theirs: list[Seconds]
) -> Iterator[tuple[str, str, str, str]]:
    def speed(steps: list[Seconds]) -> str:
        return f"{plan.load.pairs / statistics.median(step.clock for step in steps):.3f}"

    def ratios(field: str) -> str:
        return spread([getattr(b, field) / getattr(a, field) for a, b in zip(ours, theirs, strict=True)])

    yield f"pairs per second{what}", speed(ours), speed(theirs), ratios("clock")
    if plan.setting.device == "cpu":
        first, second = (f"{statistics.median(step.processor for step in steps):.2f} s" for steps in (ours, theirs))
        yield f"processor time of a step{what}", first, second, ratios("processor")


def _memory_row(name: str, ours: int, theirs: int) -> tuple[str, str, str, str]:
    return name, f"{ours / 1e9:.2f} GB", f"{theirs / 1e9:.2f} GB", f"{ours / theirs:.2f}"


def print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a Markdown table."""
    lines = [columns, ("---",) * len(columns), *rows]
    console.print()
    for line in lines:
        console.print(f"| {' | '.join(line)} |", soft_wrap=True, markup=False, highlight=False)


def main() -> None:
    """Measure everything and print the tables."""
    cuda = torch.cuda.is_available()
    plan = CUDA if cuda else CPU
    setting, load = plan.setting, plan.load
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"
    memory = "with" if setting.checkpointing else "without"
    console.print(
        f"{setting.family.name}, {load.resolution} px, pairs per step: {load.pairs}, {setting.dtype}, {memory} "
        f"gradient checkpointing, {device}, torch {torch.__version__}, Python {sys.version.split()[0]}",
        soft_wrap=True,
        highlight=False,
    )
    print_table(COLUMNS, list(comparison_rows(plan)))
    console.print(f"\n{NARROW.name}, {CALLS.resolution} px, pairs per step: {CALLS.pairs}, with gradient checkpointing")
    print_table(COLUMNS, list(calls_rows(plan)))
    rows = [
        (str(pairs), f"{size} px", f"{1 / seconds:.3f}", f"{pairs / seconds:.3f}")
        for (pairs, size), seconds in growth(plan).items()
    ]
    print_table(("pairs per step", "resolution", "steps per second", "pairs per second"), rows)


if __name__ == "__main__":
    main()
