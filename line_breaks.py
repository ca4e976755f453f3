"""Text on contact sheets, broken to a width: for the nodes and the trainer, each with fonts of its own."""

from __future__ import annotations

from PIL import ImageFont


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
            break
    if len(broken) > lines:
        last = broken[lines - 1]
        while last and font.getlength(f"{last}…") > width:
            last = last[:-1]
        broken = [*broken[: lines - 1], f"{last}…"]
    return broken
