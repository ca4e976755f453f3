"""Fonts for what artists write: Pillow's own, or one of this machine that has the letters which that one lacks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from PIL import ImageFont

# Fonts of Linux, Windows and macOS with many letters, general ones first. Pillow finds them by name where they are.
_NAMES = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "segoeui.ttf",
    "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc",
    "msyh.ttc",
    "YuGothM.ttc",
    "malgun.ttf",
    "Hiragino Sans GB.ttc",
    "AppleSDGothicNeo.ttc",
)
_PROBE = 16  # pixels, at which letters are looked for
_NO_LETTER = "\uffff"  # no font has it, so each draws its sign for missing letters


def fonts_for(texts: Sequence[str]) -> list[ImageFont.FreeTypeFont]:
    """Return a font for each text, of any size: one for all texts where one has all their letters."""
    everything = "".join(texts)
    fonts = sorted(_fonts(), key=lambda font: _missing(font, everything))
    return [min(fonts, key=lambda font: _missing(font, text)) for text in texts]


@cache
def _fonts() -> tuple[ImageFont.FreeTypeFont, ...]:
    found = [ImageFont.load_default(_PROBE)]
    for name in _NAMES:
        try:
            found.append(ImageFont.truetype(name, _PROBE))
        except OSError:  # not on this machine
            continue
    return tuple(font for font in found if isinstance(font, ImageFont.FreeTypeFont))


def _missing(font: ImageFont.FreeTypeFont, text: str) -> int:
    """Count the letters of ``text`` that the font has not."""
    sign = bytes(font.getmask(_NO_LETTER))
    return sum(bytes(font.getmask(letter)) == sign for letter in set(text) if not letter.isspace())
