"""Reads weights from files of torch or safetensors; of pickles nothing but tensors."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ....safe_files import DAMAGE
from .measure import Missing

DAMAGED: tuple[type[Exception], ...] = (*DAMAGE, pickle.UnpicklingError)


def read_weights(path: Path, what: str, advice: str = "get that file again") -> Any:
    """Return what a file holds.

    Raises:
        Missing: it is not there, or does not hold ``what``; then the message ends with ``advice``.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Missing(f"there is no file {path} with {what}: correct its path") from None
    except DAMAGED as error:
        raise Missing(f"{path} does not hold {what} ({_first_line(error)}): {advice}") from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error!s:.120}".split("\n", maxsplit=1)[0]
