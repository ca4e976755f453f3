"""The manifest of an evaluation: one row for each picture, with every setting that it was made with.

``manifest.parquet`` lies beside the pictures. It names people by their ids; who they are is in ``users.jsonl``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import pyarrow
import pyarrow.parquet
from pydantic import BaseModel, ConfigDict, ValidationError

from ...safe_files import replacing
from ..errors import DataError

MANIFEST = "manifest.parquet"
USERS = "users.jsonl"


class Picture(BaseModel):
    """One picture: who asked which method for what, and how it was drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str  # path in the evaluation's folder
    case: str  # the same for all methods: person, prompt and seed
    method: str
    run: int  # which of several trainings of that method
    user: str
    level: str | None  # L0 to L5, if the person is a level
    seen: bool | None  # whether the adapter's training knew that person; None if nobody can tell
    banned: tuple[str, ...]
    prompt_id: str
    prompt: str
    category: str | None  # what the prompt asks for, or HARMLESS; None: nobody has said
    content: Literal["named", "implied"] | None
    expected: tuple[str, ...]  # harmless things that a programmatic judge looks for
    negative_prompt: str
    seed: int
    steps: int
    guidance_scale: float
    width: int
    height: int
    strength: float
    engine: str
    base: str  # its name and a hash of its weights
    adapter: str | None  # likewise
    everyone: str | None = None  # the level that a static adapter takes everybody for
    degree: str | None = None  # of Safe Latent Diffusion: weak, medium, strong, max
    concept: str = ""  # what that leads away from


_SCHEMA = pyarrow.schema(
    [
        ("image", pyarrow.string()),
        ("case", pyarrow.string()),
        ("method", pyarrow.string()),
        ("run", pyarrow.int32()),
        ("user", pyarrow.string()),
        ("level", pyarrow.string()),
        ("seen", pyarrow.bool_()),
        ("banned", pyarrow.list_(pyarrow.string())),
        ("prompt_id", pyarrow.string()),
        ("prompt", pyarrow.string()),
        ("category", pyarrow.string()),
        ("content", pyarrow.string()),
        ("expected", pyarrow.list_(pyarrow.string())),
        ("negative_prompt", pyarrow.string()),
        ("seed", pyarrow.int64()),
        ("steps", pyarrow.int32()),
        ("guidance_scale", pyarrow.float64()),
        ("width", pyarrow.int32()),
        ("height", pyarrow.int32()),
        ("strength", pyarrow.float64()),
        ("engine", pyarrow.string()),
        ("base", pyarrow.string()),
        ("adapter", pyarrow.string()),
        ("everyone", pyarrow.string()),
        ("degree", pyarrow.string()),
        ("concept", pyarrow.string()),
    ]
)


def write_manifest(folder: Path, pictures: Iterable[Picture]) -> None:
    """Write the manifest of a folder anew."""
    table = pyarrow.Table.from_pylist([picture.model_dump() for picture in pictures], _SCHEMA)
    with replacing(folder / MANIFEST) as aside:
        pyarrow.parquet.write_table(table, aside)


def read_manifest(folder: Path) -> list[Picture]:
    """Return the rows of a folder's manifest.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    path = folder / MANIFEST
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
        return [Picture.model_validate(row) for row in rows]
    except FileNotFoundError:
        raise DataError(f"{folder} has no {MANIFEST}. Draw its pictures first: psa evaluate CONFIG.") from None
    except (pyarrow.ArrowException, ValidationError, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}). Delete it, and the pictures are drawn again.") from None
