"""The exceptions of this room; each message says what was found, what was expected, and what to do."""

from __future__ import annotations

from typing import Any


class ComfyUIError(RuntimeError):
    """A ComfyUI server did not start, refused a workflow, or failed while running one.

    ``details`` is what the server reported, as it came.
    """

    def __init__(self, message: str, details: Any = None) -> None:
        """Keep the message and the server's report."""
        super().__init__(message)
        self.details = details


class TrainingError(RuntimeError):
    """A training run cannot start or go on: its configuration, the machine, or the numbers."""


class DataError(TrainingError):
    """A data set, an image, a user table or a cache cannot be used."""


class BaseModelError(TrainingError):
    """A base model cannot be opened, or is of a kind that no adapter can be trained for."""
