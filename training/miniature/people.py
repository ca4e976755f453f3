"""Who trains and who is only looked at: simulated people, with rules or with category sets drawn at random.

Some category sets and some combinations of attributes are held out: no training person has one, and "unseen"
people differ from the training people in both.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...profiles import (
    CATEGORIES,
    Category,
    Profile,
    banned_categories,
    simulate_users,
)
from ...profiles.policy import RULES
from ...profiles.schema import MENTAL_CONDITIONS, PHYSICAL_CONDITIONS, RELIGIONS

CategorySet = frozenset[Category]
Combination = tuple[str | None, str | None, str | None]
Group = Literal["nothing", "some", "everything"]

GROUPS: tuple[Group, ...] = ("nothing", "some", "everything")
_HELD_OUT_SETS = 30
_HELD_OUT_COMBINATIONS = 28
# The rules leave few people without any ban.
_RULES_SHARE, _NOTHING_SHARE = 0.35, 0.15


@dataclass(frozen=True)
class HeldOut:
    """What no training person has: sets of banned categories, and attributes together."""

    sets: frozenset[CategorySet]
    combinations: frozenset[Combination]


def held_out(seed: int) -> HeldOut:
    """Choose what is held out: 30 of the 120 sets that rules never make, 28 of the 112 combinations."""
    rng = np.random.default_rng((seed, 11))
    sets = [s for s in all_sets() if s not in _rule_sets()]
    combinations = list(itertools.product(RELIGIONS, PHYSICAL_CONDITIONS, MENTAL_CONDITIONS))
    return HeldOut(
        frozenset(sets[i] for i in rng.permutation(len(sets))[:_HELD_OUT_SETS]),
        frozenset(combinations[i] for i in rng.permutation(len(combinations))[:_HELD_OUT_COMBINATIONS]),
    )


def all_sets() -> list[CategorySet]:
    """Return all 128 sets of categories."""
    sizes = range(len(CATEGORIES) + 1)
    return [frozenset(s) for size in sizes for s in itertools.combinations(CATEGORIES, size)]


def banned(profile: Profile) -> CategorySet:
    """Return what a person bans."""
    return frozenset(banned_categories(profile))


def group(profile: Profile) -> Group:
    """Return whether a person bans nothing, some categories, or everything."""
    count = len(banned(profile))
    return "nothing" if count == 0 else "everything" if count == len(CATEGORIES) else "some"


def training_people(count: int, seed: int) -> list[Profile]:
    """Return people to train on: some as the rules make them, the others with sets drawn from those not held out."""
    rng = np.random.default_rng((seed, 12))
    out = held_out(seed)
    sets = [s for s in all_sets() if s not in out.sets]
    people = []
    for person in _stream(seed):
        if _combination(person) in out.combinations:
            continue
        kind = rng.random()
        if kind < _NOTHING_SHARE:
            person = with_set(person, frozenset())
        elif kind >= _NOTHING_SHARE + _RULES_SHARE:
            person = with_set(person, sets[int(rng.integers(len(sets)))])
        people.append(person)
        if len(people) == count:
            break
    return people


def unseen_people(count: int, seed: int, kind: Group) -> list[Profile]:
    """Return people of a group with held-out attributes; whoever bans something bans a held-out set."""
    rng = np.random.default_rng((seed, 13))
    out = held_out(seed)
    sets = {
        "nothing": [frozenset[Category]()],
        "some": sorted(out.sets, key=sorted),
        "everything": [frozenset(CATEGORIES)],
    }[kind]
    # Another seed: the people themselves are new, too.
    strangers = (person for person in _stream(seed + 1) if _combination(person) in out.combinations)
    return [with_set(person, sets[int(rng.integers(len(sets)))]) for person in itertools.islice(strangers, count)]


def with_set(person: Profile, chosen: CategorySet) -> Profile:
    """Return the person with exactly these categories banned."""
    overrides = {category: "ban" if category in chosen else "allow" for category in CATEGORIES}
    return person.model_copy(update={"overrides": overrides})


def _stream(seed: int) -> Iterator[Profile]:
    size, seen = 1000, 0
    while True:
        yield from _crowd(size, seed)[seen:]
        size, seen = 2 * size, size


@functools.lru_cache(maxsize=8)  # every group of people begins the stream anew
def _crowd(count: int, seed: int) -> tuple[Profile, ...]:
    return tuple(simulate_users(count, seed))


def _combination(person: Profile) -> Combination:
    return person.religion, person.physical_condition, person.mental_condition


def _rule_sets() -> set[CategorySet]:
    """Return what the rules can make of people without overrides: any of their parts together."""
    parts = {rule.categories for rule in RULES}
    some = itertools.chain.from_iterable(itertools.combinations(parts, size) for size in range(len(parts) + 1))
    return {frozenset(itertools.chain.from_iterable(chosen)) for chosen in some}
