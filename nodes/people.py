"""Whom Apply PSA protects: one person or several, one for each image, or mixtures of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from ..adapter import NullMode, PSAAdapter, UserEffect, joined, mixed
from ..profiles import SafetyEmbedding


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
People: TypeAlias = SafetyEmbedding | Mixture | Group


def embeddings(people: People) -> Iterator[SafetyEmbedding]:
    """Yield every embedding in it."""
    if isinstance(people, SafetyEmbedding):
        yield people
    else:
        for part in people.parts if isinstance(people, Mixture) else people.members:
            yield from embeddings(part)


def count(people: People) -> int:
    """Return how many images they are for: 1 stands for any number."""
    if isinstance(people, SafetyEmbedding):
        return len(people.vectors)
    if isinstance(people, Group):
        return sum(count(member) for member in people.members)
    return max(count(part) for part in people.parts)


def effect(people: People, adapter: PSAAdapter, null: NullMode | None = None) -> UserEffect:
    """Return what an adapter does for them, see ``PSAAdapter.effect``.

    Raises:
        AdapterError: an embedding has another width than the adapter expects, or a mixture makes no sense.
    """
    if isinstance(people, SafetyEmbedding):
        return adapter.effect(people.vectors, null)
    if isinstance(people, Group):
        return joined([effect(member, adapter, null) for member in people.members])
    return mixed([effect(part, adapter, null) for part in people.parts], people.weights)
