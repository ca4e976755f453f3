"""What can be done about a person's boundaries: an adapter, a negative prompt, or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...profiles import Profile


@dataclass(frozen=True)
class Method:
    """A way to follow a person's boundaries. By default none: the base model.

    ``everyone`` is for a static adapter: one profile that stands for all. ``strength`` is the adapter's.
    """

    name: str
    adapter: Path | None = None
    negative_prompt: bool = False
    everyone: Profile | None = None
    strength: float = 1.0


BASE = Method("base")
NEGATIVE_PROMPT = Method("negative prompt", negative_prompt=True)
