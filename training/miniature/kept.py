"""Keeps what the detector saw, so that an interrupted evaluation goes on, and only what is new is drawn.

One JSON file for each method, whose name is a hash of all that decides its pictures: what is in the picture of each
case, by a hash of the case. It says nothing about people.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from ...safe_files import DAMAGE, replacing
from ..base import open_base
from ..base.fingerprints import fingerprint
from .cases import Case
from .detector import Sighting
from .methods import Method
from .sampling import GUIDANCE_SCALE, STEPS


class Kept:
    """Sightings by any method."""

    def __init__(self, folder: Path, base: Path, detector: Path) -> None:
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
        self._ground = (parts, STEPS, GUIDANCE_SCALE)

    def read(self, method: Method) -> dict[str, Sighting]:
        """Return the sightings of cases by their keys; none if there is no file, or only a damaged one."""
        try:
            rows = json.loads(self._path(method).read_text(encoding="utf-8"))
            return {key: Sighting(frozenset(glyphs), frozenset(objects)) for key, (glyphs, objects) in rows.items()}
        except DAMAGE:
            return {}

    def write(self, method: Method, sightings: Mapping[str, Sighting]) -> None:
        """Keep the sightings of cases."""
        rows = {key: [sorted(seen.glyphs), sorted(seen.objects)] for key, seen in sightings.items()}
        with replacing(self._path(method)) as aside:
            aside.write_text(json.dumps(rows), encoding="utf-8")

    def _path(self, method: Method) -> Path:
        adapter = method.adapter and fingerprint([method.adapter])
        everyone = method.everyone and method.everyone.model_dump_json()
        others = method.negative_prompt, everyone, method.strength
        return self._folder / f"{_digest(self._ground, adapter, *others)}.json"


def case_key(case: Case) -> str:
    """Return what stands for a case in the files: the same if prompt, person and noise are."""
    # A profile's own repr says nothing of it.
    return _digest(case, case.person.model_dump_json())


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
