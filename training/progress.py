"""The progress bar of everything that trains: description, bar, count, time that is left, and a ``state``."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar(console: Console, shown: bool = True) -> Progress:
    """Return a bar on ``console``; where that is no terminal, or unless ``shown``, it draws nothing.

    Every task needs a field ``state``, the text behind the bar.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    return Progress(*columns, console=console, disable=not (shown and console.is_terminal))
