"""Preference pairs as they lie on disk: Sage split folders and `datasets` folders, row by row.

Reads metadata and image bytes; decodes no image, and never asks the hub for anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset
from datasets.exceptions import DatasetsError
from datasets.io.parquet import ParquetDatasetReader

from ...safe_files import DAMAGE
from ..errors import DataError
from .users import USER_COLUMNS, user_id

ImageSource: TypeAlias = Path | bytes

SAGE_METADATA = "metadata.jsonl"
COLUMNS = ("chosen", "rejected", "caption", "user_data")
_IMAGES = ("chosen", "rejected")
_KINDS = (".jsonl", ".parquet", ".arrow")
_SPLIT = re.compile(r"(train|test|val|valid|validation|dev|eval)(?![a-z])")
_SHARD = re.compile(r"-\d{5}-of-\d{5}.*$")  # behind the name of a split, as the hub and datasets write it
# Tables are read in pieces of so many rows: with images inside, a row may have megabytes.
_ROWS_AT_ONCE = 32
_TABLE_DAMAGE = (*DAMAGE, pa.ArrowException, DatasetsError)


@dataclass(frozen=True)
class Pair:
    """Two images for one caption and user, the ``chosen`` one preferred; printing it shows nothing of the user.

    ``row`` is its number in the source, from 0; ``where`` says the same to people ("row 4 of metadata.jsonl",
    from 1). ``user`` is the user's data as found, perhaps empty; ``category`` is there if the set has the column.
    """

    row: int
    where: str
    caption: str
    chosen: ImageSource = field(repr=False)
    rejected: ImageSource = field(repr=False)
    user_id: str
    user: Mapping[str, Any] = field(repr=False)
    category: str | None = None


class Pairs:
    """A source of preference pairs, which may be iterated over as often as needed."""

    def __init__(self, folder: Path, files: tuple[Path, ...]) -> None:
        """Read ``files`` one after the other; the paths of images are relative to ``folder``."""
        self.folder = folder
        self._files = files

    def __iter__(self) -> Iterator[Pair]:
        """Yield the pairs in order.

        Raises:
            DataError: a row is no pair, or a file cannot be read; the message names it.
        """
        for pair in self.read():
            if isinstance(pair, DataError):
                raise pair
            yield pair

    def read(self) -> Iterator[Pair | DataError]:
        """Yield for every row its pair, or what is wrong with it."""
        number = 0
        for file in self._files:
            for position, row in _rows(file):
                try:
                    yield self._pair(row, number, f"row {position} of {file.name}")
                except DataError as error:
                    yield error
                number += 1

    def count(self) -> int:
        """Return the number of rows, usable or not, without reading images that lie in a table.

        Raises:
            DataError: a file cannot be read.
        """
        return sum(map(_count, self._files))

    def fingerprint(self) -> str:
        """Return a hash (sha256, hex) that changes with the metadata, and with any file of the set.

        Metadata in jsonl counts by content; parquet, arrow and image files by name, size and time of change.
        """
        digest = hashlib.sha256()
        for file in self._files:
            if file.suffix == ".jsonl":
                with _readable(file):
                    digest.update(f"{file.name}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
            else:
                digest.update(self._state(file))
            for path in self._image_paths(file):
                digest.update(self._state(path))
        return digest.hexdigest()

    def _pair(self, row: Any, number: int, where: str) -> Pair:
        if isinstance(row, DataError):
            raise row
        if not isinstance(row, Mapping):
            raise DataError(
                f"{where} is no object; expected one with the columns {', '.join(COLUMNS)}. Correct it, or drop "
                "the row."
            )
        caption = row.get("caption")
        if not isinstance(caption, str) or not caption.strip():
            raise DataError(f"{where} has no caption; expected text in the column caption. Add it, or drop the row.")
        user = _user(row, where)
        if user.get("User_ID") is None:
            raise DataError(
                f"{where} names no user; expected a User_ID in the column user_data. Add it, or drop the row."
            )
        try:
            identity = user_id(user["User_ID"])
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        chosen, rejected = (self._image(row.get(column), column, where) for column in _IMAGES)
        category = row.get("category")
        return Pair(
            number, where, caption, chosen, rejected, identity, user, None if category is None else str(category)
        )

    def _image(self, value: Any, column: str, where: str) -> ImageSource:
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return value
        if not isinstance(value, str) or not value:
            raise DataError(
                f"{where} has no image in the column {column}; expected a path, or an image's bytes. Add it, or drop "
                "the row."
            )
        path = self._inside(value)
        if path is None:
            raise DataError(
                f"{where}: the image {value} in the column {column} lies outside {self.folder}. Move the images into "
                "the folder, with paths relative to it."
            )
        return path

    def _inside(self, name: str) -> Path | None:
        root = Path(os.path.normpath(self.folder))
        path = Path(os.path.normpath(root / name))
        return path if path != root and path.is_relative_to(root) and "\0" not in name else None

    def _image_paths(self, file: Path) -> Iterator[Path]:
        if file.suffix == ".jsonl":
            for position, row in _rows(file):
                try:
                    pair = self._pair(row, position, "")
                except DataError:
                    continue  # the content of the row counts already
                yield from (image for image in (pair.chosen, pair.rejected) if isinstance(image, Path))
        else:
            with _readable(file):
                paths = map(self._inside, _path_column(file))
                yield from (path for path in paths if path is not None)

    def _state(self, path: Path) -> bytes:
        name = os.path.relpath(path, self.folder)
        try:
            stat = path.stat()
        except OSError:
            return f"{name}\0missing\n".encode()
        return f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode()


def open_pairs(path: Path) -> Pairs:
    """Open a Sage split folder, or a folder of the `datasets` library with the same columns.

    That is ``metadata.jsonl`` with images beside it; what ``save_to_disk`` wrote; or ``*.jsonl``, ``*.parquet``
    or ``*.arrow`` files. Images are paths relative to the folder, bytes, or the library's Image feature; users
    are the struct or JSON text ``user_data``, or columns of their own. Tables are read where they lie, some rows
    at a time, and leave no copy anywhere, so a set may be larger than memory and disk.

    Raises:
        DataError: there is no such folder, or nothing of this kind in it.
    """
    if not path.is_dir():
        raise DataError(
            f"There is no folder {path}. Name a Sage split folder (with {SAGE_METADATA}) or a datasets one."
        )
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(str(state.parent) for state in sorted(path.glob("*/state.json")))
        raise DataError(f"{path} holds several splits. Name one of them: {splits}.")
    if (path / SAGE_METADATA).is_file():
        return Pairs(path, (path / SAGE_METADATA,))
    if (path / "state.json").is_file():
        return Pairs(path, _saved_files(path))
    files = {kind: tuple(sorted(path.glob(f"*{kind}"))) for kind in _KINDS}
    kinds = [kind for kind in _KINDS if files[kind]]
    if len(kinds) != 1:
        found = f"files of several kinds ({', '.join(kinds)})" if kinds else "none of them"
        raise DataError(
            f"{path} is no set of preference pairs: expected {SAGE_METADATA}, a folder of save_to_disk, or files of "
            f"one kind of {', '.join(_KINDS)}; found {found}. Name the folder of one split."
        )
    shards = files[kinds[0]]
    names = sorted({_SHARD.sub("", file.stem) for file in shards})
    sharded = any(_SHARD.search(file.stem) for file in shards)
    named = [name for name in names if _SPLIT.match(name)]
    if len(names) > 1 and (sharded or len(named) > 1):
        raise DataError(
            f"{path} holds several splits ({', '.join(names)}). Move the files of each into a folder of its own, and "
            "name one of them."
        )
    return Pairs(path, shards)


def _saved_files(folder: Path) -> tuple[Path, ...]:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return tuple(folder / entry["filename"] for entry in state["_data_files"])
    except DAMAGE:
        raise DataError(
            f"{folder / 'state.json'} is damaged: expected what datasets' save_to_disk writes. Save the set again."
        ) from None


def _count(file: Path) -> int:
    with _readable(file):
        if file.suffix == ".parquet":
            return int(pq.read_metadata(file).num_rows)
        if file.suffix == ".arrow":
            return len(Dataset.from_file(str(file)))
        with file.open("rb") as lines:
            return sum(1 for line in lines if line.strip())


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield each row of a file behind its position, from 1; in place of what cannot be read, a DataError."""
    rows = _lines(file) if file.suffix == ".jsonl" else enumerate(_table_rows(file), start=1)
    position = 1
    try:
        with _readable(file):
            for position, row in rows:
                yield position, row
    except DataError as error:
        yield position, error


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as lines:
        for position, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield position, json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError):
                yield (
                    position,
                    DataError(f"row {position} of {file.name} is no JSON. Correct the line, or delete it."),
                )


