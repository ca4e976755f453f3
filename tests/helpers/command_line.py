"""The command ``psa``: called in this process, which has its imports, or run as the program that it is."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

from comfyui_psa.training.cli import main

Result = subprocess.CompletedProcess[str]


def _environment(changes: dict[str, str]) -> dict[str, str]:
    """This process's environment with nothing of ours in it, and with these changes."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PSA_", "FORCE_COLOR"))}
    return clean | {"PYTHONIOENCODING": "utf-8", "COLUMNS": "250", "NO_COLOR": "1"} | changes


def psa(*args: object, answers: str = "", **environment: str) -> Result:
    """Call ``psa`` with these arguments, these lines on its input and nothing of ours in its environment."""
    command, code = ["psa", *map(str, args)], 0
    output, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", command),
        mock.patch.object(sys, "stdin", io.StringIO(answers)),
        mock.patch.dict(os.environ, _environment(environment), clear=True),
        redirect_stdout(output),
        redirect_stderr(errors),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(command, code, output.getvalue(), errors.getvalue())


def program(*args: object, answers: str = "", full_disk: bool = False, **environment: str) -> Result:
    """Run the program, as ``psa``."""
    return subprocess.run(
        [sys.executable, "-m", "comfyui_psa.training", *map(str, args)],
        input=answers,
        capture_output=True,
        encoding="utf-8",
        env=_environment(environment),
        preexec_fn=_fill_the_disk if full_disk else None,
    )


def _fill_the_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
