"""Files: written whole or not at all, and what reading a damaged one can raise."""

from __future__ import annotations

import os
import secrets
import struct
import tokenize
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

PRIVATE = 0o600

# What the readers of torch, numpy, safetensors and transformers raise on files that are cut off or something
# else altogether.
DAMAGE: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
)


def make_private(folder: Path) -> None:
    """Make ``folder`` and those around it that are missing, for their owner alone; raise OSError if that fails."""
    for place in reversed((folder, *folder.parents)):
        place.mkdir(exist_ok=True, mode=0o700)


@contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Yield a new, empty file beside ``path``; rename it over ``path`` if the block succeeds.

    If the block raises, ``path`` is as it was and nothing is left behind; what the file system refuses is an
    OSError. ``mode`` are the permissions,
    set before anything is written (``PRIVATE``: only the owner reads and writes).
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
    try:
        yield aside
        aside.chmod(mode)  # the writer may have made the file anew
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
