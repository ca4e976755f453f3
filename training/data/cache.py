"""The caching pass: everything that frozen models make of a data set, computed once and kept in Arrow files.

Four parts under ``data.cache``: ``pairs`` (who and what the rows are, without images), ``users``, ``captions`` and
``latents``. Each has a key made of all that decides its content, so a changed setting never meets a stale one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Array2D, Dataset, Features, Value
from datasets import Sequence as ListOf
from rich.progress import Progress

from ...profiles import Profile
from ..base import BaseModel, TextEmbedding
from ..config import TrainConfig
from ..errors import DataError
from .cached import CachedPairs
from .categories import allowed_rows, unknown_rows
from .latents import cache_latents
from .pairs import Pair, Pairs, open_pairs
from .parts import CachePass, digest, free_memory, storage_dtype
from .skipped import Skipped
from .user_embeddings import encoded_users, loaded_users

logger = logging.getLogger(__name__)

SHARD_ROWS = 256
_PAIR_COLUMNS = ("where", "caption", "user_id", "user", "category")


def build_cache(
    config: TrainConfig,
    source: Path,
    base: BaseModel,
    extra_captions: Sequence[str],
    extra_profiles: Mapping[str, Profile],
    state: PartialState,
    progress: Progress | None = None,
    shard_rows: int = SHARD_ROWS,
) -> CachedPairs:
    """Cache the pairs of ``source``, or open what is cached of them; all processes of ``state`` share the work.

    Text embeddings are made of each distinct caption, the empty one and ``extra_captions``; user embeddings of each
    user of the rows and of ``extra_profiles`` (User_ID to profile; with ``data.embeddings`` those whose file is
    there). Users of the rows win over extra ones of the same id. A pass that was interrupted goes on where it
    stopped, at a shard of ``shard_rows`` rows. Each model is in memory only while it is used; for what is cached
    already none is loaded.

    Raises:
        DataError: the source cannot be read, more than ``data.max_skipped`` rows cannot be used, or the cache is
            damaged or cannot be written.
        EncoderError: the language model of ``data.encoder`` cannot be used.
    """
    run = CachePass(config.data.cache, state, shard_rows, progress)
    pairs = open_pairs(source)
    fingerprint = pairs.fingerprint()
    skipped = Skipped(config.data.max_skipped)
    table = _cache_table(run, pairs, fingerprint, source)
    allowed = allowed_rows(table, source) if config.loss.fidelity else None
    users = _cache_users(run, table, extra_profiles, config, skipped)
    captions = _cache_captions(run, {"", *table["caption"][:], *extra_captions}, base, config)
    latents = cache_latents(run, pairs, fingerprint, len(table), base, config, skipped)
    cached = CachedPairs(table, captions, users, latents, skipped.reports, allowed)
    if not cached:
        raise DataError(
            f"No row of {source} can be used. The first one: {cached.skipped[0]} `psa check-data` lists all."
        )
    if state.is_main_process:
        for report in cached.skipped:
            logger.warning("PSA: left out: %s", report)
        if allowed is not None and (unknown := unknown_rows(table)):
            logger.warning("PSA: rows of %s without a known category, which stay preferences: %d", source, unknown)
    return cached


def _cache_table(run: CachePass, pairs: Pairs, fingerprint: str, source: Path) -> Dataset:
    """Return the rows of the source without images: ``_PAIR_COLUMNS``, all of them text; ``user`` is JSON."""
    part = run.part("pairs", {"pairs": fingerprint, "columns": ", ".join(_PAIR_COLUMNS)})
    features = Features({name: Value("string") for name in _PAIR_COLUMNS})
    shards = part.shards()
    if shards is not None:
        return part.finish(len(part.open(shards)))
    advance = run.task("Reading pairs", None)
    members, rows, shard = iter(pairs), 0, 0
    while records := [_without_images(pair) for pair in islice(members, part.shard_rows)]:
        if part.is_missing(shard):
            part.write(shard, features, records)
        rows, shard = rows + len(records), shard + 1
        advance(len(records))
    if not rows:
        raise DataError(f"{source} holds no preference pair. Name a folder with at least one row.")
    return part.finish(rows)


def _without_images(pair: Pair) -> dict[str, str | None]:
    user = json.dumps(dict(pair.user), default=str)
    return dict(zip(_PAIR_COLUMNS, (pair.where, pair.caption, pair.user_id, user, pair.category), strict=True))


def _cache_users(
    run: CachePass, table: Dataset, extra: Mapping[str, Profile], config: TrainConfig, skipped: Skipped
) -> Dataset:
    """Return ``user_id``, ``embedding`` ``[dim]`` and ``problem``; rows of users without embedding are skipped."""
    data = config.data
    if data.embeddings is None:
        users = encoded_users(run, table, extra, data.encoder)
    else:
        users = loaded_users(run, table, extra, data.embeddings, data.encoder)
    problems = dict(zip(users["user_id"][:], users["problem"][:], strict=True))
    for row, (user, where) in enumerate(zip(table["user_id"][:], table["where"][:], strict=True)):
        if problems[user] is not None:
            skipped.add(row, f"{where}: {problems[user]}")
    return users


def _cache_captions(run: CachePass, captions: set[str], base: BaseModel, config: TrainConfig) -> Dataset:
    """Return ``caption``, ``hidden`` ``[tokens, dim]`` and, for SDXL, ``pooled`` ``[dim]``."""
    names = sorted(captions)
    dtype = storage_dtype(config)
    part = run.part("captions", {"text": base.fingerprint("text"), "captions": digest(names), "dtype": str(dtype)})
    if missing := part.missing(len(names)):
        advance = run.task("Caching captions", sum(map(len, missing.values())))
        encoder = base.text_encoder(run.state.device)
        for shard, rows in missing.items():
            members = [names[row] for row in rows]
            embeddings = encoder.encode(members)
            records = [_text_record(*named, dtype) for named in zip(members, embeddings, strict=True)]
            part.write(shard, _text_features(embeddings[0], dtype), records)
            advance(len(members))
        del encoder
        free_memory(run.state.device)
    return part.finish(len(names))


def _text_features(embedding: TextEmbedding, dtype: torch.dtype) -> Features:
    name = str(dtype).removeprefix("torch.")
    features = {"caption": Value("string"), "hidden": Array2D(tuple(embedding.hidden.shape), name)}
    return Features(features if embedding.pooled is None else {**features, "pooled": ListOf(Value(name))})


def _text_record(caption: str, embedding: TextEmbedding, dtype: torch.dtype) -> dict[str, Any]:
    tensors = {name: tensor.to(dtype) for name, tensor in embedding._asdict().items() if tensor is not None}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise DataError(
            f'The text encoder turns the caption "{caption}" into numbers that are infinite, undefined, or too large '
            f'for {dtype}. Set model.dtype = "fp32", or use another base model.'
        )
    return {"caption": caption, **{name: tensor.numpy() for name, tensor in tensors.items()}}
