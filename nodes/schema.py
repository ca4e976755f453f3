"""The pack's socket types and category, and schema fields that older ComfyUI releases do not know."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import io

Adapter = io.Custom("PSA_ADAPTER")
Embedding = io.Custom("PSA_EMBEDDING")
UserProfile = io.Custom("PSA_PROFILE")
Floats = io.Custom("FLOATS,FLOAT")  # lists of floats: some packs call them FLOATS, some FLOAT

_SCHEMA_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def node_schema(search_aliases: list[str], **fields: Any) -> io.Schema:
    """Return a schema in the pack's category, with search aliases where this ComfyUI knows them."""
    if "search_aliases" in _SCHEMA_FIELDS:
        fields["search_aliases"] = search_aliases
    return io.Schema(category="PSA", **fields)


def advanced_combo(*args: Any, **kwargs: Any) -> io.Combo.Input:
    """Return a choice that the frontend folds away as advanced."""
    combo = io.Combo.Input(*args, **kwargs)
    combo.extra_dict = {**combo.extra_dict, "advanced": True}
    return combo
