"""Users of a data set: ids, profiles, embeddings on disk, and the encoder that computes them.

Profiles and encoders themselves live in ``profiles/``; here is how a data set writes them down.
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ...adapter import EncoderSpec
from ...profiles import (
    CATEGORIES,
    EncoderError,
    Profile,
    ProfileError,
    default_template,
    load_embedding,
    parse_profile,
)
from ...profiles.embedding import SUFFIXES
from ...profiles.encoders import (
    AttributesEncoder,
    CPUHost,
    Encoder,
    LanguageModelEncoder,
    ModelHost,
    find_language_model,
)
from ...safe_files import PRIVATE, make_private, replacing
from ..config import EncoderSection
from ..errors import DataError

if TYPE_CHECKING:
    from .pairs import Pair

IDENTITY_FILE = "encoder.json"
_FORMAT = "psa_embeddings"
_FORMAT_VERSION = 1

# Columns of a user table, and the fields of a profile that they fill.
_FIELDS = {
    "Age": "age",
    "Gender": "gender",
    "Religion": "religion",
    "Physical_Condition": "physical_condition",
    "Mental_Condition": "mental_condition",
}
_BANNED = "Banned_Categories"
USER_COLUMNS = ("User_ID", "Cluster_ID", "Age_Group", *_FIELDS, _BANNED, "Allowed_Categories")
_FILE_NAME = re.compile(r"\w[\w.@+-]{0,99}")
# Beside its weights a model needs memory for what it computes.
_RESERVE = 2 * 1024**3


def user_id(value: Any) -> str:
    """Return a User_ID as the release writes it: numbers with seven digits ("0000012"), other text as it is.

    Raises:
        DataError: it cannot be the name of an embedding file.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # how pandas writes whole numbers of a column with gaps
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        text = str(value).strip()
        if _FILE_NAME.fullmatch(text):
            return f"{int(text):07d}" if text.isascii() and text.isdecimal() else text
    raise DataError(
        f"{value!r:.60} is no User_ID: expected a number, or a name of at most 100 letters, digits and _ . @ + - that "
        "begins with a letter, a digit or _, because embeddings lie in files of that name."
    )


def read_profile(row: Mapping[str, Any], where: str) -> Profile:
    """Return the profile in a row of ``users.csv`` or in a ``user_data``; ``where`` names it in messages.

    Banned_Categories, as a list or as the release's text of one, decide against the rules. The religion "None"
    is a word; an empty or missing value is unsaid.

    Raises:
        DataError: a value is wrong, or there is nothing from which an encoder could tell users apart.
    """
    fields: dict[str, Any] = {field: row.get(column) for column, field in _FIELDS.items()}
    if all(value is None for value in (*fields.values(), row.get(_BANNED))):
        raise DataError(
            f"{where} says nothing about its user: expected some of {', '.join((*_FIELDS, _BANNED))}. Add them, or "
            "use a folder of embeddings."
        )
    fields["age"] = _age(fields["age"])
    names = said_bans(row, where)
    if names is not None:
        fields["overrides"] = {category: "ban" if category in names else "allow" for category in CATEGORIES}
    try:
        return parse_profile(fields, where)
    except ProfileError as error:
        raise DataError(str(error)) from None


def said_bans(row: Mapping[str, Any], where: str) -> frozenset[str] | None:
    """Return the Banned_Categories of a row like that of ``read_profile``; None if it says nothing of them.

    Raises:
        DataError: they are no list of categories.
    """
    banned = row.get(_BANNED)
    return None if banned is None or banned == "" else _categories(banned, where)


def _age(value: Any) -> Any:
    if isinstance(value, str):
        text = value.strip()
        return int(text) if text.isascii() and text.isdecimal() else text or None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _categories(value: Any, where: str) -> frozenset[str]:
    names = value
    if isinstance(value, str):
        try:
            names = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            names = None
    if not isinstance(names, (list, tuple)) or not all(name in CATEGORIES for name in names):
        raise DataError(
            f"{where}: {_BANNED} should be a list of some of {', '.join(CATEGORIES)}, such as ['Hate', 'Violence']. "
            "Correct it and try again."
        )
    return frozenset(names)


def read_users(path: Path) -> dict[str, Profile]:
    """Return the users of a table as ``psa users`` writes it, by User_ID.

    Without a column User_ID a user's number is that of its row, from 1, as in the release's ``users.csv``.

    Raises:
        DataError: the file cannot be read, or a row of it.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a user table ({error}). Name a CSV file in UTF-8.") from None
    if not rows:
        raise DataError(f"{path} is empty: expected a CSV table of users with a first line of column names.")
    return _distinct(
        ((f"row {number} of {path.name}", row.get("User_ID", number), row) for number, row in enumerate(rows, start=1)),
        user_id,
    )


def distinct_users(pairs: Iterable[Pair]) -> dict[str, Profile]:
    """Return the users of preference pairs, by User_ID, in the order in which they come.

    Raises:
        DataError: a user cannot be read, or is another one in another row.
    """
    return _distinct(((pair.where, pair.user_id, pair.user) for pair in pairs), str)


def _distinct(rows: Iterable[tuple[str, Any, Mapping[str, Any]]], name: Callable[[Any], str]) -> dict[str, Profile]:
    users: dict[str, Profile] = {}
    first: dict[str, str] = {}
    for where, identity, row in rows:
        try:
            user = name(identity)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        profile = read_profile(row, where)
        if users.setdefault(user, profile) != profile:
            raise DataError(
                f"{where}: the user {user} is somebody else in {first[user]}. Give each user a User_ID of their own."
            )
        first.setdefault(user, where)
    return users


def load_user_embedding(folder: Path, user: str) -> Tensor:
    """Return the embedding ``[dim]`` in ``<folder>/<User_ID>.npy`` or ``.safetensors``, float32.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    for suffix in SUFFIXES:
        path = folder / f"{user}{suffix}"
        if not path.is_file():
            continue
        try:
            vectors = load_embedding(path).vectors
        except EncoderError as error:
            raise DataError(str(error)) from None
        if len(vectors) != 1:
            raise DataError(
                f"{path} holds the embeddings of {len(vectors)} users; expected one file for each user. Make them anew "
                "with `psa encode`."
            )
        return vectors[0]
    raise DataError(
        f"There is no embedding of the user {user}: expected {folder / user}.npy. Make it with `psa encode`, or leave "
        "out data.embeddings, so that the encoder computes it from user_data."
    )


