"""What users make of prompts, apart from any runtime; its formula is held to in tests/nodes/test_text_kind.py."""

from __future__ import annotations

import pytest
import torch
from kinds_by_hand import EMBEDDING_DIM, MLP, TEXT, changed_text, kinds_adapter
from torch import Tensor

from comfyui_psa.adapter import AdapterError, TextSpec, UserText

WIDTH, POOLED = 14, 6


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def effect_of(embedding: Tensor, spec: TextSpec = TEXT, pooled: bool = True) -> UserText:
    spec = spec.model_copy(update={"pooled_dim": POOLED if pooled else None})
    text = kinds_adapter((), WIDTH, text=spec).effect(embedding).text
    assert text is not None
    return text


def users(number: int, spec: TextSpec = TEXT, pooled: bool = True) -> UserText:
    return effect_of(drawn(number, EMBEDDING_DIM), spec, pooled)


@pytest.mark.parametrize("spec", [TEXT, MLP], ids=["attention", "mlp"])
def test_tokens_and_pooled_text_follow_the_formula(spec: TextSpec) -> None:
    adapter = kinds_adapter((), WIDTH, text=spec.model_copy(update={"pooled_dim": POOLED}))
    text, pooled, vector = drawn(1, 5, WIDTH), drawn(1, POOLED, seed=1), drawn(1, EMBEDDING_DIM, seed=2)
    ours = adapter.effect(vector).text
    assert ours is not None
    assert torch.allclose(ours.tokens(text), changed_text(adapter, vector[0], text), atol=1e-6)
    assert torch.allclose(ours.pooled(pooled), changed_text(adapter, vector[0], pooled, "pooled"), atol=1e-6)


@pytest.mark.parametrize(("prompts", "people"), [(1, 3), (3, 1), (3, 3)])
def test_one_prompt_or_one_user_serves_all(prompts: int, people: int) -> None:
    text, ours = drawn(prompts, 5, WIDTH), users(people)
    together = ours.tokens(text)
    for i, row in enumerate(together):
        alone = effect_of(drawn(people, EMBEDDING_DIM)[min(i, people - 1)][None])
        assert torch.allclose(row, alone.tokens(text[min(i, prompts - 1)][None])[0], atol=1e-6)
    assert ours.pooled(drawn(prompts, POOLED)).shape == (3, POOLED)


def test_other_numbers_of_prompts_and_users_are_refused() -> None:
    with pytest.raises(AdapterError, match="3 user embeddings for 2 prompts"):
        users(3).tokens(drawn(2, 5, WIDTH))


@pytest.mark.parametrize("spec", [TEXT, MLP], ids=["attention", "mlp"])
@pytest.mark.parametrize("pooled", [True, False])
def test_another_device_gets_all_of_it(spec: TextSpec, pooled: bool) -> None:
    elsewhere = torch.device("meta")
    ours = users(2, spec, pooled)
    assert ours.to(ours.device) is ours
    there = ours.to(elsewhere)
    assert type(there.on_tokens) is type(ours.on_tokens)
    assert (there.device, there.users, there.text_dim, there.pooled_dim) == (
        elsewhere,
        2,
        WIDTH,
        POOLED if pooled else None,
    )
    assert there.tokens(drawn(2, 5, WIDTH).to(elsewhere)).shape == (2, 5, WIDTH)  # an operand elsewhere is an error
    assert there.pooled(drawn(2, POOLED).to(elsewhere)).shape == (2, POOLED)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    text, ours = drawn(1, 5, WIDTH), users(1)
    assert torch.allclose(ours.tokens(text)[:, 2:3], ours.tokens(text[:, 2:3]), atol=1e-6)


def test_strength_zero_and_a_part_that_is_not_there_give_the_text_back() -> None:
    text, pooled = drawn(1, 5, WIDTH), drawn(1, POOLED)
    assert torch.equal(users(1).tokens(text, 0.0), text)
    assert torch.equal(users(1).pooled(pooled, 0.0), pooled)
    assert torch.equal(users(1, pooled=False).pooled(pooled), pooled)


@pytest.mark.parametrize("spec", [TEXT, MLP], ids=["attention", "mlp"])
def test_an_adapter_before_its_training_gives_the_text_back(spec: TextSpec) -> None:
    adapter = kinds_adapter((), WIDTH, text=spec.model_copy(update={"pooled_dim": POOLED}))
    with torch.no_grad():
        for weight in adapter.zero_at_start():
            weight.zero_()
    ours = adapter.effect(drawn(2, EMBEDDING_DIM)).text
    assert ours is not None
    text, pooled = drawn(2, 5, WIDTH), drawn(2, POOLED)
    assert torch.equal(ours.tokens(text), text)
    assert torch.equal(ours.pooled(pooled), pooled)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_text_is_computed_in_float32(dtype: torch.dtype) -> None:
    text, ours = drawn(1, 5, WIDTH).to(dtype), users(1)
    assert torch.equal(ours.tokens(text), ours.tokens(text.float()).to(dtype))


@pytest.mark.parametrize("spec", [TEXT, MLP], ids=["attention", "mlp"])
def test_everything_of_the_text_side_is_trained(spec: TextSpec) -> None:
    adapter = kinds_adapter((), WIDTH, text=spec.model_copy(update={"pooled_dim": POOLED})).requires_grad_(True)
    text = adapter.effect(drawn(2, EMBEDDING_DIM)).text
    assert text is not None
    (text.tokens(drawn(2, 5, WIDTH)).square().sum() + text.pooled(drawn(2, POOLED)).square().sum()).backward()
    without = [name for name, weight in adapter.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == []
