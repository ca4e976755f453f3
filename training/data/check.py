"""Looks at a whole set of preference pairs before anything is trained on it. Changes nothing."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeAlias

from rich.progress import Progress

from ...profiles import Profile, banned_categories
from ..errors import DataError
from .categories import allows, known_category
from .images import open_image
from .pairs import ImageSource, Pair, Pairs, open_pairs
from .users import load_user_embedding, read_profile, said_bans

_FEWEST_USERS = 3  # by the defaults of [validation] and [adapter]
_PAIRS_AT_ONCE = 64

# An image that several rows share is a file; an image inside a table belongs to its row and side.
_Key: TypeAlias = Path | tuple[int, str]


@dataclass
class Report:
    """What a set holds, and what is wrong with it; each finding is a sentence that names its row or file.

    ``sizes`` counts image files by (width, height) in pixels. ``categories`` counts rows by their column
    ``category`` or, if there is none, users by what they ban (``banned_by_users``). ``known_categories`` are rows whose
    category is one of the seven or "harmless", ``preferences`` those that are preferences with ``loss.fidelity``, and
    ``without_bans`` the users who do not say what they ban, or say something else there, with the first such row.
    """

    rows: int = 0
    users: int = 0
    categories: Counter[str] = field(default_factory=Counter)
    banned_by_users: bool = True
    known_categories: int = 0
    preferences: int = 0
    without_bans: dict[str, str] = field(default_factory=dict)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    bad_rows: list[str] = field(default_factory=list)
    missing_images: list[str] = field(default_factory=list)
    broken_images: list[str] = field(default_factory=list)
    unusable_users: list[str] = field(default_factory=list)
    missing_embeddings: list[str] = field(default_factory=list)
    same_images: list[str] = field(default_factory=list)
    duplicate_rows: list[str] = field(default_factory=list)
    duplicate_files: list[str] = field(default_factory=list)

    @property
    def obstacles(self) -> dict[str, list[str]]:
        """The findings at which training would stop, by what they are."""
        return {
            "rows that are no pairs": self.bad_rows,
            "missing images": self.missing_images,
            "broken images": self.broken_images,
            "unusable users": self.unusable_users,
            "missing embeddings": self.missing_embeddings,
        }

    @property
    def oddities(self) -> dict[str, list[str]]:
        """The findings that training does not mind, by what they are."""
        return {
            "pairs of the same image": self.same_images,
            "repeated rows": self.duplicate_rows,
            "copies of images": self.duplicate_files,
            "too few users for the defaults": self._few_users,
        }

    @property
    def _few_users(self) -> list[str]:
        if not 0 < self.users < _FEWEST_USERS:
            return []
        return [
            f"The defaults need {_FEWEST_USERS} users, and there are {self.users}: one is kept out as unseen "
            "(validation.unseen_users), and adapter.standardise needs two."
        ]

    @property
    def reasons_against_fidelity(self) -> tuple[str, ...]:
        """Why it cannot be trained on with ``loss.fidelity``, apart from ``reasons``; empty if it can be."""
        reasons = []
        if not self.known_categories:
            reasons.append("no row has a column category that names one of the seven, or harmless")
        if self.without_bans:
            users, where = len(self.without_bans), next(iter(self.without_bans.values()))
            reasons.append(f"users whose Banned_Categories are missing or no list of categories: {users} ({where})")
        elif not self.preferences:
            reasons.append("every pair shows what its user allows, so that there is nothing to learn")
        return tuple(reasons)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why nothing can be trained on the set; empty if it can be."""
        reasons = [f"{what} ({len(findings)})" for what, findings in self.obstacles.items() if findings]
        if not self.rows:
            reasons.append("there are no rows")
        elif len(self.same_images) == self.rows:
            reasons.append("the two images of every pair are the same, so that there is nothing to prefer")
        return tuple(reasons)


def check_pairs(path: Path, embeddings: Path | None, workers: int, progress: Progress | None = None) -> Report:
    """Read every row and every image of the set in ``path`` once, with ``workers`` threads.

    With ``embeddings`` every user has to have one there; without, a profile from which an encoder makes one.

    Raises:
        DataError: ``path`` is no set of preference pairs.
    """
    check = _Check(embeddings)
    pairs = _reported(open_pairs(path), progress)
    with ThreadPoolExecutor(workers) as pool:
        while rows := list(islice(pairs, _PAIRS_AT_ONCE)):
            check.look_at(rows, pool)
    return check.finish()


def _reported(pairs: Pairs, progress: Progress | None) -> Iterator[Pair | DataError]:
    task = progress.add_task("rows", total=None) if progress else None
    for pair in pairs.read():
        yield pair
        if progress and task is not None:
            progress.advance(task)


class _Seen(NamedTuple):
    """An image that was looked at: hashes of its file and of its pixels, and (width, height)."""

    content: bytes
    pixels: bytes
    size: tuple[int, int]


