"""Explain PSA on the shipped miniature: changes of words against the formula, of pictures against two denoisings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_testing import ROUNDING, TINY, conditioning, denoise, difference, noise
from kinds_by_hand import GATED, TEXT, changed_text, kinds_adapter, users
from neighbours import like_attention_couple
from PIL import ImageFont
from schemas import NODES
from torch import Tensor

from comfyui_psa.adapter import AdapterError, PSAAdapter, compile_profile, find_sites
from comfyui_psa.nodes import typefaces
from comfyui_psa.nodes.apply import apply_psa
from comfyui_psa.nodes.explanation import (
    END_OF_PROMPT,
    WHOLE_PROMPT,
    Word,
    changes_in_picture,
    changes_of_words,
    in_words,
)
from comfyui_psa.nodes.patch import patches_of, without
from comfyui_psa.nodes.word_sheet import draw_words
from comfyui_psa.training.lettering import font

PROMPT = "a house in a (meadow:1.2) with a ring"
WIDTH, POOLED = 128, 6
LATENT = noise(2, 16, 12, 12)


@pytest.fixture(scope="module")
def nodes() -> dict[str, Any]:
    return NODES


@pytest.fixture(scope="module")
def loaded(nodes: dict[str, Any]) -> tuple[ModelPatcher, Any, Any]:
    model, clip, vae = nodes["PSALoadMiniature"].execute().args
    return model, clip, vae


@pytest.fixture(scope="module")
def adapter() -> PSAAdapter:
    return kinds_adapter((), WIDTH, text=TEXT)


def encoded(clip: Any, text: str) -> list[list[Any]]:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def by_hand(adapter: PSAAdapter, texts: Tensor, user: int, strength: float) -> list[float]:
    changed = changed_text(adapter, users(user).vectors[0], texts)
    return (strength * (changed - texts).norm(dim=-1) / texts.norm(dim=-1))[0].tolist()


def test_each_word_changes_by_what_the_formula_says(loaded: Any, adapter: PSAAdapter) -> None:
    model, clip, _ = loaded
    (words,) = changes_of_words(clip, PROMPT, patches_of(apply_psa(model, adapter, users(0), 0.5)))
    expected = by_hand(adapter, clip.encode_from_tokens(clip.tokenize(PROMPT)), 0, 0.5)
    assert [word.text for word in words] == ["a", "house", "in", "a", "meadow", "with", "a", "ring", END_OF_PROMPT]
    assert [word.change for word in words[:-1]] == pytest.approx(expected[1:9], rel=1e-4)
    assert words[-1].change == pytest.approx(max(expected[9:]), rel=1e-4)


def test_a_compiled_profile_is_explained_as_its_person(loaded: Any, adapter: PSAAdapter) -> None:
    model, clip, _ = loaded
    compiled = compile_profile(adapter, adapter.effect(users(0).vectors))
    ours, theirs = apply_psa(model, None, compiled, 0.5), apply_psa(model, adapter, users(0), 0.5)
    assert changes_of_words(clip, PROMPT, patches_of(ours)) == changes_of_words(clip, PROMPT, patches_of(theirs))
    pictures = (
        changes_in_picture(patched, patches_of(patched), encoded(clip, PROMPT), LATENT) for patched in (ours, theirs)
    )
    assert torch.equal(*pictures)


def test_long_prompts_and_several_people(loaded: Any, adapter: PSAAdapter) -> None:
    model, clip, _ = loaded
    prompt = " ".join(["house"] * 40)
    people = changes_of_words(clip, prompt, patches_of(apply_psa(model, adapter, users(0, 1))))
    assert [[word.text for word in words] for words in people] == [[*["house"] * 40, END_OF_PROMPT]] * 2
    texts = clip.encode_from_tokens(clip.tokenize(prompt))  # two sections of 32 tokens, with 30 and 10 words
    for number, words in enumerate(people):
        values = by_hand(adapter, texts, number, 1.0)
        assert words[0].change == pytest.approx(values[1], rel=1e-4)
        assert words[39].change == pytest.approx(values[32 + 10], rel=1e-4)


def test_two_in_a_row_are_explained_together(loaded: Any, adapter: PSAAdapter) -> None:
    model, clip, _ = loaded
    both = apply_psa(apply_psa(model, adapter, users(0)), adapter, users(1))
    (words,) = changes_of_words(clip, PROMPT, patches_of(both))
    text = clip.encode_from_tokens(clip.tokenize(PROMPT))
    after = changed_text(adapter, users(1).vectors[0], changed_text(adapter, users(0).vectors[0], text))
    assert words[1].change == pytest.approx(float((after - text)[0, 2].norm() / text[0, 2].norm()), rel=1e-4)


def test_a_summary_of_the_prompt_is_explained_where_the_adapter_changes_it(loaded: Any) -> None:
    model, clip, _ = loaded
    pooled = clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)[1]
    own = kinds_adapter((), WIDTH, text=TEXT.model_copy(update={"pooled_dim": pooled.shape[-1]}))
    people = changes_of_words(clip, PROMPT, patches_of(apply_psa(model, own, users(0, 1), 0.5)))
    for number, words in enumerate(people):
        after = changed_text(own, users(number).vectors[0], pooled, "pooled")
        assert words[-2].text == END_OF_PROMPT
        expected = 0.5 * float((after - pooled).norm() / pooled.norm())
        assert words[-1] == (WHOLE_PROMPT, pytest.approx(expected, rel=1e-4))
    assert WHOLE_PROMPT in in_words(people)


@pytest.mark.parametrize(
    ("text", "pooled", "found"),
    [
        (WIDTH + 1, POOLED, r"text of width 129, .* width 128"),
        (WIDTH, POOLED + 1, r"text of width 7, .* width 6"),
        (WIDTH, None, r"no pooled text, .* width 6"),
    ],
)
def test_the_text_encoder_of_another_family_is_an_error_in_words(
    loaded: Any, text: int, pooled: int | None, found: str
) -> None:
    model, clip, _ = loaded
    given = torch.ones(1, 32, text), None if pooled is None else torch.ones(1, pooled)
    other = SimpleNamespace(tokenize=clip.tokenize, encode_from_tokens=lambda *_, **__: given)
    adapter = kinds_adapter((), WIDTH, text=TEXT.model_copy(update={"pooled_dim": POOLED}))
    with pytest.raises(AdapterError, match=rf"gives {found}\. Connect the one of the adapter's family"):
        changes_of_words(other, PROMPT, patches_of(apply_psa(model, adapter, users(0))))


def test_the_node_draws_a_sheet_for_each_person_and_says_it_in_words(
    loaded: Any, nodes: dict[str, Any], adapter: PSAAdapter
) -> None:
    model, clip, _ = loaded
    sheets, summary = nodes["PSAExplain"].execute(apply_psa(model, adapter, users(0, 1)), clip, PROMPT).args
    assert sheets.shape[0] == 2
    assert sheets.shape[3] == 3
    assert 0 <= float(sheets.min()) < float(sheets.max()) == 1
    assert not torch.equal(*sheets)
    lines = summary.splitlines()
    assert len(lines) == 2
    numbers = [int(part.rsplit(" ", 1)[1].rstrip("%")) for part in lines[0].split(", ")]
    assert numbers == sorted(numbers, reverse=True)
    assert "ring" in lines[0]


def test_words_have_their_own_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's font draws the same box for all that it has not."""
    fonts = (ImageFont.load_default(16), font(16))
    monkeypatch.setattr(typefaces, "_fonts", lambda: fonts)
    first, second = (draw_words([[Word(text, 0.5)]]) for text in ("größe", "größé"))
    assert not torch.equal(first, second)


