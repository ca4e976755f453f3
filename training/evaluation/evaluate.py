"""``psa evaluate``: from a configuration to a report, read from top to bottom."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console

from ..progress import progress_bar
from .config import EvaluationConfig
from .drawing import draw, processes

Part = Literal["draw", "assess"]


def evaluate(config: EvaluationConfig, console: Console, only: Part | None = None) -> Path | None:
    """Draw what is missing, measure and judge it, and return the report; the folder if it is ``only`` drawn.

    Under a launcher every process draws its share, and the main one does the rest; the others return None.

    Raises:
        TrainingError, DataError, BaseModelError, AdapterError, EncoderError, ComfyUIError: what is wrong, and what
            to do.
    """
    state = processes()
    with progress_bar(console, shown=state.is_main_process) as progress:
        if only != "assess":
            draw(config, state, console, progress)
        if not state.is_main_process:
            return None
        if only == "draw":
            return config.run.output
        from .assess import assess

        return assess(config.run.output, config.assess, progress)
