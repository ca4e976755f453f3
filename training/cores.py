"""How many processes or threads are worth starting here."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Return the number of cores that this process may use: in a container often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
