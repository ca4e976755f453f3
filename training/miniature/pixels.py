"""Between pictures and tensors."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import PIL.Image
import torch
from torch import Tensor


def to_pixels(images: Iterable[PIL.Image.Image | np.ndarray]) -> Tensor:
    """Return pictures, or arrays ``[height, width, 3]`` of bytes, as ``[batch, 3, height, width]`` from -1 to 1."""
    array = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> list[PIL.Image.Image]:
    """Return ``[batch, 3, height, width]`` from -1 to 1 as pictures."""
    array = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [PIL.Image.fromarray(image) for image in array]
