"""The command ``psa``: reads the command line, calls the rooms, shows results and errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..adapter import AdapterError
from ..profiles import EncoderError, ProfileError
from .adapter_commands import convert
from .compile_command import compile_command
from .data_commands import check_data, encode
from .errors import ComfyUIError, TrainingError
from .evaluation_commands import evaluate
from .miniature_commands import miniature_app
from .profile_commands import profile_app, users
from .train_commands import train

app = typer.Typer(
    help="Personalized Safety Alignment: adapters, profiles, training and the demo.",
    no_args_is_help=True,
    # A traceback with local variables would print profiles.
    pretty_exceptions_show_locals=False,
)
app.add_typer(profile_app, name="profile")
app.add_typer(miniature_app, name="miniature")
app.command()(convert)
app.command("compile")(compile_command)
app.command()(check_data)
app.command()(encode)
app.command()(evaluate)
app.command()(train)
app.command()(users)


def _is_png(path: Path) -> Path:
    """Refuse, before anything is drawn, a sheet that its own counts would replace."""
    if path.suffix != ".png":
        raise typer.BadParameter(f"{path} is no .png file. Name one; the counts go beside it.")
    return path


@app.command()
def demo(
    comfyui: Annotated[Path, typer.Option(help="The folder of a ComfyUI (with main.py).", envvar="COMFYUI_PATH")],
    output: Annotated[Path, typer.Option(callback=_is_png, help="The contact sheet to write.")] = Path(
        "demo_output/levels.png"
    ),
    pictures: Annotated[int, typer.Option(min=1, help="Of each prompt; all count, the sheet shows the first.")] = 4,
) -> None:
    """Run "First steps" in a real ComfyUI for the base and the levels L0 to L5, and draw a contact sheet."""
    try:
        from .demo import run_demo
    except ModuleNotFoundError as error:
        raise ComfyUIError(f"The demo needs {error.name}: pip install -e '.[train]' in this pack's folder.") from None
    run_demo(comfyui, output, pictures)


def main() -> None:
    """Run the command; an error of ours is a sentence on stderr and exit code 1."""
    try:
        app()
    except (AdapterError, ProfileError, EncoderError, ComfyUIError, TrainingError) as error:
        Console(stderr=True, soft_wrap=True).print(f"psa: {error}", style="red", markup=False, highlight=False)
        sys.exit(1)
