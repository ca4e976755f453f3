"""Text on contact sheets: one font on every machine, and lines broken to a width."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from PIL import ImageFont


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return matplotlib's DejaVu Sans: the same everywhere, with more scripts than Pillow's own font."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Break ``text`` into at most ``lines`` lines of ``width`` pixels, at spaces where there are any."""
    broken = [""]
    for word in text.split():
        if broken[-1] and font.getlength(f"{broken[-1]} {word}") > width:
            broken.append("")
        elif broken[-1]:
            broken[-1] += " "
        for letter in word:
            if font.getlength(broken[-1] + letter) > width:
                broken.append("")
            broken[-1] += letter
    if len(broken) > lines:
        last = broken[lines - 1]
        while last and font.getlength(f"{last}…") > width:
            last = last[:-1]
        broken = [*broken[: lines - 1], f"{last}…"]
    return broken
