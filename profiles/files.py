"""The file of a profile: a JSON object of ``format``, ``format_version``, ``revision`` (of each save) and ``profile``.

Files of earlier versions are brought up step by step when they are read, and written as the newest at the next save.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import ProfileError
from .schema import Profile, parse_profile

FORMAT = "psa_profile"
FORMAT_VERSION = 1

# From the version that is the key to the next one: the whole object in, the whole object out.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def format_file(revision: str, profile: Profile) -> str:
    """Return the text of a file."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "revision": revision,
        "profile": profile.model_dump(),
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def parse_file(text: str, path: Path) -> tuple[str, Profile]:
    """Return revision and profile of a file; ``path`` is for messages.

    Raises:
        ProfileError: the file is damaged, of a version that nothing here can read, or holds no valid profile.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ProfileError(
            f"The profile file {path} is damaged: expected a JSON object of the format {FORMAT}. "
            "Restore its earlier version, or delete the profile and make a new one."
        )
    while isinstance(version := content.get("format_version"), int) and version in MIGRATIONS:
        content = MIGRATIONS[version](content)
    if content.get("format_version") != FORMAT_VERSION:
        raise ProfileError(
            f"The profile file {path} was written by another version of ComfyUI-PSA (this one reads format "
            f"version {FORMAT_VERSION}). Update ComfyUI-PSA."
        )
    return str(content.get("revision", "")), parse_profile(content.get("profile"), f"The profile file {path}")
