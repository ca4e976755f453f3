"""A user embedding: what an encoder makes of a profile, in memory and as a file.

Files are ``.npy`` (the release: float32, ``[dim]`` or ``[users, dim]``) and ``.safetensors`` (tensor
``embedding`` and the metadata ``format``, ``format_version`` and ``encoder``, the encoder's identity).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..safe_files import DAMAGE, PRIVATE, replacing
from .errors import EncoderError
from .schema import Category

FORMAT = "psa_embedding"
FORMAT_VERSION = "1"
SUFFIXES = (".npy", ".safetensors")


@dataclass(frozen=True, repr=False, eq=False)
class SafetyEmbedding:
    """Embeddings ``[users, dim]``, float32 and finite; ``encoder`` is the encoder's identity, if known.

    ``categories`` are what one user bans, where that is known; they are in memory alone and never in a file.

    Raises:
        EncoderError: another shape, or NaN or infinity.
    """

    vectors: Tensor
    encoder: str | None = None
    source: str = "the embedding"
    categories: tuple[Category, ...] | None = None

    def __post_init__(self) -> None:
        """Check the shape and the values."""
        if self.vectors.ndim != 2 or 0 in self.vectors.shape:
            raise EncoderError(
                f"{self.source} has shape {list(self.vectors.shape)}, expected [dim] for one user or [users, dim]. "
                "Make the embedding again."
            )
        if not bool(torch.isfinite(self.vectors).all()):
            raise EncoderError(
                f"{self.source} holds values that are not numbers (NaN or infinity). Make the embedding again, "
                "with a language model in float32 or bfloat16."
            )

    def __repr__(self) -> str:
        """Say no value: ComfyUI prints node inputs into error reports, and an embedding tells of its user."""
        return f"SafetyEmbedding({self.vectors.shape[0]} users)"


def load_embedding(path: Path) -> SafetyEmbedding:
    """Load an embedding file.

    Raises:
        EncoderError: the file is missing, damaged, or not an embedding.
    """
    if not path.is_file():
        raise EncoderError(f"There is no embedding file {path}. Put the embedding there, or choose another one.")
    if path.suffix == ".npy":
        vectors, encoder = _load_npy(path), None
    else:
        vectors, encoder = _load_safetensors(path)
    if not vectors.is_floating_point():
        raise _no_embedding(path)
    vectors = vectors.float()
    return SafetyEmbedding(vectors[None] if vectors.ndim == 1 else vectors, encoder, path.name)


def save_embedding(embedding: SafetyEmbedding, path: Path) -> None:
    """Write an embedding as ``.safetensors``, readable by its owner only."""
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "encoder": embedding.encoder or ""}
    content = save({"embedding": embedding.vectors.contiguous()}, metadata)
    with replacing(path, PRIVATE) as aside:
        aside.write_bytes(content)


def _load_npy(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except DAMAGE:
        raise _no_embedding(path) from None
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise _no_embedding(path)
    with np.errstate(over="ignore"):  # what becomes infinite is refused with a message of its own
        return torch.from_numpy(array.astype(np.float32))


def _load_safetensors(path: Path) -> tuple[Tensor, str | None]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("format_version") != FORMAT_VERSION:
                raise _no_embedding(path)
            return file.get_tensor("embedding"), metadata.get("encoder") or None
    except EncoderError:
        raise
    except DAMAGE:
        raise _no_embedding(path) from None


def _no_embedding(path: Path) -> EncoderError:
    return EncoderError(
        f"{path.name} is not a readable embedding: expected floating-point numbers as .npy, or a .safetensors file "
        f"of the format {FORMAT} version {FORMAT_VERSION}. It is damaged, or another kind of file: make it again."
    )
