"""A drawn world, a text-to-image model of a few million parameters that learns it, and what PSA does to it.

Here is what everything about the shipped miniature has in common; changing it makes another one.
"""

from __future__ import annotations

from pathlib import Path

MINIATURE = Path(__file__).parents[2] / "miniature"
SEED = 2025
PEOPLE = 1200
PAIRS = 6000