def test_an_adapter_of_another_kind_changes_no_word(loaded: Any, nodes: dict[str, Any]) -> None:
    model, clip, _ = loaded
    sizes = tuple(site.hidden_size for site in find_sites(model.model.diffusion_model))
    patched = apply_psa(model, kinds_adapter(sizes, WIDTH, gated=GATED), users(0))
    _, summary = nodes["PSAExplain"].execute(patched, clip, PROMPT).args
    assert summary == "No word is changed."
    assert in_words([]) == ""


@pytest.mark.parametrize("kind", ["text", "gated"])
def test_the_picture_differs_where_the_model_sees_another_one(loaded: Any, adapter: PSAAdapter, kind: str) -> None:
    model, clip, _ = loaded
    sizes = tuple(site.hidden_size for site in find_sites(model.model.diffusion_model))
    chosen = adapter if kind == "text" else kinds_adapter(sizes, WIDTH, gated=GATED)
    patched, positive = apply_psa(model, chosen, users(0)), encoded(clip, PROMPT)
    found = changes_in_picture(patched, patches_of(patched), positive, LATENT)
    assert found.shape == (2, 12, 12)
    assert float(found.max()) == 1

    grain = torch.randn(LATENT.shape, generator=torch.Generator().manual_seed(0))
    sampling, expected = model.get_model_object("model_sampling"), torch.zeros(2, 12, 12)
    for level in (0.2, 0.5, 0.8):
        sigma = float(sampling.percent_to_sigma(level))
        noisy = model.model.process_latent_in(LATENT) + sigma * grain
        seen = [denoise(m, positive, positive, noisy, sigmas=(sigma,)) for m in (patched, model)]
        expected += model.model.process_latent_out(seen[0] - seen[1]).abs().mean(dim=1)
    assert difference(found, expected / expected.max()) < 20 * ROUNDING


