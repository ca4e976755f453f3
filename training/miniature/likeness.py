"""How alike two pictures are: what a method should not touch should look as the base has it."""

from __future__ import annotations

from collections.abc import Sequence

import PIL.Image
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from .pixels import to_pixels


def likeness(images: Sequence[PIL.Image.Image], others: Sequence[PIL.Image.Image]) -> list[float]:
    """Return the structural similarity (SSIM) of each image with the other one: 1 for the same picture.

    LPIPS would be closer to what people see, but its networks are downloads, and were made for photographs.
    """
    found = structural_similarity_index_measure(_from_0(images), _from_0(others), reduction="none", data_range=1.0)
    assert isinstance(found, Tensor)
    return [float(value) for value in found]


def _from_0(images: Sequence[PIL.Image.Image]) -> Tensor:
    return (to_pixels(images) + 1) / 2
