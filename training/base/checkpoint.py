"""A single-file checkpoint on disk: names, shapes and weights, read as far as they are needed."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...safe_files import DAMAGE
from ..errors import BaseModelError

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth")
SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)


class Checkpoint:
    """The weights in a .safetensors file, or in a pickle (read without running code in it)."""

    def __init__(self, path: Path) -> None:
        """Read the names and shapes.

        Raises:
            BaseModelError: the file is damaged, or a pickle that holds more than weights.
        """
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        with self._reading():
            if path.suffix.lower() in PICKLE_SUFFIXES:
                self.shapes = {name: tuple(tensor.shape) for name, tensor in self._unpickle().items()}
            else:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - it is no mapping
                        self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def read(self, *prefixes: str) -> dict[str, Tensor]:
        """Return the weights whose names begin with one of ``prefixes``, as they lie in the file."""
        wanted = [name for name in self.shapes if name.startswith(prefixes)]
        with self._reading():
            if self.path.suffix.lower() in PICKLE_SUFFIXES:
                tensors = self._unpickle()
                return {name: tensors[name] for name in wanted}
            with safe_open(self.path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in wanted}

    def outline(self, *prefixes: str) -> dict[str, Tensor]:
        """Return the same on the meta device: shapes without weights."""
        return {
            name: torch.empty(shape, device="meta") for name, shape in self.shapes.items() if name.startswith(prefixes)
        }

    def _unpickle(self) -> Mapping[str, Tensor]:
        content: Any = torch.load(
            self.path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(self.path) or None
        )
        while "state_dict" in content:
            content = content["state_dict"]
        return {name: value for name, value in content.items() if isinstance(value, Tensor)}

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except pickle.UnpicklingError as error:
            raise BaseModelError(
                f"{self.path} holds more than weights, and nothing in it is run ({str(error).splitlines()[0]}). "
                "Get the checkpoint as .safetensors."
            ) from None
        except DAMAGE as error:
            raise BaseModelError(
                f"{self.path} cannot be read ({error}). It is damaged, not fully downloaded, or another kind of file: "
                "get it again."
            ) from None
