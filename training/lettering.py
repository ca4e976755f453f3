"""Text on contact sheets: one font on every machine, and lines broken to a width."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from PIL import ImageFont


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return matplotlib's DejaVu Sans: the same everywhere, with more scripts than Pillow's own font."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)
