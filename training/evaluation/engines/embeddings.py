"""Embeddings of people for the adapters of an evaluation, each made once and kept in its folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from ....adapter import EncoderSpec
from ....profiles.embedding import SUFFIXES
from ...data.user_embeddings import check_encoder
from ...data.users import encode_users, encoder_of, load_user_embedding
from ..config import EmbeddingsSection
from ..people import Person

_BATCH = 8
EMBEDDINGS = "embeddings"  # the folder


class Embeddings:
    """What encoders make of people. Those of language models are kept as files, so that one process makes them."""

    def __init__(self, folder: Path, section: EmbeddingsSection, state: PartialState) -> None:
        """Keep them in ``folder``, which is made when it is needed."""
        self._folder = folder
        self._section = section
        self._state = state
        self._known: dict[tuple[EncoderSpec, str], Tensor] = {}

    def prepare(self, spec: EncoderSpec, people: Iterable[Person]) -> None:
        """Make the embeddings of people for an encoder, or read them.

        Raises:
            DataError: there is no such encoder, a file is damaged, or the given embeddings are of another encoder.
            EncoderError: the language model is not there, or cannot be read.
        """
        new = [person for person in people if (spec, person.user) not in self._known]
        if not new:
            return  # another strength or training, for the same people
        if spec.kind == "attributes":
            encoder = encoder_of(spec, self._section.folders, torch.device("cpu"))
            vectors = encoder.encode([person.profile for person in new])
        else:
            self._check_given(spec)
            vectors = torch.stack([self._from_language_model(spec, person) for person in self._encoded(spec, new)])
        self._known.update({(spec, person.user): vector for person, vector in zip(new, vectors, strict=True)})

    def of(self, spec: EncoderSpec, people: Iterable[Person]) -> Tensor:
        """Return embeddings ``[people, dim]`` that were prepared."""
        return torch.stack([self._known[spec, person.user] for person in people])

    def key(self, spec: EncoderSpec, person: Person) -> str:
        """Return a hash of a prepared embedding."""
        return hashlib.sha256(self._known[spec, person.user].numpy().tobytes()).hexdigest()[:16]

    def _check_given(self, spec: EncoderSpec) -> None:
        # An adapter that does not tell its template may be of any encoder of that name.
        if self._section.given is not None and spec.template is not None:
            check_encoder(
                self._section.given,
                spec,
                "that of an adapter here",
                "Set embeddings.given to a folder of that one, or leave it out, so that people are encoded.",
            )

    def _encoded(self, spec: EncoderSpec, people: list[Person]) -> list[Person]:
        """See to it that all of them have a file; the main process encodes those that have none."""
        missing = {_file(person): person.profile for person in people if self._given(person) is None}
        if missing and self._state.is_main_process:
            encoder = encoder_of(spec, self._section.folders, self._state.device)
            encode_users(missing, self._place(spec), encoder, _BATCH, lambda count: None)
        self._state.wait_for_everyone()
        return people

    def _from_language_model(self, spec: EncoderSpec, person: Person) -> Tensor:
        given = self._given(person)
        if given is not None:
            return load_user_embedding(given, person.user)
        return load_user_embedding(self._place(spec), _file(person))

    def _given(self, person: Person) -> Path | None:
        folder = self._section.given
        if folder is not None and any((folder / f"{person.user}{suffix}").is_file() for suffix in SUFFIXES):
            return folder
        return None

    def _place(self, spec: EncoderSpec) -> Path:
        return self._folder / hashlib.sha256(spec.model_dump_json().encode()).hexdigest()[:16]


def _file(person: Person) -> str:
    """Name a file after the profile, so that a person who has changed gets another one."""
    return hashlib.sha256(person.profile.model_dump_json(exclude={"name", "notes"}).encode()).hexdigest()[:16]
