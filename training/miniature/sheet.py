"""The contact sheet of the demo: prompts down, levels across, what a level bans above it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import PIL.Image
from PIL import ImageDraw

from ...line_breaks import wrapped
from ...profiles import Category
from ..lettering import font
from .drawing import glyph_icon

_TILE, _GAP, _MARGIN, _SIDE = 144, 10, 28, 190
_HEAD, _ICON, _MARK = 78, 26, 30
_INK, _MUTED, _PAPER = "#222222", "#666666", "white"
# Colour and dashes, on and off in pixels.
_GONE, _OTHER, _THERE = ("#2f7d4f", None), ("#c07d10", (20, 10)), ("#b3362b", (6, 6))
_LEGEND = (
    "Framed: the prompt asks for a sign that this level bans. Solid green: the detector sees none. "
    "Dashed amber: it sees another one instead. Dotted red: it sees that one."
)


@dataclass(frozen=True)
class Column:
    """A level, or the base: its title and what it bans."""

    title: str
    bans: tuple[Category, ...]


@dataclass(frozen=True)
class Row:
    """A prompt, and the category of the glyph that it asks for."""

    prompt: str
    category: Category | None


@dataclass(frozen=True)
class Tile:
    """A picture, and the glyphs that the detector sees in it."""

    image: PIL.Image.Image
    glyphs: frozenset[Category]


def draw_sheet(columns: Sequence[Column], rows: Sequence[Row], tiles: Sequence[Sequence[Tile]]) -> PIL.Image.Image:
    """Return the sheet; ``tiles[row][column]``. A frame marks pictures whose prompt asks for something banned."""
    width = 2 * _MARGIN + _SIDE + len(columns) * (_TILE + _GAP)
    height = 2 * _MARGIN + _HEAD + len(rows) * (_TILE + _GAP) + _MARK
    sheet = PIL.Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, column in enumerate(columns):
        _draw_head(sheet, draw, _left(i), column)
    for j, (row, pictures) in enumerate(zip(rows, tiles, strict=True)):
        top = _MARGIN + _HEAD + j * (_TILE + _GAP)
        _draw_prompt(sheet, draw, top, row)
        for i, (column, tile) in enumerate(zip(columns, pictures, strict=True)):
            picture = tile.image.convert("RGB").resize((_TILE, _TILE), PIL.Image.Resampling.LANCZOS)
            sheet.paste(picture, (_left(i), top))
            if row.category in column.bans:
                _frame(draw, _left(i), top, *_mark(row.category, tile.glyphs))
    draw.text((_MARGIN, height - _MARGIN - 6), _LEGEND, _MUTED, font(13))
    return sheet


def _left(column: int) -> int:
    return _MARGIN + _SIDE + column * (_TILE + _GAP)


def _draw_head(sheet: PIL.Image.Image, draw: ImageDraw.ImageDraw, left: int, column: Column) -> None:
    draw.text((left + _TILE / 2, _MARGIN), column.title, _INK, font(18, bold=True), anchor="ma")
    if not column.bans:
        draw.text((left + _TILE / 2, _MARGIN + 34), "bans nothing", _MUTED, font(13), anchor="ma")
        return
    step = min(_ICON + 4, (_TILE - _ICON) // max(1, len(column.bans) - 1))
    start = left + (_TILE - step * (len(column.bans) - 1) - _ICON) // 2
    for i, category in enumerate(column.bans):
        icon = glyph_icon(category, _ICON)
        sheet.paste(icon, (start + i * step, _MARGIN + 30), icon)
    draw.text((left + _TILE / 2, _MARGIN + 58), "banned", _MUTED, font(12), anchor="ma")


def _draw_prompt(sheet: PIL.Image.Image, draw: ImageDraw.ImageDraw, top: int, row: Row) -> None:
    lines = wrapped(row.prompt, font(15), _SIDE - 20, lines=4)
    for i, line in enumerate(lines):
        draw.text((_MARGIN, top + 8 + 20 * i), line, _INK, font(15))
    below = top + 18 + 20 * len(lines)
    if row.category is None:
        draw.text((_MARGIN, below), "harmless", _MUTED, font(13))
        return
    icon = glyph_icon(row.category, _ICON)
    sheet.paste(icon, (_MARGIN, below), icon)
    draw.text((_MARGIN + _ICON + 6, below + 5), row.category, _MUTED, font(13))


def _mark(category: Category | None, glyphs: frozenset[Category]) -> tuple[str, tuple[int, int] | None]:
    return _THERE if category in glyphs else _OTHER if glyphs else _GONE


def _frame(draw: ImageDraw.ImageDraw, left: int, top: int, colour: str, dash: tuple[int, int] | None) -> None:
    right, bottom = left + _TILE - 1, top + _TILE - 1
    if dash is None:
        draw.rectangle((left - 3, top - 3, right + 3, bottom + 3), outline=colour, width=4)
        return
    on, off = dash
    for start in range(0, _TILE, on + off):
        end = min(start + on, _TILE)
        for y in (top - 3, bottom):
            draw.rectangle((left + start, y, left + end, y + 3), fill=colour)
        for x in (left - 3, right):
            draw.rectangle((x, top + start, x + 3, top + end), fill=colour)
