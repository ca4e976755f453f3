"""Evaluations without a model: their pictures are drawn from scenes, so what each shows is known."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from comfyui_psa.profiles import CATEGORIES
from comfyui_psa.training.data.categories import HARMLESS
from comfyui_psa.training.evaluation.assess import assess
from comfyui_psa.training.evaluation.assess_config import AssessSettings
from comfyui_psa.training.evaluation.manifest import USERS, Picture, write_manifest
from comfyui_psa.training.miniature.drawing import draw
from comfyui_psa.training.miniature.world import draw_scene

PROGRAMMATIC = {"kind": "programmatic"}
# Nothing but what a test asks for.
BARE: dict[str, Any] = {"nudenet": {"enabled": False}, "resamples": 200, "pairs": 0}


def row(image: str, method: str = "base", **changes: Any) -> Picture:
    """Return a row of a manifest; ``case`` is made of person and prompt."""
    values: dict[str, Any] = {
        "image": image,
        "method": method,
        "run": 0,
        "user": "u",
        "level": None,
        "seen": False,
        "banned": (),
        "prompt_id": "p",
        "prompt": "a house on the beach with a bolt",
        "category": HARMLESS,
        "content": None,
        "expected": ("house",),
        "negative_prompt": "",
        "seed": 1,
        "steps": 10,
        "guidance_scale": 3.0,
        "width": 96,
        "height": 96,
        "strength": 1.0,
        "engine": "diffusers",
        "base": "drawings 0123",
        "adapter": None,
        **changes,
    }
    values.setdefault("case", f"{values['user']}/{values['prompt_id']}")
    return Picture.model_validate(values)


def draw_picture(path: Path, glyphs: Sequence[str] = (), thing: str = "house", seed: int = 0) -> None:
    """Write a drawing that shows the signs of these categories, and an object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scene = draw_scene(np.random.default_rng(seed), tuple(glyphs)).with_object(thing)  # type: ignore[arg-type]
    draw(scene).save(path)


def write_evaluation(folder: Path, rows: Iterable[Picture]) -> Path:
    """Write the manifest and the people of an evaluation."""
    kept = list(rows)
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, kept)
    users = {one.user: {"user": one.user, "bans": list(one.banned), "text": f"Person {one.user}, 30."} for one in kept}
    (folder / USERS).write_text("".join(json.dumps(user) + "\n" for user in users.values()), encoding="utf-8")
    return folder


def small_evaluation(folder: Path, prompts: int = 4, methods: Sequence[str] = ("base", "PSA", "static")) -> Path:
    """Draw levels L0, L1 and L5 for each of some prompts about Violence, and harmless ones.

    The base draws what was asked for; PSA leaves out what is banned; static leaves everything out.
    """
    bans = {"L0": (), "L1": ("Shocking", "Violence"), "L5": CATEGORIES}
    rows = []
    for method in methods:
        for level, banned in bans.items():
            for number in range(2 * prompts):
                category = "Violence" if number < prompts else HARMLESS
                gone = method == "static" or (method == "PSA" and category in banned)
                image = f"pictures/{method}-{level}-{number}.png"
                draw_picture(folder / image, () if category == HARMLESS or gone else (category,), seed=number)
                rows.append(
                    row(
                        image,
                        method,
                        user=level,
                        level=level,
                        seen=None,
                        banned=banned,
                        prompt_id=str(number),
                        prompt="a house" if category == HARMLESS else "a house with a burst",
                        category=category,
                        content=None if category == HARMLESS else "named",
                        adapter=None if method == "base" else f"{method} 4567",
                    )
                )
    return write_evaluation(folder, rows)


def assessed(folder: Path, **settings: Any) -> dict[str, Any]:
    """Assess a folder and return its ``results.json``."""
    assess(folder, AssessSettings.model_validate({**BARE, **settings}), Progress(disable=True))
    found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found


def cell(results: dict[str, Any], measure: str, method: str, **where: Any) -> dict[str, Any]:
    """Return the one row of numbers of a cell."""
    wanted = {"people": "everyone", "seen": "", "asked": "all", "run": None, **where}
    (found,) = (
        one
        for one in results["cells"]
        if one["measure"] == measure and one["method"] == method and wanted.items() <= one.items()
    )
    return found


def reasons(results: dict[str, Any]) -> dict[str, str]:
    """Return why what was left out was left out."""
    return {left["name"]: left["reason"] for left in results["left_out"]}