class _Check:
    """The report as it grows, and what has been seen so far."""

    def __init__(self, embeddings: Path | None) -> None:
        self.report = Report()
        self._embeddings = embeddings
        self._profiles: dict[str, Profile | None] = {}
        self._first_row: dict[str, str] = {}
        self._images: dict[_Key, _Seen | None] = {}
        self._contents: dict[bytes, Path | None] = {}
        self._pairs: dict[bytes, str] = {}
        self._dims: dict[int, str] = {}

    def look_at(self, rows: list[Pair | DataError], pool: Executor) -> None:
        pairs = [row for row in rows if isinstance(row, Pair)]
        self.report.rows += len(rows)
        self.report.bad_rows += [str(row) for row in rows if isinstance(row, DataError)]
        new = {}
        for pair in pairs:
            for side, source in _images(pair):
                key = _key(pair, side, source)
                if key not in self._images:
                    new[key] = (source, side, pair.where)
        for key, result in zip(new, pool.map(_look_at, *zip(*new.values(), strict=True)) if new else (), strict=True):
            self._images[key] = self._image(new[key][0], result)
        for pair in pairs:
            self._pair(pair, *(self._images[_key(pair, side, source)] for side, source in _images(pair)))
            self._user(pair)
            self._bans(pair)
        for key in [key for key in new if not isinstance(key, Path)]:
            del self._images[key]

    def finish(self) -> Report:
        self.report.users = len(self._first_row)
        if self.report.banned_by_users:
            for profile in self._profiles.values():
                self.report.categories.update(banned_categories(profile) if profile else ())
        if len(self._dims) > 1:
            sizes = ", ".join(f"{dim} ({user})" for dim, user in sorted(self._dims.items()))
            self.report.missing_embeddings.append(f"The embeddings have different lengths: {sizes}.")
        return self.report

    def _image(self, source: ImageSource, result: _Seen | DataError) -> _Seen | None:
        if isinstance(result, DataError):
            missing = isinstance(source, Path) and not source.exists()
            (self.report.missing_images if missing else self.report.broken_images).append(str(result))
            return None
        name = source if isinstance(source, Path) else None
        known = result.content in self._contents
        first = self._contents.setdefault(result.content, name)
        # A table repeats an image that several rows share; a folder has no reason to.
        if name is not None or not known:
            self.report.sizes[result.size] += 1
        if name is not None and first is not None and first != name:
            self.report.duplicate_files.append(f"{name} is a copy of {first}.")
        return result

    def _pair(self, pair: Pair, chosen: _Seen | None, rejected: _Seen | None) -> None:
        self.report.known_categories += known_category(pair.category) is not None
        if pair.category is not None:
            self.report.banned_by_users = False
            self.report.categories[pair.category] += 1
        if chosen is None or rejected is None:
            return
        if (chosen.pixels, chosen.size) == (rejected.pixels, rejected.size):
            self.report.same_images.append(f"{pair.where}: the chosen and the rejected image are the same.")
        texts = (pair.user_id.encode(), pair.caption.encode("utf-8", "surrogatepass"))
        key = hashlib.sha256(b"\0".join((*texts, chosen.content, rejected.content))).digest()
        first = self._pairs.setdefault(key, pair.where)
        if first != pair.where:
            self.report.duplicate_rows.append(f"{pair.where} repeats {first}.")

    def _user(self, pair: Pair) -> None:
        known = pair.user_id in self._first_row
        first = self._first_row.setdefault(pair.user_id, pair.where)
        try:
            profile = read_profile(pair.user, pair.where)
        except DataError as error:
            profile = None
            if self._embeddings is None:
                self.report.unusable_users.append(str(error))
        if not known:
            self._profiles[pair.user_id] = profile
            self._embedding(pair)
        elif self._embeddings is None and profile and profile != self._profiles[pair.user_id]:
            self.report.unusable_users.append(f"{pair.where}: the user {pair.user_id} is somebody else in {first}.")

    def _bans(self, pair: Pair) -> None:
        try:
            said = said_bans(pair.user, pair.where)
        except DataError:
            said = None  # with embeddings nobody else reads them
        if said is None:
            self.report.without_bans.setdefault(pair.user_id, pair.where)
        elif not allows(said, pair.category):
            self.report.preferences += 1

    def _embedding(self, pair: Pair) -> None:
        if self._embeddings is None:
            return
        try:
            embedding = load_user_embedding(self._embeddings, pair.user_id)
        except DataError as error:
            self.report.missing_embeddings.append(f"{pair.where}: {error}")
        else:
            self._dims.setdefault(len(embedding), pair.user_id)


def _images(pair: Pair) -> tuple[tuple[str, ImageSource], ...]:
    return ("chosen", pair.chosen), ("rejected", pair.rejected)


def _key(pair: Pair, side: str, source: ImageSource) -> _Key:
    return source if isinstance(source, Path) else (pair.row, side)


def _look_at(source: ImageSource, side: str, where: str) -> _Seen | DataError:
    try:
        image = open_image(source, side, where)
        content = source if isinstance(source, bytes) else source.read_bytes()
    except DataError as error:
        return error
    return _Seen(hashlib.sha256(content).digest(), hashlib.sha256(image.tobytes()).digest(), image.size)
