"""Pictures in rows and columns, with labels above and captions beside them."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from ..line_breaks import wrapped
from .lettering import font

_MARGIN, _GAP, _SIDE, _LINE = 20, 10, 200, 21
_SMALLEST_TILE, _LARGEST_TILE = 160, 384
_INK, _MISSING, _PAPER = "#222222", "#e4e4e4", "white"


def picture_grid(
    rows: Sequence[Sequence[Image.Image | None]],
    labels: Sequence[str],
    captions: Sequence[str],
    largest: int = _LARGEST_TILE,
) -> Image.Image:
    """Lay pictures out: labels above the columns, captions left of the rows; None leaves a grey place.

    Pictures with a side above ``largest`` pixels are shrunk.
    """
    shown = [[None if picture is None else _tile(picture, largest) for picture in row] for row in rows]
    there = [picture for row in shown for picture in row if picture is not None]
    tile = max((picture.width for picture in there), default=_SMALLEST_TILE)
    tall = max((picture.height for picture in there), default=_SMALLEST_TILE)
    plain, bold = font(15), font(15, bold=True)
    headings = [wrapped(label, bold, tile, lines=2) for label in labels]
    top = _MARGIN + _LINE * max((len(heading) for heading in headings), default=0) + _GAP
    left = _MARGIN + _SIDE + _GAP
    width = left + len(labels) * (tile + _GAP) - _GAP + _MARGIN
    height = top + len(shown) * (tall + _GAP) - _GAP + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, heading in enumerate(headings):
        middle, bottom = left + i * (tile + _GAP) + tile / 2, top - _GAP
        for j, line in enumerate(reversed(heading)):
            draw.text((middle, bottom - j * _LINE), line, _INK, bold, anchor="md")
    for i, (row, caption) in enumerate(zip(shown, captions, strict=True)):
        y = top + i * (tall + _GAP)
        for j, line in enumerate(wrapped(caption or "(empty)", plain, _SIDE, lines=tall // _LINE)):
            draw.text((_MARGIN, y + j * _LINE), line, _INK, plain)
        for j, picture in enumerate(row):
            x = left + j * (tile + _GAP)
            if picture is None:
                draw.rectangle((x, y, x + tile - 1, y + tall - 1), fill=_MISSING)
            else:
                sheet.paste(picture, (x, y))
    return sheet


def _tile(picture: Image.Image, largest: int) -> Image.Image:
    """Shrink large pictures; enlarge tiny ones in whole pixels, so that nothing is made up."""
    if max(picture.size) > largest:
        factor = largest / max(picture.size)
        size = round(picture.width * factor), round(picture.height * factor)
        return picture.resize(size, Image.Resampling.LANCZOS)
    times = -(-_SMALLEST_TILE // picture.width)
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
