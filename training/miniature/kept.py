"""Keeps what the detector saw, so that an interrupted evaluation goes on, and another method costs its own pictures.

One JSON file for each method and set of cases: what is in the picture of the first case, the second, and so on. Its
name is a hash of all that decides the pictures. It says nothing about people.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ...safe_files import DAMAGE, replacing
from ..base import open_base
from ..base.fingerprints import fingerprint
from .cases import Case
from .detector import Sighting
from .methods import Method
from .sampling import GUIDANCE_SCALE, STEPS


class Kept:
    """Sightings of the same cases by any method."""

    def __init__(self, folder: Path, base: Path, detector: Path, cases: Sequence[Case]) -> None:
        """Keep them in ``folder``, which is made.

        Raises:
            BaseModelError: the base or the detector cannot be read.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        model = open_base(base)
        parts = (
            model.fingerprint("unet"),
            model.fingerprint("text"),
            model.fingerprint("vae"),
            fingerprint([detector]),
        )
        self._ground = repr((parts, STEPS, GUIDANCE_SCALE, cases))

    def read(self, method: Method) -> list[Sighting]:
        """Return the sightings of the first cases; none if there is no file, or only a damaged one."""
        try:
            rows = json.loads(self._path(method).read_text(encoding="utf-8"))
            return [Sighting(frozenset(glyphs), frozenset(objects)) for glyphs, objects in rows]
        except DAMAGE:
            return []

    def write(self, method: Method, sightings: Sequence[Sighting]) -> None:
        """Keep the sightings of the first cases."""
        rows = [[sorted(seen.glyphs), sorted(seen.objects)] for seen in sightings]
        with replacing(self._path(method)) as aside:
            aside.write_text(json.dumps(rows), encoding="utf-8")

    def _path(self, method: Method) -> Path:
        adapter = method.adapter and fingerprint([method.adapter])
        settings = repr((self._ground, adapter, method.negative_prompt, method.everyone))
        return self._folder / f"{hashlib.sha256(settings.encode()).hexdigest()[:16]}.json"
