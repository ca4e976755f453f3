"""``psa evaluate``: reads the command line; the recipe is in ``evaluation/evaluate.py``."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from .errors import TrainingError


def evaluate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file, or the name of a ready one.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting (repeatable).")
    ] = None,
    only_draw: Annotated[bool, typer.Option("--only-draw", help="Draw the pictures, and stop.")] = False,
    only_assess: Annotated[bool, typer.Option("--only-assess", help="Draw nothing; measure what is there.")] = False,
) -> None:
    """Compare adapters with what else could be done, from prompts to a report. Goes on where it was interrupted.

    Under `accelerate launch -m comfyui_psa.training evaluate CONFIG` the pictures are shared among processes.
    """
    if only_draw and only_assess:
        raise TrainingError("--only-draw and --only-assess together leave nothing to do: choose one.")
    try:
        from .evaluation.config import load_evaluation
        from .evaluation.evaluate import evaluate as recipe
    except ModuleNotFoundError as error:
        raise TrainingError(
            f"An evaluation needs {error.name}: pip install -e '.[train]' in this pack's folder."
        ) from None
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    settings = load_evaluation(config, overrides or ())
    with _ended_in_order():
        result = recipe(settings, console, "draw" if only_draw else "assess" if only_assess else None)
    if result is not None:
        console.print(f"{'Pictures' if only_draw else 'Report'}: {result}", markup=False)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Within the block, the first SIGTERM ends the command as Ctrl+C does: what is held is let go of."""
    before = signal.getsignal(signal.SIGTERM)

    def end(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, before)
        raise SystemExit(128 + number)  # no Exception: nothing takes it for one of its own

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
