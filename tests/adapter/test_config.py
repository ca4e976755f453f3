"""What an adapter says about itself: the base follows from the dimensions, and nonsense is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from comfyui_psa.adapter import FAMILIES, PAPER_CATEGORIES, AdapterConfig, EncoderSpec, GatedSpec, TextSpec

FIELDS: dict[str, Any] = {
    "hidden_sizes": (8, 16),
    "cross_attention_dim": 12,
    "embedding_dim": 10,
    "encoder": EncoderSpec(kind="attributes", name="1"),
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_base_follows_from_the_dimensions(family: Any) -> None:
    sizes = {"hidden_sizes": family.hidden_sizes, "cross_attention_dim": family.cross_attention_dim}
    config = AdapterConfig(**FIELDS | sizes)
    assert config.base == family.name
    assert config.num_sites == len(family.hidden_sizes)
    assert family.title in config.describe_base()


def test_unknown_base_is_called_other() -> None:
    assert AdapterConfig(**FIELDS).base == "other"


def test_defaults_are_the_papers() -> None:
    config = AdapterConfig(**FIELDS)
    assert (config.kinds, config.num_tokens, config.null) == (("constant",), 1, "zero_embedding")
    assert config.categories == PAPER_CATEGORIES
    assert set(PAPER_CATEGORIES) == {
        "Hate",
        "Harassment",
        "Violence",
        "Self-Harm",
        "Sexuality",
        "Shocking",
        "Propaganda",
    }


def test_more_than_one_token_is_refused_with_the_reason() -> None:
    with pytest.raises(ValidationError, match="4 user tokens; the constant kind has one"):
        AdapterConfig(**FIELDS, num_tokens=4)


@pytest.mark.parametrize(
    "field",
    [
        {"hidden_sizes": ()},
        {"hidden_sizes": (8, 0)},
        {"cross_attention_dim": 0},
        {"embedding_dim": -1},
        {"num_tokens": 0},
        {"null": "empty"},
        {"kind": "text"},
        {"colour": "blue"},
        {"encoder": {"kind": "llm", "name": ""}},
        {"encoder": {"kind": "oracle", "name": "1"}},
    ],
    ids=lambda field: str(field),
)
def test_nonsense_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AdapterConfig(**FIELDS | field)


TEXT = {"constant": False, "null": "none", "hidden_sizes": (), "text": TextSpec()}


def test_the_text_side_needs_no_layers_and_says_what_it_reads() -> None:
    config = AdapterConfig(**FIELDS | TEXT)
    assert config.kinds == ("text",)
    assert config.describe_base() == "models that read text of width 12"


def test_the_mlp_has_one_user_token_and_no_heads() -> None:
    spec = TextSpec(form="mlp", inner_dim=7, heads=4)
    assert spec.num_tokens == 1
    assert TextSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("field", "problem"),
    [
        ({"constant": False, "null": "none"}, "acts in no way"),
        (TEXT | {"gated": GatedSpec()}, "hidden_sizes"),
        (TEXT | {"null": "zero_embedding"}, "only the constant kind has a null user"),
        ({"gated": GatedSpec(heads=3)}, "3 heads do not divide"),
        ({"text": {"form": "mlp", "num_tokens": 2}}, "takes one user token"),
        ({"text": {"inner_dim": 10, "heads": 4}}, "10 is no multiple of heads 4"),
    ],
)
def test_kinds_that_cannot_be_are_refused_with_the_reason(field: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        AdapterConfig(**FIELDS | field)


def test_description_cannot_change_after_the_fact() -> None:
    config = AdapterConfig(**FIELDS)
    with pytest.raises(ValidationError):
        config.null = "none"  # type: ignore[misc]


def test_description_survives_json() -> None:
    config = AdapterConfig(
        **FIELDS | {"encoder": EncoderSpec(kind="llm", name="org/model", template="Alter: {Age}, für {Gender}")},
        null="none",
        categories=("Spiders",),
        training={"steps": 1400, "rates": [2e-3, None], "data": {"name": "sage"}},
    )
    assert AdapterConfig.model_validate_json(config.model_dump_json()) == config
