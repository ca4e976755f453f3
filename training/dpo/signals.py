"""SIGINT and SIGTERM end a run between two steps, not within one."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopSignals:
    """Within the block the first signal is noted in ``received``; a second one acts as it always does."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        """Nothing is received yet."""
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Take the signals over."""
        self._before = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(self, *_exception: object) -> None:
        """Give the signals back."""
        self._give_back()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