def test_the_overlay_glows_where_something_differs(loaded: Any, nodes: dict[str, Any], adapter: PSAAdapter) -> None:
    model, clip, vae = loaded
    image, latent, positive = vae.decode(LATENT), {"samples": LATENT}, encoded(clip, PROMPT)
    explain: Any = nodes["PSAExplainPicture"]
    patched = apply_psa(model, adapter, users(0))
    (shown,) = explain.execute(patched, positive, latent, image).args
    assert shown.shape == image.shape
    assert not torch.allclose(shown, image)

    silent = kinds_adapter((), WIDTH, text=TEXT)
    for weight in silent.zero_at_start():
        weight.zero_()
    (dim,) = explain.execute(apply_psa(model, silent, users(0)), positive, latent, image).args
    assert torch.allclose(dim, image.mean(dim=-1, keepdim=True).expand_as(image) * 0.6)

    with pytest.raises(AdapterError, match="2 latents and 1 images"):
        explain.execute(patched, positive, latent, image[:1])


def test_a_model_without_psa_has_nothing_to_explain(loaded: Any, nodes: dict[str, Any], adapter: PSAAdapter) -> None:
    model, clip, _ = loaded
    for patched in (model, apply_psa(model, adapter, users(0), strength=0.0)):
        with pytest.raises(AdapterError, match="Connect the output of Apply PSA"):
            nodes["PSAExplain"].execute(patched, clip, PROMPT)


def test_only_psa_is_taken_away_and_the_patched_model_stays(model: ModelPatcher) -> None:
    """Beside another node's patches, on a copy."""
    positive, negative = conditioning(TINY, 1), conditioning(TINY, 2)
    neighbour = like_attention_couple(model)
    sizes = tuple(site.hidden_size for site in find_sites(model.model.diffusion_model))
    all_kinds = kinds_adapter(sizes, TINY.context_dim, constant=True, gated=GATED, text=TEXT)
    patched = apply_psa(neighbour, all_kinds, users(0))
    latent = noise(2, 4, 16, 16)
    before = denoise(patched, positive, negative, latent, 4.0)
    base = without(patched, patches_of(patched))
    assert patches_of(base) == []
    expected = denoise(neighbour, positive, negative, latent, 4.0)
    assert torch.equal(denoise(base, positive, negative, latent, 4.0), expected)
    assert torch.equal(denoise(patched, positive, negative, latent, 4.0), before)
