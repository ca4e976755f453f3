"""The base families that adapters are published for, known by the shape of their cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OTHER = "other"


@dataclass(frozen=True)
class Family:
    """A base model family: attn2 widths in diffusers' order (down, up, mid) and the width of the text."""

    name: str
    title: str
    hidden_sizes: tuple[int, ...]
    cross_attention_dim: int


_SD_HIDDEN = (320,) * 2 + (640,) * 2 + (1280,) * 5 + (640,) * 3 + (320,) * 3 + (1280,)

FAMILIES: tuple[Family, ...] = (
    Family("sd1", "SD1.x", _SD_HIDDEN, 768),
    Family("sd2", "SD2.x", _SD_HIDDEN, 1024),
    Family("sdxl", "SDXL", (640,) * 4 + (1280,) * 50 + (640,) * 6 + (1280,) * 10, 2048),
    Family("ssd-1b", "SSD-1B", (640,) * 4 + (1280,) * 26 + (640,) * 4, 2048),
    Family("segmind-vega", "Segmind-Vega", (640,) * 2 + (1280,) * 10 + (640,) * 3, 2048),
    Family("miniature", "PSA Miniature", (64,) * 17, 128),
)


def family_name(hidden_sizes: Sequence[int], cross_attention_dim: int) -> str:
    """Return the name of the family with these dimensions, or ``"other"``."""
    for family in FAMILIES:
        if family.hidden_sizes == tuple(hidden_sizes) and family.cross_attention_dim == cross_attention_dim:
            return family.name
    return OTHER


def family_title(name: str) -> str:
    """Return a family's name for people; "an unnamed UNet" if there is no such family."""
    return next((family.title for family in FAMILIES if family.name == name), "an unnamed UNet")


def describe(hidden_sizes: Sequence[int], cross_attention_dim: int) -> str:
    """Return a base in words: "SD1.x (16 cross-attention layers, text width 768)"."""
    title = family_title(family_name(hidden_sizes, cross_attention_dim))
    return f"{title} ({len(hidden_sizes)} cross-attention layers, text width {cross_attention_dim})"
