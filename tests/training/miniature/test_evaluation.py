"""Who is encoded for the pictures of an evaluation, and how often."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from comfyui_psa.adapter import EncoderSpec
from comfyui_psa.profiles import Profile
from comfyui_psa.profiles.encoders import AttributesEncoder
from comfyui_psa.training.miniature import evaluation
from comfyui_psa.training.miniature.evaluation import Embeddings


class Counting(AttributesEncoder):
    """Writes down how many profiles came together."""

    asked: list[int]

    def encode(self, profiles: Sequence[Profile]) -> torch.Tensor:
        self.asked.append(len(profiles))
        return super().encode(profiles)


def test_people_are_encoded_together_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A language model is loaded for every call of its encoder, which takes longer than a picture."""
    encoder = Counting()
    encoder.asked = []
    monkeypatch.setattr(evaluation, "encoder_of", lambda *_: encoder)
    people = [Profile(age=age, religion=faith) for age in (12, 40) for faith in ("Islam", None)]
    embeddings, spec = Embeddings(), EncoderSpec(kind="attributes", name="attributes-1")

    found = embeddings.of(spec, [*people, *people[:2]])
    assert encoder.asked == [4]
    assert torch.equal(found, AttributesEncoder().encode([*people, *people[:2]]))
    again = embeddings.of(spec, [people[3], Profile(age=7), people[0]])
    assert encoder.asked == [4, 1]
    assert torch.equal(again, AttributesEncoder().encode([people[3], Profile(age=7), people[0]]))
