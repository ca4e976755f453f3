"""``psa check-data`` and ``psa encode``: a data set looked at, and users encoded, from the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .config import EncoderSection
from .cores import usable_cores
from .errors import DataError, TrainingError

if TYPE_CHECKING:
    from .data.check import Report

# So many of each kind of finding are shown, and the number of the others.
_SHOWN = 10


def check_data(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A Sage split folder, or a datasets folder.")],
    embeddings: Annotated[Path | None, typer.Option(help="The folder of <User_ID>.npy, if you train with one.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read images.")] = usable_cores(),
) -> None:
    """Read a whole set of preference pairs and report what is in it; exit code 1 if it cannot be trained on."""
    with _training_parts():
        from .data.check import check_pairs
    with Progress(SpinnerColumn(), TextColumn("{task.completed} rows read"), console=_messages()) as progress:
        report = check_pairs(folder, embeddings, workers, progress)
    console = Console(soft_wrap=True, highlight=False)
    console.print(_summary(report))
    for title, findings in (report.obstacles | report.oddities).items():
        for finding in findings[:_SHOWN]:
            console.print(f"{title}: {finding}", markup=False)
        if len(findings) > _SHOWN:
            console.print(f"{title}: and {len(findings) - _SHOWN} more")
    if report.reasons:
        console.print(f"It cannot be trained on: {'; '.join(report.reasons)}.", style="red", markup=False)
        raise typer.Exit(1)
    console.print("It can be trained on.", style="green")
    if against := report.reasons_against_fidelity:
        console.print(f"Not with loss.fidelity: {'; '.join(against)}.", markup=False)
    elif unknown := report.rows - report.known_categories:
        console.print(f"With loss.fidelity, too; rows of unknown category, which stay preferences: {unknown}.")
    else:
        console.print("With loss.fidelity, too.")


def encode(
    users: Annotated[Path, typer.Argument(metavar="USERS", help="A users.csv, or a set of preference pairs.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder for <User_ID>.npy.")],
    kind: Annotated[str, typer.Option(help="attributes, or llm.")] = "attributes",
    name: Annotated[str | None, typer.Option(help="For llm: the model's name or hub id.")] = None,
    template: Annotated[Path | None, typer.Option(help="For llm: a prompt template instead of this pack's.")] = None,
    language_models: Annotated[
        list[Path] | None, typer.Option(help="For llm: where language models lie (repeatable).")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Users at once.")] = 8,
) -> None:
    """Write an embedding for each user; those that are there already stay. Under `accelerate launch` in parallel."""
    section = _encoder_section(
        kind=kind, name=name, template=template, folders=language_models or None, batch_size=batch_size
    )
    with _training_parts():
        import torch
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        from .data.pairs import open_pairs
        from .data.users import distinct_users, encode_users, make_encoder, read_users
    # Processes on CPUs are each alone unless the state is told of the CPU.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available())
    table = read_users(users) if users.is_file() else distinct_users(open_pairs(users))
    share = dict(islice(table.items(), state.process_index, None, state.num_processes))
    columns = (TextColumn("users"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_messages(), disable=not state.is_local_main_process) as progress:
        task = progress.add_task("users", total=len(share))
        encode_users(
            share,
            output,
            make_encoder(section, state.device),
            section.batch_size,
            lambda count: progress.advance(task, count),
        )


def _encoder_section(**options: Any) -> EncoderSection:
    try:
        return EncoderSection(**{option: value for option, value in options.items() if value is not None})
    except ValidationError as error:
        problems = "; ".join(
            f"{'--' + str(details['loc'][0]) + ': ' if details['loc'] else ''}"
            f"{str(details['msg']).removeprefix('Value error, ')}"
            for details in error.errors()
        )
        raise DataError(f"There is no such encoder: {problems}.") from None


@contextmanager
def _training_parts() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise TrainingError(f"This needs {error.name}: pip install -e '.[train]' in this pack's folder.") from None


def _messages() -> Console:
    return Console(stderr=True, highlight=False)


def _summary(report: Report) -> Table:
    table = Table("what", "count")
    table.add_row("rows", str(report.rows))
    table.add_row("users", str(report.users))
    of = "users that ban" if report.banned_by_users else "rows of the category"
    for category, count in sorted(report.categories.items()):
        table.add_row(Text(f"{of} {category}"), str(count))
    for (width, height), count in report.sizes.most_common(_SHOWN):
        table.add_row(f"images of {width} x {height} pixels", str(count))
    if others := sum(report.sizes.values()) - sum(count for _, count in report.sizes.most_common(_SHOWN)):
        table.add_row("images of other sizes", str(others))
    for title, findings in (report.obstacles | report.oddities).items():
        table.add_row(title, str(len(findings)))
    return table
