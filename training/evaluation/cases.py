"""What every method is asked: a person, a prompt and a seed; the same for all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product

from ..data.categories import HARMLESS
from ..data.pairs import open_pairs
from ..data.users import read_profile
from ..errors import DataError
from ..miniature import PEOPLE, SEED
from ..miniature import cases as miniature
from .config import EvaluationConfig, PairsSection
from .people import Person, distinct, read_people
from .prompts import Asked, caption_of, read_prompts


@dataclass(frozen=True)
class Case:
    """One picture that one person asks for."""

    person: Person
    asked: Asked
    seed: int

    @property
    def key(self) -> str:
        """What stands for the case in the manifest."""
        return f"{self.person.user}|{self.asked.prompt_id}|{self.seed}"


def read_cases(config: EvaluationConfig) -> list[Case]:
    """Return all cases: every prompt for every user, then those that come in pairs.

    Raises:
        DataError: a file is missing or damaged, or names are not unique.
    """
    crossed = [
        Case(person, asked, seed)
        for asked, person in product(read_prompts(config.prompts), read_people(config.users))
        for seed in _seeds(asked, config)
    ]
    paired = [case for section in config.pairs for case in (*_sage(section, config), *_of_the_miniature(section))]
    distinct(case.person for case in (*crossed, *paired))
    cases: dict[str, Case] = {}
    for case in (*crossed, *paired):
        # A split may have a caption and a user in several rows, with other pictures: they ask for the same.
        if cases.setdefault(case.key, case).asked.prompt != case.asked.prompt:
            raise DataError(f'Two prompts have the prompt_id "{case.asked.prompt_id}". Give each its own.')
    return list(cases.values())


def people_of(cases: list[Case]) -> list[Person]:
    """Return the people of cases, each once."""
    return distinct(case.person for case in cases)


def _seeds(asked: Asked, config: EvaluationConfig) -> Iterator[int]:
    """Yield the seeds of a prompt's pictures: its own and those after it, or some that follow from its id.

    People get the same seeds, so that only what is done for them differs; prompts get others, so that pictures of many
    prompts are not all made of the same noise.
    """
    if asked.seed is not None:
        yield from range(asked.seed, asked.seed + config.sampling.pictures)
        return
    for number in range(config.sampling.pictures):
        text = f"{config.sampling.seed}:{asked.prompt_id}:{number}"
        yield int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def _sage(section: PairsSection, config: EvaluationConfig) -> Iterator[Case]:
    if section.sage is None:
        return
    for pair in islice(open_pairs(section.sage), section.limit):
        person = Person(pair.user_id, read_profile(pair.user, pair.where), seen=section.seen)
        asked = caption_of(pair)
        yield from (Case(person, asked, seed) for seed in _seeds(asked, config))


def _of_the_miniature(section: PairsSection) -> Iterator[Case]:
    """Yield the cases that ``psa miniature evaluate`` has, with the same noise."""
    if not section.miniature:
        return  # its people take a second or two
    for case in miniature.draw_cases(section.miniature, PEOPLE, SEED):
        told = hashlib.sha256(case.person.model_dump_json().encode()).hexdigest()[:8]
        person = Person(f"{'unseen' if case.unseen else 'seen'}-{told}", case.person, seen=not case.unseen)
        asked = Asked(
            prompt_id=f"case-{case.number:06d}",
            prompt=case.caption,
            category=case.category or HARMLESS,
            content=case.mention,
            expected=(case.object,),
        )
        yield Case(person, asked, miniature.noise_seed(case))
