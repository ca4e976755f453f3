"""A cache, opened: latents, text embeddings and user embeddings of preference pairs, mapped from Arrow files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor

from ..base import TextEmbedding
from ..errors import DataError
from .images import Crop


@dataclass(frozen=True, eq=False)
class CachedRow:
    """A pair as training sees it; ``row`` is its number in the source, latents are ``[channels, height, width]``.

    ``allowed`` says whether its user allows what it shows, and is None where nobody asked.
    """

    row: int
    user_id: str
    caption: str
    chosen: Tensor
    rejected: Tensor
    crop: Crop
    allowed: bool | None = None


class CachedPairs:
    """The usable pairs of a source. Tensors come in float32, whatever they are stored as, and belong to the caller.

    ``users`` are the ids of the users of the rows, sorted, ``row_users`` and ``row_captions`` those of each row, and
    ``source_rows`` their numbers in the source; ``skipped`` says of each row that was left out which one it is and why.
    """

    def __init__(
        self,
        pairs: Dataset,
        captions: Dataset,
        users: Dataset,
        latents: Dataset,
        skipped: Mapping[int, str],
        allowed: Sequence[bool] | None = None,
    ) -> None:
        """Join the parts of a cache; ``skipped`` are reports by row number, ``allowed`` is of each row of ``pairs``."""
        self._pairs = pairs
        self._latents, self._captions, self._users = _Tensors(latents), _Tensors(captions), _Tensors(users)
        self.source_rows = tuple(row for row in range(len(pairs)) if row not in skipped)
        self._caption_at = {caption: position for position, caption in enumerate(captions["caption"][:])}
        known = enumerate(zip(users["user_id"][:], users["problem"][:], strict=True))
        self._user_at = {user: position for position, (user, problem) in known if problem is None}
        ids, texts = pairs["user_id"][:], pairs["caption"][:]
        self.row_users: tuple[str, ...] = tuple(ids[row] for row in self.source_rows)
        self.row_captions: tuple[str, ...] = tuple(texts[row] for row in self.source_rows)
        self._allowed = allowed
        self.users: tuple[str, ...] = tuple(sorted(set(self.row_users)))
        self.skipped: tuple[str, ...] = tuple(skipped[row] for row in sorted(skipped))

    def __len__(self) -> int:
        """Return the number of usable pairs."""
        return len(self.source_rows)

    def row(self, index: int) -> CachedRow:
        """Return the usable pair ``index``, from 0."""
        row = self.source_rows[index]
        pair, latents = self._pairs[row], self._latents.row(row)
        original_size, top_left = (tuple(latents[name].int().tolist()) for name in ("original_size", "top_left"))
        return CachedRow(
            row=row,
            user_id=pair["user_id"],
            caption=pair["caption"],
            chosen=latents["chosen"],
            rejected=latents["rejected"],
            crop=Crop(original_size, top_left, bool(latents["flipped"])),
            allowed=self.allowed(index),
        )

    def allowed(self, index: int) -> bool | None:
        """Return whether the user of the usable pair ``index`` allows what it shows; None where nobody asked."""
        return None if self._allowed is None else self._allowed[self.source_rows[index]]

    def text(self, caption: str) -> TextEmbedding:
        """Return the text embedding of a caption of the rows, of the empty one, or of an extra one.

        Raises:
            DataError: the caption is none of them.
        """
        position = self._caption_at.get(caption)
        if position is None:
            raise DataError(f'The caption "{caption}" is not in the cache. Name it when the cache is built.')
        found = self._captions.row(position)
        return TextEmbedding(found["hidden"], found.get("pooled"))

    def user(self, user_id: str) -> Tensor:
        """Return the embedding ``[dim]`` of a user of the rows, or of an extra one.

        Raises:
            DataError: the user is none of them.
        """
        position = self._user_at.get(user_id)
        if position is None:
            raise DataError(f"The user {user_id} is not in the cache. Name them when the cache is built.")
        return self._users.row(position)["embedding"]


class _Tensors:
    """The numbers of a cached part, row by row; read from Arrow itself, which is several times faster than formats."""

    def __init__(self, part: Dataset) -> None:
        self._part = part.with_format("arrow")
        self._shapes = {name: getattr(feature, "shape", (-1,)) for name, feature in part.features.items()}

    def row(self, index: int) -> dict[str, Tensor]:
        """Return all columns that hold numbers as float32 tensors that belong to the caller."""
        table = self._part[index]
        tensors = {}
        for name, shape in self._shapes.items():
            values = table.column(name).chunk(0)
            values = values.storage if isinstance(values, pa.ExtensionArray) else values
            while pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
                values = values.flatten()
            if not (pa.types.is_string(values.type) or pa.types.is_null(values.type)):
                numbers = np.array(values.to_numpy(zero_copy_only=False), dtype=np.float32)
                tensors[name] = torch.from_numpy(numbers.reshape(shape))
        return tensors
