"""A part of a cache: rows computed once and kept in Arrow shards, in a folder named by what they depend on.

Shards are written whole or not at all, so a pass that was interrupted goes on at the first one that is missing.
Format version 1: ``shard-<number>.arrow`` as the `datasets` library writes them, and ``manifest.json``, written
last, with ``format``, ``format_version``, ``key``, ``settings`` and the sizes of the shards in bytes.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from accelerate import PartialState
from datasets import Dataset, Features, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from rich.progress import Progress

from ...safe_files import DAMAGE, PRIVATE, make_private, replacing
from ..config import TrainConfig
from ..errors import DataError

FORMAT = "psa_cache"
FORMAT_VERSION = 1

Setting = str | int | bool | None


def digest(values: Sequence[Any]) -> str:
    """Return a hash (sha256, hex) of values that JSON knows, for settings that are too long to be spelled out."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


@dataclass(frozen=True)
class CachePass:
    """One caching pass: the cache's folder, this process among all, the rows of a shard, and the progress bar."""

    root: Path
    state: PartialState
    shard_rows: int
    progress: Progress | None = None

    def part(self, name: str, settings: Mapping[str, Setting], multiple_of: int = 1) -> Part:
        """Return a part with shards of a multiple of ``multiple_of`` rows, so that no batch of that size is cut."""
        shard_rows = multiple_of * max(1, self.shard_rows // multiple_of)
        return Part(self.root, name, {**settings, "shard_rows": shard_rows}, shard_rows, self.state)

    def task(self, description: str, total: int | None) -> Callable[[int], None]:
        """Show a task in the progress bar; the function returned is told how many more rows are done."""
        if self.progress is None:
            return lambda rows: None
        return partial(self.progress.advance, self.progress.add_task(description, total=total))


def storage_dtype(config: TrainConfig) -> torch.dtype:
    """Return how latents and text embeddings are stored: in float32 if the UNet runs in it, else in float16."""
    return torch.float32 if config.model.dtype == "fp32" else torch.float16


def free_memory(device: torch.device) -> None:
    """Give the memory of a model that is no longer used back to the machine and to ``device``."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Part:
    """The folder of one part; readable by its owner only, since it tells of users."""

    def __init__(
        self, root: Path, name: str, settings: Mapping[str, Setting], shard_rows: int, state: PartialState
    ) -> None:
        """Use ``<root>/<name>-<key>``, with a key made of everything in ``settings`` and of the format."""
        self.shard_rows = shard_rows
        self._settings = dict(settings)
        self._state = state
        self._key = digest([FORMAT, FORMAT_VERSION, name, sorted(self._settings.items())])
        self.folder = root / f"{name}-{self._key[:16]}"

    def shards(self) -> int | None:
        """Return the number of shards if the part is whole, else None."""
        sizes = self._sizes()
        whole = bool(sizes) and all(self._size(shard) == size for shard, size in enumerate(sizes))
        return len(sizes) if whole else None

    def is_missing(self, shard: int) -> bool:
        """Return whether this process has to compute a shard: every n-th one is its own, if it is not there."""
        return self._lacks(shard, self._sizes())

    def missing(self, rows: int) -> dict[int, range]:
        """Return the shards that this process has to compute, each with its rows out of all ``rows``."""
        sizes = self._sizes()
        starts = range(0, rows, self.shard_rows)
        shards = {shard: range(start, min(start + self.shard_rows, rows)) for shard, start in enumerate(starts)}
        return {shard: members for shard, members in shards.items() if self._lacks(shard, sizes)}

    def write(self, shard: int, features: Features, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a shard, replacing a damaged one.

        Raises:
            DataError: the folder cannot be written.
        """
        with self._writable():
            make_private(self.folder)
            with (
                replacing(self._path(shard), PRIVATE) as aside,
                aside.open("wb") as file,
                ArrowWriter(stream=file, features=features) as writer,
            ):
                for row in rows:
                    writer.write(dict(row))
                writer.finalize()

    def finish(self, rows: int) -> Dataset:
        """Wait until all processes have written their shards of all ``rows``, complete the part and open it.

        Raises:
            DataError: a shard is missing or damaged, or the folder cannot be written.
        """
        shards = -(-rows // self.shard_rows)
        self._state.wait_for_everyone()
        if self._state.is_main_process and self.shards() is None:
            self._write_manifest(shards)
        self._state.wait_for_everyone()
        if self.shards() != shards:
            raise DataError(
                f"The cache in {self.folder} is not complete: expected {shards} shards. Every machine has to see the "
                "same cache folder, and the data may not change while they are cached; start again."
            )
        return self.open(shards)

    def open(self, shards: int) -> Dataset:
        """Map a whole part into memory.

        Raises:
            DataError: it is damaged.
        """
        try:
            return concatenate_datasets([Dataset.from_file(str(self._path(shard))) for shard in range(shards)])
        except (*DAMAGE, pa.ArrowException):
            raise DataError(
                f"The cache in {self.folder} is damaged: its shards cannot be read. Delete this folder and start again."
            ) from None

    def _lacks(self, shard: int, sizes: Sequence[int]) -> bool:
        if shard % self._state.num_processes != self._state.process_index:
            return False
        found = self._size(shard)
        return found is None or (shard < len(sizes) and found != sizes[shard])

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.arrow"

    def _size(self, shard: int) -> int | None:
        try:
            return self._path(shard).stat().st_size
        except FileNotFoundError:
            return None

    def _sizes(self) -> list[int]:
        """Return the sizes in the manifest; none if there is none, and then the shards that are there count."""
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
            return list(manifest["shards"]) if manifest["key"] == self._key else []
        except FileNotFoundError:
            return []
        except DAMAGE:
            raise DataError(
                f"{self.folder / 'manifest.json'} is damaged: expected what a caching pass writes. Delete the folder "
                f"{self.folder} and start again."
            ) from None

    def _write_manifest(self, shards: int) -> None:
        sizes = [self._size(shard) for shard in range(shards)]
        if None in sizes:
            return  # `finish` says so on every process
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "key": self._key,
            "settings": self._settings,
            "shards": sizes,
        }
        with self._writable(), replacing(self.folder / "manifest.json", PRIVATE) as aside:
            aside.write_text(json.dumps(content, indent=2), encoding="utf-8")

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"The cache folder {self.folder} cannot be written ({error.strerror or error}). Make room on the disk, "
                "or name another folder in data.cache. What is cached already stays."
            ) from None
