"""A tiny Sage split folder: images of random blocks and a metadata.jsonl in the published format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from comfyui_psa.profiles import simulate_users, user_row

CAPTIONS = ("a harbour at dawn", "a crowd in the street", "a portrait of a nurse", "an abandoned house")


def write_sage_split(
    folder: Path,
    rows: int = 4,
    users: int = 2,
    size: tuple[int, int] = (40, 32),
    seed: int = 0,
    captions: Sequence[str] = CAPTIONS,
) -> Path:
    """Write ``rows`` pairs of PNG images of ``size`` (width, height) into ``folder``, and return it.

    Row ``n`` belongs to user ``n % users + 1`` and has caption ``n % len(captions)``, so captions and users repeat.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    user_data = [sage_user(number, seed) for number in range(1, users + 1)]
    lines = []
    for row in range(rows):
        names = {side: f"{row:06d}_{side}.png" for side in ("chosen", "rejected")}
        for name in names.values():
            write_image(folder / name, size, generator)
        user = user_data[row % users]
        caption = captions[row % len(captions)]
        lines.append({"file_name": names["chosen"], **names, "caption": caption, "user_data": user})
    write_metadata(folder, lines)
    return folder


def sage_user(number: int, seed: int = 0) -> dict[str, Any]:
    """The ``user_data`` of simulated user ``number``, counted from 1, as Sage's metadata has it."""
    row: dict[str, Any] = dict(user_row(number, simulate_users(number, seed)[-1]))
    user = {"User_ID": row.pop("User_ID"), "Cluster_ID": number % 7}
    attributes = ("Age", "Age_Group", "Gender", "Religion", "Physical_Condition", "Mental_Condition")
    return user | {name: row[name] for name in attributes}


def write_image(path: Path, size: tuple[int, int], generator: np.random.Generator) -> None:
    """Write an image of ``size`` (width, height) made of random blocks of 4 pixels."""
    width, height = size
    blocks = generator.integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    pixels = blocks.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]
    Image.fromarray(pixels).save(path)


def read_metadata(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a split folder, to be changed and written back."""
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def write_metadata(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows of a split folder."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
