"""What is asked for: prompts from files, from the captions of a Sage split, and of the miniature's world."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ...profiles import CATEGORIES
from ..config import read_toml
from ..data.categories import HARMLESS, known_category
from ..data.pairs import Pair, open_pairs
from ..errors import DataError
from ..miniature import SEED
from ..miniature.cases import draw_prompts
from .config import PromptsSection

Content = Literal["named", "implied"]
SUFFIXES = (".jsonl", ".csv", ".toml")
_I2P_SEED = "sd_seed"  # a column of the published file of I2P

logger = logging.getLogger(__name__)


class Asked(BaseModel):
    """One prompt. ``category`` is what it asks for: one of the seven, or ``harmless``; None if nobody has said.

    ``content`` tells whether the prompt says so. ``expected`` are harmless things that a programmatic judge looks for;
    ``seed`` is that of its first picture, if it comes with one, as I2P's do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_id: str = Field(min_length=1)
    prompt: str
    category: str | None = None
    content: Content | None = None
    expected: tuple[str, ...] = ()
    seed: int | None = Field(None, ge=0, lt=2**63)

    @field_validator("category")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        known = known_category(value)
        if known is None and value is not None:
            raise ValueError(f"{value} is none of {', '.join(CATEGORIES)} and {HARMLESS}; leave it empty if unknown")
        return known


def read_prompts(section: PromptsSection) -> list[Asked]:
    """Return all prompts that the configuration names, in order.

    Raises:
        DataError: a file is missing or damaged, a row is no prompt, or two prompts have the same id.
    """
    found: list[Asked] = []
    if section.file is not None:
        found += islice(_read_file(section.file), section.limit)
    if section.sage is not None:
        found += captions(section.sage, section.limit)
    found += [
        Asked(
            prompt_id=f"world-{asked.number:04d}",
            prompt=asked.caption,
            category=asked.category or HARMLESS,
            content=asked.mention,
            expected=(asked.object,),
        )
        for asked in draw_prompts(section.miniature, SEED)
    ]
    known: set[str] = set()
    for asked in found:
        if asked.prompt_id in known:
            raise DataError(f'Two prompts have the prompt_id "{asked.prompt_id}". Give each its own.')
        known.add(asked.prompt_id)
    return found


def captions(split: Path, limit: int | None = None) -> list[Asked]:
    """Return the captions of a split as prompts, each once, in the order in which they come first."""
    first: dict[str, Asked] = {}
    for pair in islice(open_pairs(split), limit):
        first.setdefault(pair.caption, caption_of(pair))
    return list(first.values())


def caption_of(pair: Pair) -> Asked:
    """Return what a row of preference pairs asks for. Categories that are not the paper's are unknown."""
    # By its text, so that it is the same in every subset and order of the rows.
    digest = hashlib.sha256(pair.caption.encode()).hexdigest()[:16]
    return Asked(prompt_id=f"caption-{digest}", prompt=pair.caption, category=known_category(pair.category))


def _read_file(path: Path) -> Iterator[Asked]:
    read = {".jsonl": _jsonl, ".csv": _csv, ".toml": _toml}.get(path.suffix.lower())
    if read is None:
        raise DataError(f"{path} is no file of prompts: expected one of the endings {', '.join(SUFFIXES)}.")
    empty = True
    for number, row in enumerate(read(path), start=1):
        empty = False
        yield _asked(row, number, path)
    if empty:
        raise DataError(f"{path} holds no prompts. Add some, one in each row, in a column `prompt`.")


def _asked(row: Any, number: int, path: Path) -> Asked:
    where = f"Prompt {number} of {path.name}"
    if not isinstance(row, Mapping) or not isinstance(row.get("prompt"), str):
        raise DataError(f"{where} has no text in the column `prompt`. Add it, or delete the row.")
    values = {"prompt_id": f"{number:06d}", **{key: value for key, value in row.items() if value not in (None, "")}}
    values["prompt"], values["prompt_id"] = row["prompt"], str(values["prompt_id"])
    if isinstance(values.get("expected"), str):
        values["expected"] = tuple(word.strip() for word in values["expected"].split(","))
    try:
        return Asked.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, details['loc']))}: {str(details['msg']).removeprefix('Value error, ')}"
            for details in error.errors()
        )
        raise DataError(
            f"{where} cannot be used ({problems}). Expected the columns {', '.join(Asked.model_fields)}."
        ) from None


def _jsonl(path: Path) -> Iterator[Any]:
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                raise DataError(f"Line {number} of {path} is no JSON. Correct it, or delete it.") from None


def _csv(path: Path) -> Iterator[Any]:
    """Yield the rows with the columns that are ours: published tables have others, too."""
    try:
        rows = csv.DictReader(io.StringIO(read_text(path)), strict=True)
        names = rows.fieldnames or ()
        # What a row has too much lies under None, and is refused.
        columns: dict[str | None, str | None] = {None: None}
        columns |= {name: name for name in names if name in Asked.model_fields}
        if "seed" not in columns and _I2P_SEED in names:
            columns[_I2P_SEED] = "seed"
        if ignored := [name for name in names if name not in columns]:
            logger.warning("PSA: columns of %s that are not read: %s", path.name, ", ".join(ignored))
        for row in rows:
            yield {columns[name]: value for name, value in row.items() if name in columns}
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as CSV ({error}). Correct it and try again.") from None


def _toml(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise missing(path)
    prompts = read_toml(path).get("prompts")
    if not isinstance(prompts, list):
        raise DataError(f"{path} has no prompts: expected tables [[prompts]], or prompts = [...] with texts.")
    yield from ({"prompt": entry} if isinstance(entry, str) else entry for entry in prompts)


def read_lines(path: Path) -> list[str]:
    """Return the lines of such a file. A text may hold U+2028 and the like, which end no line here."""
    return read_text(path).split("\n")


def read_text(path: Path) -> str:
    """Return the text of a file that the configuration names; raise DataError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise missing(path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}). Name a text file in UTF-8.") from None


def missing(path: Path) -> DataError:
    """Return the error of a file that is not there."""
    return DataError(f"There is no file {path}. Correct its path in the configuration.")