def _table_rows(file: Path) -> Iterator[Any]:
    if file.suffix == ".arrow":
        table = Dataset.from_file(str(file))  # maps the file into memory, so there is nothing to stream
    else:
        # Not load_dataset, which tells the hub of every local set that it opens. Streamed, because otherwise a copy
        # of everybody's data would stay behind in the library's own cache.
        table = ParquetDatasetReader(str(file), streaming=True, batch_size=_ROWS_AT_ONCE).read()
    # As arrow, so that images stay the bytes that they are.
    for piece in table.with_format("arrow").iter(_ROWS_AT_ONCE):
        yield from piece.to_pylist()


def _path_column(file: Path) -> Iterator[str]:
    """Yield the paths of images in a table, without reading the images that lie in the table itself."""
    if file.suffix == ".arrow":
        pieces = Dataset.from_file(str(file)).with_format("arrow").iter(_ROWS_AT_ONCE)
    else:
        parquet = pq.ParquetFile(file)
        leaves = [parquet.schema.column(i).path for i in range(len(parquet.schema))]
        wanted = [leaf for leaf in leaves if leaf in (*_IMAGES, *(f"{column}.path" for column in _IMAGES))]
        pieces = parquet.iter_batches(_ROWS_AT_ONCE, columns=wanted)
    for piece in pieces:
        for column in _IMAGES:
            if column not in piece.schema.names:
                continue
            values = piece.column(column)
            if pa.types.is_struct(values.type) and values.type.get_field_index("path") >= 0:
                values = pc.struct_field(values, "path")
            if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
                yield from (path for path in values.to_pylist() if path)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except _TABLE_DAMAGE as error:
        raise DataError(f"{file} cannot be read ({error}). It is damaged or not fully copied: get it again.") from None


def _user(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    data = row.get("user_data")
    if isinstance(data, str):
        try:
            data = json.loads(data)
        except (ValueError, RecursionError):
            data = ()
    if data is not None and not isinstance(data, Mapping):
        raise DataError(f"{where}: user_data is no object and no JSON text of one. Correct it, or drop the row.")
    columns = {column: row[column] for column in USER_COLUMNS if row.get(column) is not None}
    return {**columns, **(data or {})}
