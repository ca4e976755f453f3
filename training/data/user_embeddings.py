"""The users part of a cache: one embedding for each user, from a folder of files or from the encoder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf

from ...adapter import EncoderSpec
from ...profiles import Profile
from ...profiles.embedding import SUFFIXES
from ...profiles.encoders import llm_identity
from ...safe_files import DAMAGE
from ..config import EncoderSection
from ..errors import DataError
from .pairs import Pair
from .parts import CachePass, digest
from .users import IDENTITY_FILE, distinct_users, encoder_spec, load_user_embedding, make_encoder


def encoded_users(run: CachePass, table: Dataset, extra: Mapping[str, Profile], section: EncoderSection) -> Dataset:
    """Return the embeddings of all users of ``table`` and of the ``extra`` ones, computed by the encoder.

    Columns: ``user_id``, ``embedding`` ``[dim]``, and ``problem``, which is empty here.

    Raises:
        DataError: a user's data cannot be read.
        EncoderError: the language model cannot be used.
    """
    encoder = make_encoder(section, run.state.device)
    profiles = {**extra, **distinct_users(_pairs(table))}
    names = sorted(profiles)
    keys = [encoder.cache_key(profiles[name]) or _attributes(profiles[name]) for name in names]
    settings = {"encoder": encoder.identity, "users": digest([names, keys])}
    part = run.part("users", settings, multiple_of=section.batch_size)
    if missing := part.missing(len(names)):
        advance = run.task("Caching users", sum(map(len, missing.values())))
        ordered = [profiles[names[row]] for rows in missing.values() for row in rows]
        vectors = (vector for batch in encoder.encode_batches(ordered, section.batch_size) for vector in batch)
        for shard, rows in missing.items():
            records = [_record(names[row], vector.numpy()) for row, vector in zip(rows, vectors, strict=False)]
            part.write(shard, _features(), records)
            advance(len(records))
        del vectors  # and with it the language model, which frees its memory itself
    return part.finish(len(names))


def loaded_users(
    run: CachePass, table: Dataset, extra: Mapping[str, Profile], folder: Path, section: EncoderSection
) -> Dataset:
    """Return the embeddings of all users of ``table``, and of the ``extra`` ones that have any, out of ``folder``.

    Columns: ``user_id``, ``embedding`` ``[dim]``, and ``problem``, which says of a user without embedding why.

    Raises:
        DataError: the folder belongs to another encoder than the configuration's, or its embeddings differ in length.
    """
    check_encoder(
        folder,
        encoder_spec(section),
        "data.encoder",
        "The adapter would name that one as its own: set data.encoder to the one of the folder, or make the embeddings "
        "again.",
    )
    states = {name: _file_states(folder, name) for name in {*table["user_id"][:], *extra}}
    users = set(table["user_id"][:])
    names = sorted(name for name in states if name in users or any(states[name]))
    settings = {"folder": str(folder.resolve()), "users": digest([[name, states[name]] for name in names])}
    part = run.part("users", settings)
    for shard, rows in part.missing(len(names)).items():
        part.write(shard, _features(), [_load(folder, names[row]) for row in rows])
    found = part.finish(len(names))
    _check_lengths(found, folder)
    return found


def _pairs(table: Dataset) -> Iterator[Pair]:
    """Yield the pairs without their images."""
    columns = (table[name][:] for name in ("where", "caption", "user_id", "user"))
    for row, (where, caption, user_id, user) in enumerate(zip(*columns, strict=True)):
        yield Pair(row, where, caption, b"", b"", user_id, json.loads(user))


def _attributes(profile: Profile) -> str:
    return profile.model_dump_json(exclude={"name", "notes"})


def _features() -> Features:
    embedding = ListOf(Value("float32"))
    return Features(user_id=Value("string"), embedding=embedding, problem=Value("string"))


def _record(user: str, embedding: Any, problem: str | None = None) -> dict[str, Any]:
    return {"user_id": user, "embedding": embedding, "problem": problem}


def _load(folder: Path, user: str) -> dict[str, Any]:
    try:
        return _record(user, load_user_embedding(folder, user).numpy())
    except DataError as error:
        return _record(user, None, str(error))


def _file_states(folder: Path, user: str) -> list[list[int] | None]:
    """Return size and time of change of the files that may hold a user's embedding, in nanoseconds."""
    return [_state(folder / f"{user}{suffix}") for suffix in SUFFIXES]


def _state(path: Path) -> list[int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def check_encoder(folder: Path, spec: EncoderSpec, asking: str, advice: str) -> None:
    """Refuse a folder of embeddings that says that they are from another encoder than that of ``asking``.

    Raises:
        DataError: they are, or the folder cannot be asked; the message ends with ``advice``.
    """
    expected = spec.name if spec.template is None else llm_identity(spec.name, spec.template)
    path = folder / IDENTITY_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["encoder"]
    except FileNotFoundError:
        return
    except DAMAGE:
        raise DataError(f"{path} is damaged: expected what `psa encode` writes. Make the embeddings again.") from None
    if found != expected:
        raise DataError(
            f"The embeddings in {folder} come from the encoder {found}, and {asking} is {expected}. {advice}"
        )


def _check_lengths(users: Dataset, folder: Path) -> None:
    lengths = pc.list_value_length(users.data.column("embedding")).to_pylist()
    examples = {length: user for user, length in zip(users["user_id"][:], lengths, strict=True) if length is not None}
    if len(examples) > 1:
        found = ", ".join(f"{length} numbers for the user {user}" for length, user in sorted(examples.items()))
        raise DataError(
            f"The embeddings in {folder} differ in length: {found}. They come from different encoders; make them again."
        )
