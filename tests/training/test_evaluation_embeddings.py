"""Embeddings of people for adapters whose encoder is a language model: from a folder, or made once and kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluations import SMOLLM2_DIM, draw, drawn, evaluation, write_adapter, write_jsonl
from torch import Tensor

from comfyui_psa.adapter import EncoderSpec
from comfyui_psa.profiles import Profile, default_template
from comfyui_psa.profiles.encoders import llm_identity
from comfyui_psa.profiles.encoders.attributes import DIM, AttributesEncoder
from comfyui_psa.training.errors import DataError
from comfyui_psa.training.evaluation.engines import embeddings as drawing_embeddings

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


class Encoder(AttributesEncoder):
    """In place of a language model, which has tests of its own: attributes, as wide as SmolLM2's embeddings."""

    def encode(self, profiles: Sequence[Profile]) -> Tensor:
        return torch.nn.functional.pad(super().encode(profiles), (0, SMOLLM2_DIM - DIM))


@pytest.fixture
def encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The people of each call of the encoder, which needs no language model."""
    found: list[list[str]] = []
    original = drawing_embeddings.encode_users

    def watched(users: Any, *arguments: Any) -> None:
        found.append(list(users))
        original(users, *arguments)

    def encoder_of(spec: EncoderSpec, folders: Sequence[Path], _device: torch.device) -> Encoder:
        assert (spec.kind, spec.name, folders) == ("llm", NAME, (tmp_path / "LLM",))
        return Encoder()

    monkeypatch.setattr(drawing_embeddings, "encode_users", watched)
    monkeypatch.setattr(drawing_embeddings, "encoder_of", encoder_of)
    return found


@pytest.fixture
def draw_with(small: Path, tmp_path: Path) -> Callable[..., None]:
    """Draws with an adapter of a language model, whose embeddings may lie in ``given``."""
    adapter = write_adapter(tmp_path / "psa.safetensors", small, encoder=NAME)
    methods = [{"name": "PSA", "kind": "adapter", "paths": (adapter,), "strengths": (0.5, 1.0)}]

    def drawn_with(given: Path | None = None, **users: Any) -> None:
        settings = {"folders": (tmp_path / "LLM",), "given": given}
        draw(evaluation(small, tmp_path / "run", methods, users=users, embeddings=settings))

    return drawn_with


def give(folder: Path, name: str) -> None:
    """Write an embedding of chance."""
    folder.mkdir(exist_ok=True)
    np.save(folder / f"{name}.npy", np.random.default_rng(0).normal(size=SMOLLM2_DIM).astype(np.float32))


def test_a_language_models_embeddings_are_read_from_a_folder_or_made_once(
    tmp_path: Path, encoded: list[list[str]], draw_with: Callable[..., None]
) -> None:
    given = tmp_path / "given"
    give(given, "L5")
    draw_with(given)
    assert [len(users) for users in encoded] == [1]  # L0; L5 has a file
    first = drawn(tmp_path / "run")
    people = {key[3].split("|")[0]: picture for key, picture in first.items()}
    assert not np.array_equal(people["L0"], people["L5"])
    draw_with(levels=("L0",))
    again = drawn(tmp_path / "run")
    assert all(np.array_equal(picture, first[key]) for key, picture in again.items())
    kept = list((tmp_path / "run" / "embeddings").rglob("*.npy"))
    assert len(kept) == 1
    assert kept[0].stat().st_mode & 0o077 == 0


def test_embeddings_of_another_encoder_are_refused(
    tmp_path: Path, encoded: list[list[str]], draw_with: Callable[..., None]
) -> None:
    given = tmp_path / "given"
    give(given, "L0")
    own = llm_identity(NAME, default_template())
    (given / "encoder.json").write_text(json.dumps({"encoder": "llm:Qwen2.5-7B-Instruct:0123456789abcdef"}))
    with pytest.raises(DataError, match=rf"encoder llm:Qwen2\.5-7B-Instruct.* is {own}\. Set embeddings\.given to"):
        draw_with(given)
    assert not (tmp_path / "run").exists()
    (given / "encoder.json").write_text(json.dumps({"encoder": own}))
    draw_with(given)
    assert [len(users) for users in encoded] == [1]


def test_a_file_of_another_person_is_nobody_elses(
    tmp_path: Path, encoded: list[list[str]], draw_with: Callable[..., None]
) -> None:
    people = write_jsonl(tmp_path / "people.jsonl", [{"user": "anna", "profile": {"age": 35}}])
    give(tmp_path / "given", "anna.b")
    draw_with(tmp_path / "given", levels=(), file=people)
    assert [len(users) for users in encoded] == [1]
