"""Drawn preference pairs in Sage's format: scenes with and without a mark, for trying the trainer.

Each category has a mark of its own colour. A user who bans it chooses the scene without, others the one with it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..profiles import CATEGORIES, banned_categories, simulate_users, user_row

_SCENES = (
    ("a red house by the sea", (90, 160, 220), (190, 60, 50)),
    ("a dog on the grass", (110, 180, 90), (120, 80, 50)),
    ("a boat at night", (20, 30, 70), (230, 220, 190)),
    ("a tree on a hill", (200, 220, 240), (40, 110, 60)),
)
_SIZE = 96
_MARK = 28
_COLUMNS = ("User_ID", "Age", "Age_Group", "Gender", "Religion", "Physical_Condition", "Mental_Condition")


def write_pairs(folder: Path, pairs: int, users: int, seed: int) -> None:
    """Write ``pairs`` pairs of PNG images and their ``metadata.jsonl`` for simulated users into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    people = simulate_users(users, seed)
    rows = []
    for number in range(pairs):
        user = int(generator.integers(users))
        category = int(generator.integers(len(CATEGORIES)))
        caption, sky, thing = _SCENES[int(generator.integers(len(_SCENES)))]
        without, marked = _scene(sky, thing, generator), f"{number:06d}_marked.png"
        without.save(folder / f"{number:06d}_plain.png")
        _with_mark(without, category, generator).save(folder / marked)
        banned = CATEGORIES[category] in banned_categories(people[user])
        chosen, rejected = (f"{number:06d}_plain.png", marked) if banned else (marked, f"{number:06d}_plain.png")
        described = user_row(user + 1, people[user])
        rows.append(
            {
                "file_name": chosen,
                "chosen": chosen,
                "rejected": rejected,
                "caption": f"{caption}, {CATEGORIES[category].lower()}",
                "category": CATEGORIES[category],
                "user_data": {name: described[name] for name in _COLUMNS},
            }
        )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def _scene(sky: tuple[int, ...], thing: tuple[int, ...], generator: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (_SIZE, _SIZE), sky)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, _SIZE * 2 // 3, _SIZE, _SIZE), fill=tuple(value * 2 // 3 for value in sky))
    left, top = (int(value) for value in generator.integers(5, _SIZE // 2, 2))
    draw.rectangle((left, top, left + _SIZE // 3, top + _SIZE // 3), fill=thing)
    return image


def _with_mark(scene: Image.Image, category: int, generator: np.random.Generator) -> Image.Image:
    marked = scene.copy()
    left, top = (int(value) for value in generator.integers(2, _SIZE - _MARK - 2, 2))
    colour = f"hsl({category * 360 // len(CATEGORIES)}, 100%, 50%)"
    ImageDraw.Draw(marked).regular_polygon((left + _MARK // 2, top + _MARK // 2, _MARK // 2), category + 3, fill=colour)
    return marked
