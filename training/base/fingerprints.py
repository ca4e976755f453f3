"""What a part of a base model is: a hash over the contents of its files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from ..errors import BaseModelError

_BLOCK = 1 << 22


def fingerprint(files: Iterable[Path], *details: str) -> str:
    """Return a SHA-256 (hex) over the contents of ``files``, in their order, and over ``details``.

    Raises:
        BaseModelError: a file cannot be read.
    """
    try:
        digests = [_digest(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError as error:
        raise BaseModelError(
            f"{error.filename} cannot be read ({error.strerror}). Make it readable, or get the base model again."
        ) from None
    return hashlib.sha256("\n".join((*digests, *details)).encode()).hexdigest()


@cache
def _digest(file: Path, size: int, changed: int) -> str:
    """Hash a file; its size in bytes and time of change tell whether it is still the one that was hashed before."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
