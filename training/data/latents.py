"""The latents part of a cache: pairs cropped, encoded by the VAE and stored; what cannot be used is reported."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby, islice
from typing import Any

import torch
from datasets import Array3D, Dataset, Features, Value
from datasets import Sequence as ListOf
from torch import Tensor

from ..base import BaseModel, ImageCoder
from ..config import TrainConfig
from ..errors import DataError
from .images import Crop, load_pair
from .pairs import Pair, Pairs
from .parts import CachePass, Part, Setting, free_memory, storage_dtype
from .skipped import Skipped

_LOADERS = 4  # threads; Pillow decodes and resizes outside Python's lock

_Images = tuple[Tensor, Tensor, Crop]


def cache_latents(
    run: CachePass,
    pairs: Pairs,
    fingerprint: str,
    rows: int,
    base: BaseModel,
    config: TrainConfig,
    skipped: Skipped,
) -> Dataset:
    """Return the latents of all ``rows`` pairs, whose fingerprint is given; those that are not cached are encoded.

    Columns: ``chosen`` and ``rejected`` ``[channels, height, width]``, the fields of their ``Crop``, and ``problem``,
    which says of a row without latents why.

    Raises:
        DataError: more rows than allowed cannot be used, or the cache cannot be read or written.
    """
    data = config.data
    settings: dict[str, Setting] = {
        "vae": base.fingerprint("vae"),
        "pairs": fingerprint,
        "resolution": data.resolution,
        "crop": data.crop,
        "flip": data.flip,
        "seed": config.run.seed if data.flip or data.crop == "random" else None,
        "dtype": str(storage_dtype(config)),
    }
    part = run.part("latents", settings, multiple_of=data.cache_batch_size)
    if missing := part.missing(rows):
        _encode_shards(run, part, missing, pairs, base, config, skipped)
        free_memory(run.state.device)
    latents = part.finish(rows)
    for row, problem in enumerate(latents["problem"][:]):
        if problem is not None:
            skipped.add(row, problem)
    return latents


def _encode_shards(
    run: CachePass,
    part: Part,
    missing: dict[int, range],
    pairs: Pairs,
    base: BaseModel,
    config: TrainConfig,
    skipped: Skipped,
) -> None:
    data, dtype = config.data, storage_dtype(config)
    features = _features(base.latent_channels, data.resolution // base.vae_scale_factor, dtype)
    load = partial(_load, resolution=data.resolution, crop=data.crop, flip=data.flip, seed=config.run.seed)
    advance = run.task("Caching latents", sum(map(len, missing.values())))
    coder = base.vae(run.state.device)
    needed = islice(pairs, missing[max(missing)].stop)
    records: list[dict[str, Any]] = []
    for batch, images in _loaded(_batches(needed, missing, part.shard_rows, data.cache_batch_size), load):
        for record in _encode(coder, batch, images, dtype):
            if record["problem"] is not None:
                skipped.add(record["row"], record["problem"])
            records.append(record)
        advance(len(batch))
        shard = batch[0].row // part.shard_rows
        if len(records) == len(missing[shard]):
            part.write(shard, features, records)
            records = []


def _features(channels: int, size: int, dtype: torch.dtype) -> Features:
    latent = Array3D((channels, size, size), str(dtype).removeprefix("torch."))
    return Features(
        row=Value("int64"),
        chosen=latent,
        rejected=latent,
        original_size=ListOf(Value("int32")),
        top_left=ListOf(Value("int32")),
        flipped=Value("bool"),
        problem=Value("string"),
    )


def _batches(pairs: Iterable[Pair], shards: Container[int], shard_rows: int, size: int) -> Iterator[list[Pair]]:
    """Cut the pairs of ``shards`` into batches that cross no shard: any process computes exactly the same."""
    for shard, members in groupby(pairs, key=lambda pair: pair.row // shard_rows):
        if shard in shards:
            while batch := list(islice(members, size)):
                yield batch


def _loaded(
    batches: Iterable[list[Pair]], load: Callable[[Pair], _Images | DataError]
) -> Iterator[tuple[list[Pair], list[_Images | DataError]]]:
    """Yield batches with their images, loading the next batch while the VAE works on one."""
    with ThreadPoolExecutor(_LOADERS) as pool:
        waiting: deque[tuple[list[Pair], list[Future[_Images | DataError]]]] = deque()
        for batch in batches:
            waiting.append((batch, [pool.submit(load, pair) for pair in batch]))
            if len(waiting) > 1:
                ready, futures = waiting.popleft()
                yield ready, [future.result() for future in futures]
        for ready, futures in waiting:
            yield ready, [future.result() for future in futures]


def _load(pair: Pair, **options: Any) -> _Images | DataError:
    try:
        return load_pair(pair, **options)
    except DataError as error:
        return error


def _encode(
    coder: ImageCoder, batch: Sequence[Pair], images: Sequence[_Images | DataError], dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    """Yield a row of the part for each pair."""
    latents = _latents(coder, [found for found in images if not isinstance(found, DataError)], dtype)
    for pair, found in zip(batch, images, strict=True):
        if isinstance(found, DataError):
            yield _without_latents(pair, str(found))
            continue
        chosen, rejected = next(latents)
        if bool(torch.isfinite(torch.stack((chosen, rejected))).all()):
            tensors = {"chosen": chosen.numpy(), "rejected": rejected.numpy()}
            yield {"row": pair.row, **tensors, **vars(found[2]), "problem": None}
        else:
            yield _without_latents(
                pair,
                f"{pair.where}: the VAE turns an image into numbers that are infinite, undefined, or too large for "
                f'{dtype}. Set model.dtype = "fp32", or use another base model.',
            )


def _without_latents(pair: Pair, problem: str) -> dict[str, Any]:
    empty = dict.fromkeys(("chosen", "rejected", "original_size", "top_left", "flipped"))
    return {"row": pair.row, **empty, "problem": problem}


def _latents(coder: ImageCoder, images: Sequence[_Images], dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    if images:
        chosen, rejected, _ = zip(*images, strict=True)
        # One after the other: the batch size of the configuration is that of the VAE.
        sides = [coder.encode(torch.stack(side)).to("cpu", dtype) for side in (chosen, rejected)]
        yield from zip(*sides, strict=True)
