"""Whom Apply PSA protects: one person or several, one for each image, or mixtures of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from ..adapter import CompiledProfile, NullMode, PSAAdapter, UserEffect, joined, mixed
from ..profiles import Category, SafetyEmbedding


@dataclass(frozen=True, eq=False)
class Mixture:
    """People who count as one, each with a weight."""

    parts: tuple[People, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Group:
    """People who have an image each, one behind the other; at least one."""

    members: tuple[People, ...]


# What travels on a socket PSA_EMBEDDING.
Person: TypeAlias = SafetyEmbedding | CompiledProfile
People: TypeAlias = Person | Mixture | Group


def everyone(people: People) -> Iterator[Person]:
    """Yield every embedding and compiled profile in it."""
    if isinstance(people, (SafetyEmbedding, CompiledProfile)):
        yield people
    else:
        for part in people.parts if isinstance(people, Mixture) else people.members:
            yield from everyone(part)


def count(people: People) -> int:
    """Return how many images they are for: 1 stands for any number."""
    if isinstance(people, SafetyEmbedding):
        return len(people.vectors)
    if isinstance(people, CompiledProfile):
        return 1
    if isinstance(people, Group):
        return sum(count(member) for member in people.members)
    return max(count(part) for part in people.parts)


def categories_of(people: People) -> tuple[Category, ...] | None:
    """Return the banned categories of one person whose profile was encoded here, or None: they are not known."""
    return people.categories if isinstance(people, SafetyEmbedding) else None


def effect(people: People, adapter: PSAAdapter | None, null: NullMode | None = None) -> UserEffect:
    """Return what an adapter does for them, see ``PSAAdapter.effect``. ``adapter`` is None if all of them are compiled.

    They have to belong together (``check_together``).

    Raises:
        AdapterError: an embedding has another width than the adapter expects, a compiled profile has no such null user,
            or a mixture makes no sense.
    """
    if isinstance(people, CompiledProfile):
        return people.with_null(null)
    if isinstance(people, SafetyEmbedding):
        assert adapter is not None
        return adapter.effect(people.vectors, null)
    if isinstance(people, Group):
        return joined([effect(member, adapter, null) for member in people.members])
    return mixed([effect(part, adapter, null) for part in people.parts], people.weights)
