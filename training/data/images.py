"""From the image files of a pair to two tensors that share flip and crop. Knows no model and no cache."""

from __future__ import annotations

import hashlib
import io
import zlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...safe_files import DAMAGE
from ..errors import DataError
from .pairs import ImageSource, Pair

CropMode = Literal["center", "random"]

# What Pillow raises beyond the usual on files that are cut off, something else, or unreasonably large.
_IMAGE_DAMAGE: tuple[type[Exception], ...] = (*DAMAGE, SyntaxError, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Crop:
    """SDXL's micro-conditioning, in pixels of the chosen image.

    ``original_size`` is (height, width) before resizing, as people see the image: turned as its EXIF data say.
    ``top_left`` is where the crop begins in the image after resizing and, if ``flipped``, mirroring.
    """

    original_size: tuple[int, int]
    top_left: tuple[int, int]
    flipped: bool


class _Position(NamedTuple):
    """Where a crop lies between the top left (0) and the bottom right (1) of what it can reach."""

    top: float
    left: float

    def in_image(self, image: Image.Image, resolution: int) -> tuple[int, int]:
        # Of n + 1 places each is drawn equally often, and 0.5 is the one in the middle.
        return int(self.top * (image.height - resolution + 1)), int(self.left * (image.width - resolution + 1))


def load_pair(pair: Pair, resolution: int, crop: CropMode, flip: bool, seed: int) -> tuple[Tensor, Tensor, Crop]:
    """Return the chosen and the rejected image, ``[3, resolution, resolution]`` in [-1, 1], and their crop.

    Images are turned upright, put on white where they are transparent, resized (Lanczos) so that the shorter side
    is ``resolution``, mirrored and cropped. Mirroring (with ``flip``, for every second pair) and the place of a
    ``"random"`` crop depend on ``seed`` and ``pair.row`` alone. If the two images differ in shape, the crop lies at
    the same share of what is left over: in the middle of both, or at the top left of both.

    Raises:
        DataError: an image is missing or broken.
    """
    mirror, top, left = _draw(seed, pair.row)
    flipped = flip and mirror < 0.5
    position = _Position(top, left) if crop == "random" else _Position(0.5, 0.5)
    original = open_image(pair.chosen, "chosen", pair.where)
    chosen, top_left = _cut(original, resolution, position, flipped)
    rejected, _ = _cut(open_image(pair.rejected, "rejected", pair.where), resolution, position, flipped)
    return chosen, rejected, Crop((original.height, original.width), top_left, flipped)


def _draw(seed: int, row: int) -> list[float]:
    """Draw three numbers in [0, 1), the same whatever they are used for, so that settings do not shift each other."""
    digest = hashlib.sha256(f"{seed}:crop:{row}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return torch.rand(3, generator=generator).tolist()


def open_image(source: ImageSource, side: str, where: str) -> Image.Image:
    """Return an upright RGB image."""
    name = f"the {side} image" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise DataError(f"{where}: there is no image file {name}. Put it there, or drop the row.") from None
    except _IMAGE_DAMAGE as error:
        raise DataError(
            f"{where}: {name} cannot be read as an image ({error}). It is damaged or not fully copied: replace it, or "
            "drop the row."
        ) from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would cut off everything above 255.
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers, Pillow's mode {image.mode}, expected 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _cut(image: Image.Image, resolution: int, position: _Position, flipped: bool) -> tuple[Tensor, tuple[int, int]]:
    """Return ``[3, resolution, resolution]`` in [-1, 1] and the top left corner of the crop."""
    scale = resolution / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    if flipped:
        image = ImageOps.mirror(image)
    top, left = position.in_image(image, resolution)
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels / 127.5 - 1, (top, left)
