"""The pictures of an evaluation, with who they are for and what the base drew; the unreadable ones, named."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image

from ...profiles import CATEGORIES
from ..data.categories import HARMLESS
from ..errors import DataError
from .manifest import MANIFEST, USERS, Picture, read_manifest

SOME = "bans some"

_LEVEL = re.compile(r"L[0-5]")


@dataclass(frozen=True)
class Shown:
    """One picture that can be read.

    ``label`` is the method, with the strength if that method has several; ``base`` is the base's picture of the same
    case, ``about`` what a judge is told about the person, if anything.
    """

    picture: Picture
    path: Path
    label: str
    about: str | None = field(repr=False)
    base: Shown | None = None

    def image(self) -> PIL.Image.Image:
        """Return the picture in RGB."""
        with PIL.Image.open(self.path) as image:
            return image.convert("RGB")

    @property
    def people(self) -> str:
        """The level, or how much the person bans."""
        if self.picture.level is not None:
            return self.picture.level
        count = len(self.picture.banned)
        return "bans nothing" if not count else "bans everything" if count == len(CATEGORIES) else SOME

    @property
    def seen(self) -> str:
        """Whether the training knew the person: seen, unseen, or nothing where nobody can tell."""
        return {True: "seen", False: "unseen", None: ""}[self.picture.seen]

    @property
    def asks(self) -> str:
        """What the prompt asks this person for: "banned", "allowed", "harmless", or "unknown" if nobody has said."""
        if self.picture.category is None:
            return "unknown"
        if self.picture.category == HARMLESS:
            return HARMLESS
        return "banned" if self.picture.category in self.picture.banned else "allowed"

    @property
    def sensitive(self) -> bool:
        """Whether the prompt is known to ask for one of the seven categories."""
        return self.asks in ("banned", "allowed")

    @property
    def asked(self) -> str:
        """The same with how: "banned, implied"."""
        content = self.picture.content if self.sensitive else None
        return self.asks if content is None else f"{self.asks}, {content}"


@dataclass(frozen=True)
class Gallery:
    """All pictures of an evaluation that can be read, in the manifest's order."""

    folder: Path
    pictures: tuple[Shown, ...]
    unreadable: Mapping[str, str]
    base: str

    @property
    def labels(self) -> tuple[str, ...]:
        """The methods, the base first, then in the manifest's order."""
        found = dict.fromkeys(shown.label for shown in self.pictures)
        return tuple(sorted(found, key=lambda label: label != self.base))

    def of(self, label: str) -> list[Shown]:
        """Return the pictures of a method."""
        return [shown for shown in self.pictures if shown.label == label]


def open_gallery(folder: Path, base: str) -> Gallery:
    """Read a folder's manifest, its people and, once, every picture.

    ``base`` is the label of the method that the others are compared with. Pictures that are missing or cannot be read
    are listed.

    Raises:
        DataError: the manifest or the people's file is missing or damaged, the manifest names no picture, or none of
            its pictures can be read.
    """
    rows = read_manifest(folder)
    if not rows:
        raise DataError(f"{folder / MANIFEST} names no picture. Draw some first: psa evaluate CONFIG.")
    about = _people(folder / USERS)
    images = dict.fromkeys(row.image for row in rows)
    unreadable = {image: reason for image in images if (reason := _unreadable(folder / image)) is not None}
    if len(unreadable) == len(images):
        name, reason = next(iter(unreadable.items()))
        raise DataError(
            f"None of the {len(unreadable)} pictures in {folder / MANIFEST} can be read; the first, {name}: {reason}. "
            "Put the pictures back beside the manifest, or delete those that are damaged: psa evaluate CONFIG draws "
            "what is not there."
        )
    labels = _labels(rows)
    bases: dict[str, Shown] = {}
    for row in rows:
        if labels[_made(row)] == base and row.image not in unreadable and row.case not in bases:
            bases[row.case] = Shown(row, folder / row.image, base, about.get(row.user))
    pictures = tuple(
        Shown(row, folder / row.image, labels[_made(row)], about.get(row.user), bases.get(row.case))
        for row in rows
        if row.image not in unreadable
    )
    return Gallery(folder, pictures, unreadable, base)


def strengths(gallery: Gallery) -> list[dict[float, str]]:
    """Return the methods that are one adapter at several strengths, as ``{strength: label}``, weakest first."""
    trained: dict[str, set[str]] = defaultdict(set)
    strength: dict[str, float] = {}
    method: dict[str, str] = {}  # a static one may have the same file
    for shown in gallery.pictures:
        if shown.picture.adapter is not None:
            trained[shown.label].add(shown.picture.adapter)
            strength[shown.label] = shown.picture.strength
            method[shown.label] = shown.picture.method
    families: dict[tuple[str, frozenset[str]], dict[float, str]] = defaultdict(dict)
    for label, adapters in trained.items():
        families[method[label], frozenset(adapters)][strength[label]] = label
    return [dict(sorted(family.items())) for family in families.values() if len(family) > 1]


def incomplete(gallery: Gallery) -> list[str]:
    """Return in words which methods and trainings lack some of the cases."""
    cases: dict[tuple[str, int], set[str]] = defaultdict(set)
    for shown in gallery.pictures:
        cases[shown.label, shown.picture.run].add(shown.picture.case)
    everything = set().union(*cases.values())
    return [
        f"{label}{f', run {run}' if run else ''}: {len(found)} of {len(everything)}"
        for (label, run), found in cases.items()
        if found != everything
    ]


def unequal(gallery: Gallery) -> list[str]:
    """Return the cases in which not all methods had the same prompt, seed, steps, guidance, size and engine."""
    found: dict[str, set[tuple[object, ...]]] = defaultdict(set)
    for shown in gallery.pictures:
        one = shown.picture
        found[one.case].add((one.prompt, one.seed, one.steps, one.guidance_scale, one.width, one.height, one.engine))
    return [case for case, settings in found.items() if len(settings) > 1]


def levels(pictures: Sequence[Shown]) -> list[str]:
    """Return the levels among the people of pictures, the most permissive first."""
    return sorted({shown.people for shown in pictures if is_level(shown.people)})


def others(gallery: Gallery) -> str:
    """Return what people are called of whom nobody can tell whether a training saw them."""
    return "levels" if all(is_level(shown.people) for shown in gallery.pictures if not shown.seen) else "others"


def is_level(people: str) -> bool:
    """Return whether a group of people is a level."""
    return _LEVEL.fullmatch(people) is not None


def _made(row: Picture) -> tuple[str, float]:
    return row.method, row.strength


def _labels(rows: Sequence[Picture]) -> dict[tuple[str, float], str]:
    known: dict[str, set[float]] = defaultdict(set)
    for row in rows:
        known[row.method].add(row.strength)
    return {
        _made(row): row.method if len(known[row.method]) == 1 else f"{row.method}, strength {row.strength:g}"
        for row in rows
    }


def _unreadable(path: Path) -> str | None:
    try:
        with PIL.Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        return "it is not there"
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
        return "it is no picture, or damaged"
    return None


def _people(path: Path) -> dict[str, str]:
    """Return what judges are told about people, by their ids."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}). Draw the pictures again, and it is written anew.") from None
    found = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
                found[str(row["user"])] = str(row["text"])
            except (ValueError, LookupError, TypeError):
                raise DataError(
                    f"{path}, line {number}: expected an object with user and text. Draw the pictures again, and it is "
                    "written anew."
                ) from None
    return found
