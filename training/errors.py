"""The exceptions of this room."""

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
