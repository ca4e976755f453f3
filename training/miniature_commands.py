"""``psa miniature``: trains the miniature from nothing, adapters for it, and shows what they do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import Progress

from .errors import TrainingError
from .miniature import MINIATURE, PAIRS, PEOPLE, SEED
from .progress import progress_bar
from .train_commands import interruptions

miniature_app = typer.Typer(help="The miniature: a small text-to-image model of a drawn world.", no_args_is_help=True)

_Work = Annotated[Path, typer.Option(help="Where an interrupted run goes on from.")]
_Seed = Annotated[int, typer.Option(help="The same seed gives the same pictures, people and weights.")]
_Base = Annotated[Path, typer.Option(help="The miniature's folder.")]
_Models = Annotated[
    list[Path] | None, typer.Option(help="A folder of language models, for adapters that name one (repeatable).")
]
_FirstPhrases = Annotated[bool, typer.Option(help="What is implied is so by the first phrase of its category alone.")]
_MODELS = (Path("models/LLM"),)


def _is_json(path: Path) -> Path:
    """Refuse, before anything is drawn, a file that what is written beside it would replace."""
    if path.suffix != ".json":
        raise typer.BadParameter(f"{path} is no .json file. Name one; tables and plots go beside it.")
    return path


_Results = Annotated[
    Path, typer.Option(callback=_is_json, help="The results to write, .json; tables and plots go beside it.")
]


@miniature_app.command("train-base")
def train_base(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The diffusers folder to write.")],
    work: _Work = Path("runs/miniature-base"),
    seed: _Seed = SEED,
) -> None:
    """Train autoencoder, detector, text model and UNet from nothing."""
    with _recipe() as progress:
        from .miniature.recipe import train_base as recipe

        figures = recipe(work, output, progress, seed)
    Console(highlight=False).print_json(data=figures)


@miniature_app.command("draw")
def draw_pairs(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    pairs: Annotated[int, typer.Option(min=1, help="How many preference pairs.")] = PAIRS,
    people: Annotated[int, typer.Option(min=2, help="How many simulated people they belong to.")] = PEOPLE,
    seed: _Seed = SEED,
    static: Annotated[bool, typer.Option(help="Everybody bans everything, for a static adapter.")] = False,
    first_phrases: _FirstPhrases = False,
) -> None:
    """Draw preference pairs of the drawn world in Sage's format."""
    with _recipe() as progress:
        from .miniature.pairs import Style, draw_folder

        draw_folder(output, pairs, people, seed, Style(static, first_phrases), progress)


@miniature_app.command("train-adapter")
def train_adapter(
    base: _Base = MINIATURE,
    work: Annotated[Path, typer.Option(help="Pairs, cache and results go here.")] = Path("runs/miniature"),
    static: Annotated[bool, typer.Option(help="Everybody bans everything: the static baseline.")] = False,
    first_phrases: _FirstPhrases = False,
    name: Annotated[str | None, typer.Option(help="Of the run and its file; another run needs another one.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the training; the pairs stay the same.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting (repeatable).")
    ] = None,
) -> None:
    """Draw preference pairs, if they are not there, and train an adapter on them."""
    changes = [*(overrides or ()), *([] if seed is None else [f"run.seed={seed}"])]
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with _recipe() as progress:
        from .miniature.adapters import train_adapter as recipe
        from .miniature.pairs import Style

        with interruptions(console):
            recipe(base, work, Style(static, first_phrases), name, changes, console, progress)


@miniature_app.command()
def evaluate(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]ADAPTER...", help="Adapters; the same name stands for other seeds of one."),
    ],
    output: _Results,
    base: _Base = MINIATURE,
    static: Annotated[Path | None, typer.Option(help="A static adapter to compare with.")] = None,
    per_cell: Annotated[int, typer.Option(min=2, help="Pictures in each cell.")] = 300,
    strengths: Annotated[
        list[float] | None, typer.Option("--strength", help="Of the adapters, 1 by default (repeatable).")
    ] = None,
    seen: Annotated[bool, typer.Option(help="Ask people of the training.")] = True,
    unseen: Annotated[bool, typer.Option(help="Ask people whom no training saw.")] = True,
    likeness: Annotated[
        int, typer.Option(min=0, help="Pictures in each cell to compare with the base's; 0: do not compare.")
    ] = 0,
    trial: Annotated[
        int, typer.Option(min=0, help="Another one draws other unseen people, other prompts and other noise.")
    ] = 0,
    work: _Work = Path("runs/miniature/counted"),
    models: _Models = None,
) -> None:
    """Measure adapters against the base, a negative prompt and a static adapter."""
    with _recipe() as progress:
        from .miniature.adapters import Asked, write_results
        from .miniature.adapters import evaluate as recipe

        output.parent.mkdir(parents=True, exist_ok=True)
        asked = Asked(per_cell, tuple(strengths or (1.0,)), seen, unseen, likeness, trial)
        named = [_named(text) for text in adapters]
        results = recipe(base, named, static, asked, models or _MODELS, work, progress)
        write_results(results, output)
    Console(highlight=False, soft_wrap=True).print(results["markdown"], markup=False)


@miniature_app.command()
def ablation(
    output: _Results,
    plan: Annotated[
        Path | None, typer.Option(help="What to train and to compare, by default training/miniature/ablation.toml.")
    ] = None,
    base: _Base = MINIATURE,
    work: Annotated[Path, typer.Option(help="Trainings and counts go here, and are not made again.")] = Path(
        "runs/miniature"
    ),
    models: _Models = None,
) -> None:
    """Train adapters of several kinds, with several losses and seeds, and compare them on unseen people."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with _recipe() as progress:
        from .miniature.ablation import PLAN, load_ablation, run_ablation

        output.parent.mkdir(parents=True, exist_ok=True)
        with interruptions(console):
            table = run_ablation(load_ablation(plan or PLAN), base, work, models or _MODELS, output, console, progress)
    Console(highlight=False, soft_wrap=True).print(table, markup=False)


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.rpartition("=")
    return (name if equals else Path(path).stem), Path(path)


@contextmanager
def _recipe() -> Iterator[Progress]:
    """Show progress, as a bar or, in a log file, as lines; say what to install if a package is missing."""
    console = Console(stderr=True)
    if not console.is_terminal:
        logging.basicConfig(
            level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
        )
    try:
        with progress_bar(console) as progress:
            yield progress
    except OSError as error:
        raise TrainingError(
            f"{error.filename or 'A file'} cannot be written ({error.strerror}). Make room, or name another folder."
        ) from None
    except ModuleNotFoundError as error:
        raise TrainingError(
            f"The miniature's training needs {error.name}: pip install -e '.[train]' in this pack's folder."
        ) from None
