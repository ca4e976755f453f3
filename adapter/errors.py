"""The one exception of this room. Its messages speak to an artist: what was found, expected, to do."""

from __future__ import annotations


class AdapterError(ValueError):
    """An adapter file, its configuration or the model that it should act on does not fit."""