class DeviceHost:
    """Runs a language model on a CUDA device in bfloat16; what does not fit lies in main memory and on disk."""

    dtype = torch.bfloat16

    def __init__(self, device: torch.device) -> None:
        """Use ``device``."""
        self.device = device

    def make_room(self, size: int) -> dict[Any, int] | None:
        """Return None if ``size`` bytes fit beside a reserve, else the memory of the device and of the machine."""
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(self.device)[0] - _RESERVE
        if size <= free:
            return None
        return {self.device.index or 0: max(free, 0), **(CPUHost().make_room(size) or {"cpu": size})}

    @contextmanager
    def hold(self, model: nn.Module) -> Iterator[None]:
        """Move the model to the device, and throw its weights away afterwards."""
        model.to(self.device)
        try:
            yield
        finally:
            model.to("meta")

    def release(self) -> None:
        """Return cached device memory."""
        torch.cuda.empty_cache()


def make_encoder(section: EncoderSection, device: torch.device) -> Encoder:
    """Return the encoder of a configuration; a language model runs in bfloat16 on CUDA, else in float32 on the CPU.

    Raises:
        DataError: there is no such encoder, or its template cannot be read.
        EncoderError: the language model is not on this machine.
    """
    return encoder_of(encoder_spec(section), section.folders, device)


def encoder_of(spec: EncoderSpec, folders: Sequence[Path], device: torch.device) -> Encoder:
    """Return the encoder that an adapter names; ``folders`` are where language models lie.

    Raises:
        DataError: there is no such encoder, or the adapter does not tell its template.
        EncoderError: the language model is not on this machine.
    """
    if spec.kind == "attributes":
        if spec.name != AttributesEncoder.identity:
            raise DataError(
                f'There is no attributes encoder "{spec.name}"; this version has "{AttributesEncoder.identity}". For a '
                'language model set kind = "llm".'
            )
        return AttributesEncoder()
    if spec.template is None:
        raise DataError(
            f"The adapter does not tell the template that it gave to {spec.name}. Convert it with --template."
        )
    files = find_language_model(spec.name, folders)
    host: ModelHost = DeviceHost(device) if device.type == "cuda" else CPUHost()
    return LanguageModelEncoder(spec.name, spec.template, files, host)


def encoder_spec(section: EncoderSection) -> EncoderSpec:
    """Return what an adapter says about its encoder, with the text of the template.

    Raises:
        DataError: the template cannot be read.
    """
    if section.kind == "attributes":
        return EncoderSpec(kind=section.kind, name=section.name)
    try:
        template = section.template.read_text(encoding="utf-8") if section.template else default_template()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"The template {section.template} cannot be read ({error}). Name a text file in UTF-8."
        ) from None
    return EncoderSpec(kind=section.kind, name=section.name, template=template)


def encode_users(
    users: Mapping[str, Profile], output: Path, encoder: Encoder, batch_size: int, done: Callable[[int], None]
) -> None:
    """Write ``<output>/<User_ID>.npy`` (float32 ``[dim]``, private) for all users that have no such file yet.

    ``done`` is told how many more users are finished. The folder names its encoder, so that embeddings of
    different encoders never lie in one.

    Raises:
        DataError: the folder belongs to another encoder, or cannot be written.
        EncoderError: the language model cannot be used.
    """
    try:
        make_private(output)
        _claim(output, encoder.identity)
        missing = {user: profile for user, profile in users.items() if not _is_there(output / f"{user}.npy")}
        done(len(users) - len(missing))
        names = iter(missing)
        for batch in encoder.encode_batches(list(missing.values()), batch_size):
            for vector, user in zip(batch, islice(names, len(batch)), strict=True):
                with replacing(output / f"{user}.npy", PRIVATE) as aside, aside.open("wb") as file:
                    np.save(file, vector.numpy())
            done(len(batch))
    except OSError as error:
        raise DataError(
            f"The folder {output} cannot be written ({error.strerror}). Make room on the disk, or name another folder."
        ) from None


def _is_there(path: Path) -> bool:
    try:
        return len(load_embedding(path).vectors) == 1
    except EncoderError:
        return False


def _claim(folder: Path, identity: str) -> None:
    """Name the encoder of a folder; processes that do so at the same time write the same."""
    path = folder / IDENTITY_FILE
    content = {"format": _FORMAT, "format_version": _FORMAT_VERSION, "encoder": identity}
    occupied = any(folder.glob("*.npy"))  # before looking for the name, which is always written first
    if not path.exists():
        if occupied:
            raise DataError(
                f"{folder} holds embeddings of an unknown encoder: it has no {IDENTITY_FILE}. Name another folder."
            )
        with replacing(path, PRIVATE) as aside:
            aside.write_text(json.dumps(content, indent=2), encoding="utf-8")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if found != content:
        other = found.get("encoder") if isinstance(found, dict) else None
        raise DataError(
            f"The embeddings in {folder} come from another encoder ({other or 'unknown'}) than this one ({identity}). "
            "Name another folder, or delete that one."
        )
