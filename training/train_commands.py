"""``psa train``: reads the command line; the recipe is in ``train.py``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .config import load_config
from .errors import TrainingError


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file, or the name of a ready one.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting (repeatable).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show settings, parameters, steps and memory; train nothing.")
    ] = False,
) -> None:
    """Train an adapter with Diffusion-DPO, on one device or under `accelerate launch`."""
    settings = load_config(config, overrides or ())
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        from . import train as recipe
    except ModuleNotFoundError as error:
        raise TrainingError(f"Training needs {error.name}: pip install -e '.[train]' in this pack's folder.") from None
    if dry_run and os.environ.get("RANK", "0") != "0":
        return
    if dry_run:
        Console(highlight=False).print(recipe.dry_run(settings))
        return
    with interruptions(console):
        recipe.train(settings, console)


@contextmanager
def interruptions(console: Console) -> Iterator[None]:
    """Within the block, a run that a signal ended says how to go on, and ends the command as that signal would."""
    from .train import StoppedError

    try:
        yield
    except StoppedError as stopped:
        if stopped.speaks:
            console.print(f"psa: {stopped}", style="yellow", markup=False)
        raise typer.Exit(128 + stopped.signal) from None
