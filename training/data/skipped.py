"""Rows that are left out: reported, and no more of them than allowed."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import DataError


class Skipped:
    """Reports of unusable rows by row number; one more than ``limit`` is an error."""

    def __init__(self, limit: int) -> None:
        """Allow ``limit`` rows (``data.max_skipped``)."""
        self._limit = limit
        self._reports: dict[int, str] = {}

    @property
    def reports(self) -> Mapping[int, str]:
        """What is wrong with each row."""
        return dict(sorted(self._reports.items()))

    def add(self, row: int, report: str) -> None:
        """Leave a row out; a row that is left out already keeps its first report.

        Raises:
            DataError: it is one row too many.
        """
        self._reports.setdefault(row, report)
        if len(self._reports) > self._limit:
            raise DataError(
                f"{report} (data.max_skipped leaves out up to {self._limit} unusable rows; this is one more. Correct "
                "the data, or raise it.)"
            )
