"""What is asked of every method: the same prompts, people and noise, in equally large cells."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...profiles import CATEGORIES, Category, Profile
from .architecture import LATENT_CHANNELS, LATENT_SIZE
from .captions import MENTIONS, Mention, caption
from .people import GROUPS, Group, banned, group, training_people, unseen_people
from .world import GLYPHS, draw_scene

_TRIAL = 1_000_000
_STRANGERS = 200


@dataclass(frozen=True)
class Case:
    """One prompt for one person. ``category`` and ``mention`` are None for a harmless prompt."""

    number: int
    group: Group
    unseen: bool
    person: Profile
    caption: str
    object: str
    category: Category | None
    mention: Mention | None

    @property
    def banned(self) -> bool:
        """Whether the person bans what the prompt asks for."""
        return self.category in banned(self.person)

    @property
    def cell(self) -> str:
        """What is reported together, besides the group: "banned, named", "allowed, implied", "harmless"."""
        if self.category is None:
            return "harmless"
        return f"{'banned' if self.banned else 'allowed'}, {self.mention}"

    @property
    def phrase(self) -> int | None:
        """Which of its category's phrases implies what the prompt asks for, from 0; None if none does."""
        if self.category is None or self.mention != "implied":
            return None
        return next(number for number, phrase in enumerate(GLYPHS[self.category].implied) if phrase in self.caption)


def draw_cases(per_cell: int, training: int, seed: int, trial: int = 0) -> list[Case]:
    """Draw the cases of all cells.

    People who ban nothing are only asked for allowed things, people who ban everything only for banned ones, the
    others for both; all are asked for harmless ones.

    Args:
        per_cell: how many cases each cell has.
        training: the number of people who were trained on; the seen ones come from them.
        seed: of the training data.
        trial: another one gives other prompts, noises and unseen people, with the same sets held out. What is reported
            is trial 0 unless it says so; settings are tried on others, and with seen people alone.
    """
    numbers = itertools.count(trial * _TRIAL)
    return [
        _case(next(numbers), kind, unseen, person, category, mention, seed)
        for kind, unseen in itertools.product(GROUPS, (False, True))
        for category, mention, person in _asked(
            _people(kind, unseen, training, seed, trial), per_cell, (seed, 31, GROUPS.index(kind), unseen, trial), kind
        )
    ]


@dataclass(frozen=True)
class Asked:
    """A prompt that belongs to nobody. ``category`` and ``mention`` are None for a harmless one."""

    number: int
    caption: str
    object: str
    category: Category | None
    mention: Mention | None


def draw_prompts(count: int, seed: int) -> list[Asked]:
    """Draw prompts; each category named, each implied, and two harmless ones take turns, so 16 have all of them."""
    kinds: list[tuple[Category | None, Mention | None]] = list(itertools.product(CATEGORIES, MENTIONS))
    turns = itertools.islice(itertools.cycle([*kinds, (None, None), (None, None)]), count)
    return [_prompt(number, category, mention, seed) for number, (category, mention) in enumerate(turns)]


def noise_seed(case: Case) -> int:
    """Return the seed of a case's initial noise."""
    return 10_000 + case.number


def noise(cases: Sequence[Case]) -> Tensor:
    """Return the initial noise of cases, ``[cases, channels, 12, 12]``; it depends on their numbers alone."""
    shape = (LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(noise_seed(c))) for c in cases])


def _people(kind: Group, unseen: bool, training: int, seed: int, trial: int) -> list[Profile]:
    if unseen:
        return unseen_people((trial + 1) * _STRANGERS, seed, kind)[-_STRANGERS:]
    # Not those whom the rules made: unseen people have sets at random, too, so that nothing else differs.
    people = [person for person in training_people(training, seed) if group(person) == kind]
    return [person for person in people if kind != "some" or person.overrides]


def _asked(
    people: Sequence[Profile], per_cell: int, seed: Sequence[int], kind: Group
) -> Iterator[tuple[Category | None, Mention | None, Profile]]:
    rng = np.random.default_rng(seed)

    def somebody() -> Profile:
        return people[int(rng.integers(len(people)))]

    for bans, mention in itertools.product((True, False), MENTIONS):
        if (kind, bans) in (("nothing", True), ("everything", False)):
            continue
        for _ in range(per_cell):
            person = somebody()
            options = [category for category in CATEGORIES if (category in banned(person)) == bans]
            yield options[int(rng.integers(len(options)))], mention, person
    for _ in range(per_cell):
        yield None, None, somebody()


def _case(
    number: int,
    kind: Group,
    unseen: bool,
    person: Profile,
    category: Category | None,
    mention: Mention | None,
    seed: int,
) -> Case:
    text, shown = _caption((seed, 32, number), category, mention)
    return Case(number, kind, unseen, person, text, shown, category, mention)


def _prompt(number: int, category: Category | None, mention: Mention | None, seed: int) -> Asked:
    return Asked(number, *_caption((seed, 33, number), category, mention), category, mention)


def _caption(seed: Sequence[int], category: Category | None, mention: Mention | None) -> tuple[str, str]:
    """Return a caption, and the object in it."""
    rng = np.random.default_rng(seed)
    scene = draw_scene(rng, (category,) if category else ())
    return caption(scene, rng, mention or "named"), scene.object or ""
