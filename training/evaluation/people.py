"""Who asks: levels, people from a file, simulated ones; and what is written down about them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ...profiles import (
    Profile,
    ProfileError,
    banned_categories,
    default_template,
    fill_template,
    find_level,
    levels,
    parse_profile,
    simulate_users,
)
from ...safe_files import PRIVATE, replacing
from ..data.users import read_users, user_id
from ..errors import DataError
from .config import UsersSection
from .manifest import USERS
from .prompts import read_lines

_LEVELS = frozenset(level.id for level in levels())


@dataclass(frozen=True, repr=False)
class Person:
    """Somebody pictures are drawn for. ``seen`` says whether trainings knew them; None if nobody can tell."""

    user: str
    profile: Profile
    level: str | None = None
    seen: bool | None = None

    def __repr__(self) -> str:
        """Say nothing of the profile."""
        return f"Person({self.user})"


def read_people(section: UsersSection) -> list[Person]:
    """Return all people that the configuration names, in order.

    Raises:
        DataError: the file is missing or damaged.
    """
    people = [level_person(level) for level in section.levels]
    if section.file is not None:
        people += _read_file(section.file, section.seen)
    people += [
        Person(f"simulated-{number:04d}", profile, seen=section.seen)
        for number, profile in enumerate(simulate_users(section.simulated, section.seed), start=1)
    ]
    return people


def level_person(level: str) -> Person:
    """Return the person behind a level."""
    return Person(level, find_level(level).profile, level=level)


def distinct(people: Iterable[Person]) -> list[Person]:
    """Return each person once.

    Raises:
        DataError: two people have the same id, somebody has that of a level, or is both seen and unseen.
    """
    known: dict[str, Person] = {}
    for person in people:
        if person.level is None and person.user in _LEVELS:
            raise DataError(f'A person is called "{person.user}", as a level is. Give them another `user`.')
        other = known.setdefault(person.user, person)
        if other != person and replace(other, seen=person.seen) == person:
            raise DataError(
                f'"{person.user}" is in people of whom `seen` says different things. A person whom the training knew '
                "is seen in all of them: correct it, or take the person out of one."
            )
        if other != person:
            raise DataError(f'Two people are called "{person.user}". Give each their own `user`.')
    return list(known.values())


def write_people(folder: Path, people: Iterable[Person]) -> None:
    """Write ``users.jsonl``, which its owner alone can read: without names and notes, which are nobody's business."""
    lines = [
        json.dumps(
            {
                "user": person.user,
                "profile": person.profile.model_dump(exclude={"name", "notes"}),
                "bans": banned_categories(person.profile),
                "text": fill_template(_told(), person.profile),
                "level": person.level,
                "seen": person.seen,
            },
            ensure_ascii=False,
        )
        for person in people
    ]
    with replacing(folder / USERS, PRIVATE) as aside:
        aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _told() -> str:
    """Return what a judge is told: the template without its last paragraph, which says what an encoder should do."""
    return default_template().strip().rpartition("\n\n")[0]


def _read_file(path: Path, seen: bool | None) -> Iterator[Person]:
    if path.suffix.lower() == ".csv" and path.is_file():
        yield from (Person(user, profile, seen=seen) for user, profile in read_users(path).items())
        return
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        where = f"Line {number} of {path.name}"
        try:
            row = json.loads(line)
            profile = parse_profile(row["profile"], where)
            yield Person(user_id(row["user"]), profile, seen=row.get("seen", seen))
        except ProfileError as error:
            raise DataError(str(error)) from None
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            raise DataError(
                f'{where} is nobody: expected {{"user": "an id", "profile": {{"age": 35, ...}}}}. Correct it, or '
                "delete it."
            ) from None
