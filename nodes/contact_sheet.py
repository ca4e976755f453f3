"""Draws pictures as a labelled contact sheet: one label above each column, one left of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..line_breaks import wrapped
from .typefaces import fonts_for

NO_COLUMNS = "Compare Sheet has no label in `columns`. Write one for each column: one a line."

_PAPER, _INK = (247, 247, 245), (34, 34, 34)
_LETTERS = 1 / 16  # size of the type, as a share of the shorter side of a picture
_SMALLEST = 12  # pixels that a label needs to be read
_SHRINK = (1.0, 0.85, 0.7)  # for labels that are long, before they are cut
_LINE, _BASELINE = 1.3, 0.95  # in sizes of the type, as all below
_MARGIN, _GAP = 1.5, 0.5
_HEADING_LINES = 3
_NARROWEST, _LOWEST = 7, 2  # of a cell, for pictures that are smaller than what is written beside them
_CAPTION = 0.6  # at most this share of a cell's width


class SheetError(ValueError):
    """The labels do not fit the pictures."""


@dataclass(frozen=True)
class _Label:
    """A text broken into lines."""

    lines: Sequence[str]
    font: ImageFont.FreeTypeFont

    @property
    def width(self) -> int:
        return int(max(map(self.font.getlength, self.lines))) + 1

    @property
    def height(self) -> int:
        return round(len(self.lines) * _LINE * self.font.size)

    def draw(self, draw: ImageDraw.ImageDraw, x: float, top: float, anchor: str) -> None:
        for number, line in enumerate(self.lines):
            y = top + (number * _LINE + _BASELINE) * self.font.size
            draw.text((x, y), line, _INK, self.font, anchor=f"{anchor}s")


def draw_contact_sheet(images: Tensor, columns: Sequence[str], rows: Sequence[str]) -> Tensor:
    """Return the sheet ``[1, height, width, channels]``; the pixels of the pictures stay as they are.

    Args:
        images: ``[rows * columns, height, width, channels]`` from 0 to 1, row by row.
        columns: a label for each column.
        rows: a label for each row; none is one row without a label.

    Raises:
        SheetError: there are no columns, or more or fewer images than places.
    """
    _check(len(images), len(columns), len(rows))
    height, width = images.shape[1:3]
    size = max(_SMALLEST, round(min(height, width) * _LETTERS))
    cell_width, cell_height = max(width, _NARROWEST * size), max(height, _LOWEST * size)
    margin, gap = round(_MARGIN * size), round(_GAP * size)
    fonts = fonts_for([*columns, *rows])
    headings = _fitted(columns, fonts[: len(columns)], size, cell_width, round(_HEADING_LINES * _LINE * size))
    caption_width = max(round(_CAPTION * cell_width), _NARROWEST * size)
    captions = _fitted(rows, fonts[len(columns) :], size, caption_width, cell_height)
    left = margin + (max(caption.width for caption in captions) + 2 * gap if captions else 0)
    top = margin + max(heading.height for heading in headings) + gap
    lefts = [left + number * (cell_width + gap) for number in range(len(columns))]
    tops = [top + number * (cell_height + gap) for number in range(max(1, len(rows)))]

    paper = Image.new("RGB", (lefts[-1] + cell_width + margin, tops[-1] + cell_height + margin), _PAPER)
    draw = ImageDraw.Draw(paper)
    for x, heading in zip(lefts, headings, strict=True):
        heading.draw(draw, x + cell_width / 2, top - gap - heading.height, "m")
    for y, caption in zip(tops, captions, strict=bool(captions)):
        caption.draw(draw, margin, y + (cell_height - caption.height) / 2, "l")

    sheet = images.new_ones((1, paper.height, paper.width, images.shape[3]))  # opaque, if images have transparency
    sheet[0, :, :, :3] = torch.from_numpy(np.asarray(paper, dtype=np.float32) / 255)
    for number, image in enumerate(images):
        row, column = divmod(number, len(columns))
        y, x = tops[row] + (cell_height - height) // 2, lefts[column] + (cell_width - width) // 2
        sheet[0, y : y + height, x : x + width] = image
    return sheet


def _check(images: int, columns: int, rows: int) -> None:
    if not columns:
        raise SheetError(NO_COLUMNS)
    places = columns * max(1, rows)
    if images != places:
        no_rows = "" if rows else "; without a label there it is one row"
        raise SheetError(
            f"Compare Sheet got {images} images for {columns} x {max(1, rows)} places (labels in `columns` x labels in "
            f"`rows`{no_rows}). Connect {places} images, row by row, or write one label a line for each column and for "
            "each row."
        )


def _fitted(
    texts: Sequence[str], fonts: Sequence[ImageFont.FreeTypeFont], largest: int, width: int, height: int
) -> list[_Label]:
    """Break texts into lines at the largest size at which all fit; at the smallest, cut the rest with a sign."""
    for share in _SHRINK:
        size = max(_SMALLEST, round(share * largest))
        lines = max(1, int(height / (_LINE * size)))
        sized = [(text, font.font_variant(size=size)) for text, font in zip(texts, fonts, strict=True)]
        if all(len(wrapped(text, font, width, lines + 1)) <= lines for text, font in sized):
            break
    return [_Label(wrapped(text, font, width, lines), font) for text, font in sized]
