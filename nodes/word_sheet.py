"""Draws the words of a prompt, shaded by how much they change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .explanation import Word
from .typefaces import fonts_for

_WIDTH, _MARGIN, _GAP, _PAD = 960, 32, 12, 10
_LETTERS = 28
_NUMBER = ImageFont.load_default(16)
_LINE = 84
_PAPER, _INK, _MUTED, _HEAT = (255, 255, 255), (34, 34, 34), (110, 110, 110), (240, 130, 40)


def draw_words(people: Sequence[Sequence[Word]]) -> Tensor:
    """Return one sheet for each person, all of one size: ``[people, height, width, 3]`` from 0 to 1."""
    (font,) = fonts_for(["".join(word.text for words in people for word in words)])
    font = font.font_variant(size=_LETTERS)
    lines = [_lines(words, font) for words in people]
    height = 2 * _MARGIN + _LINE * max(map(len, lines))
    return torch.stack([_sheet(found, height, font) for found in lines])


def _lines(words: Sequence[Word], font: ImageFont.FreeTypeFont) -> list[list[Word]]:
    lines: list[list[Word]] = [[]]
    left = 0.0
    for word in words:
        if lines[-1] and left + _width(word, font) > _WIDTH - 2 * _MARGIN:
            lines.append([])
            left = 0.0
        lines[-1].append(word)
        left += _width(word, font) + _GAP
    return lines


def _width(word: Word, font: ImageFont.FreeTypeFont) -> float:
    return font.getlength(word.text) + 2 * _PAD


def _sheet(lines: Sequence[Sequence[Word]], height: int, font: ImageFont.FreeTypeFont) -> Tensor:
    image = Image.new("RGB", (_WIDTH, height), _PAPER)
    draw = ImageDraw.Draw(image)
    for number, words in enumerate(lines):
        left, top = float(_MARGIN), _MARGIN + number * _LINE
        for word in words:
            box = (left, top, left + _width(word, font), top + 48)
            draw.rounded_rectangle(box, 8, _shade(word.change))
            draw.text((left + _PAD, top + 24), word.text, _INK, font, anchor="lm")
            draw.text(((box[0] + box[2]) / 2, top + 52), f"{word.change:.0%}", _MUTED, _NUMBER, anchor="ma")
            left = box[2] + _GAP
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)


def _shade(change: float) -> tuple[int, ...]:
    share = min(change, 1.0) ** 0.7  # small changes are still seen
    return tuple(round(paper + share * (heat - paper)) for paper, heat in zip(_PAPER, _HEAT, strict=True))
