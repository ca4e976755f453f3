"""Pictures as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..gallery import Shown


def to_bytes(image: PIL.Image.Image) -> Tensor:
    """Return ``[3, height, width]`` of bytes."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def batches(images: Sequence[Shown], batch_size: int) -> Iterator[Sequence[Shown]]:
    """Yield pictures of one size together, in their order, at most ``batch_size``."""
    for _, same in groupby(images, key=lambda shown: (shown.picture.width, shown.picture.height)):
        members = list(same)
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]
