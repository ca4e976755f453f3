"""``psa synthetic``: everything that ``psa train`` needs, drawn and random, to try it with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .errors import DataError


def synthetic(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    pairs: Annotated[int, typer.Option(min=4, help="How many preference pairs.")] = 200,
    users: Annotated[int, typer.Option(min=2, help="How many simulated users they belong to.")] = 40,
    seed: Annotated[int, typer.Option(help="The same seed gives the same files.")] = 2025,
) -> None:
    """Write a small checkpoint with random weights and drawn preference pairs, to try the training with."""
    if output.exists() and any(output.iterdir()):
        raise DataError(f"{output} is not empty. Choose a new folder.")
    from .synthetic import write_checkpoint
    from .synthetic_pairs import write_pairs

    try:
        output.mkdir(parents=True, exist_ok=True)
        write_checkpoint(output / "checkpoint.safetensors", seed=seed)
        write_pairs(output / "train", pairs, users, seed)
    except OSError as error:
        raise DataError(
            f"{output} cannot be written ({error.strerror}). Make room, or choose another folder."
        ) from None
    Console(highlight=False, soft_wrap=True).print(
        f"{output}: checkpoint.safetensors (random weights, SD1.x layout) and train ({pairs} pairs, {users} users).",
        markup=False,
    )
