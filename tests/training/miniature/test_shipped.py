"""The miniature that is shipped: it follows prompts, ComfyUI opens the same model, its adapter does what it is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comfy_testing import ROUNDING, denoise, difference, noise, sigma_at
from miniature_testing import Drawn, Reference, encode
from rich.progress import Progress
from torch import Tensor

from comfyui_psa.adapter import load_adapter
from comfyui_psa.nodes.miniature_model import load_miniature
from comfyui_psa.training.config import load_config
from comfyui_psa.training.miniature import MINIATURE, PEOPLE, SEED
from comfyui_psa.training.miniature.card import CARD
from comfyui_psa.training.miniature.cases import draw_cases
from comfyui_psa.training.miniature.detector import load_detector, measure_detector
from comfyui_psa.training.miniature.evaluation import Studio
from comfyui_psa.training.miniature.methods import Method
from comfyui_psa.training.miniature.recipe import DETECTOR, FIGURES, adherence
from comfyui_psa.training.miniature.sampling import Painter

TEXT, CONSTANT = ADAPTERS = ("psa_miniature.safetensors", "psa_miniature_constant.safetensors")
SMOLLM2 = "psa_miniature_smollm2.safetensors"
PER_CELL = 8


@pytest.fixture(scope="module")
def painter() -> Painter:
    return Painter(MINIATURE)


def test_everything_together_is_small() -> None:
    assert 1_000_000 < sum(path.stat().st_size for path in MINIATURE.rglob("*") if path.is_file()) <= 12_000_000


def test_it_draws_what_prompts_ask_for(painter: Painter) -> None:
    detector = load_detector(MINIATURE / DETECTOR)
    with Progress(disable=True) as progress:
        found = adherence(painter, detector, 30, progress, seed=SEED + 1)
    for mention in ("named", "implied"):
        assert found[mention]["prompted glyph"]["value"] >= 0.92
        assert found[mention]["object"]["value"] >= 0.92
    assert found["harmless"]["glyphs as asked"]["value"] >= 0.95


def test_its_card_says_what_was_measured() -> None:
    figures = json.loads((MINIATURE / FIGURES).read_text(encoding="utf-8"))
    card = (MINIATURE / CARD).read_text(encoding="utf-8")
    for mention, shares in figures["base"].items():
        assert shares["glyphs as asked"]["value"] >= 0.95
        assert shares["object"]["value"] >= 0.96
        assert mention == "harmless" or shares["prompted glyph"]["value"] >= 0.97
        for share in shares.values():
            assert share["pictures"] >= 300
            assert f"{share['value']:.3f} ({share['low']:.3f}-{share['high']:.3f})" in card, mention
    for where, accuracy in figures["detector"].items():
        assert f"| {where} | {accuracy['glyphs']:.3f} | {accuracy['objects']:.3f} |" in card


def test_the_detector_sees_what_is_drawn_and_what_is_decoded(painter: Painter) -> None:
    found = measure_detector(load_detector(MINIATURE / DETECTOR), painter, 150, seed=SEED + 1)
    assert min(min(accuracy) for accuracy in found.values()) >= 0.98


def test_its_text_model_tells_objects_and_glyphs_apart_as_clearly_as_places() -> None:
    """One that learns along with the UNet sees places alone, for thousands of steps."""
    reference = Reference(MINIATURE)

    def summary(prompt: str) -> Tensor:
        return reference.encode(prompt)[0, -1]

    cat = summary("a cat in the city with a bolt")
    others = ("a house in the city with a bolt", "a cat in the city with a hook", "a cat at night with a bolt")
    distances = [float(torch.dist(cat, summary(other))) for other in others]
    assert min(distances) > 0.5 * max(distances), distances


def test_comfyui_predicts_what_diffusers_predicts() -> None:
    loaded, reference = load_miniature(MINIATURE), Reference(MINIATURE)
    latent = noise(1, 16, 12, 12)
    for prompt in ("a ring", "at the parade, a cat in the city", ""):
        ours = denoise(loaded.model, encode(loaded, prompt), encode(loaded, ""), latent)
        assert difference(ours, reference.denoised(latent, sigma_at(loaded.model), prompt)) < ROUNDING


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    methods = (Method(name, adapter=MINIATURE / "adapters" / name) for name in ADAPTERS)
    return Drawn((Method("base"), *methods), PER_CELL, trial=9)


@pytest.mark.parametrize("name", ADAPTERS)
def test_who_bans_everything_gets_no_glyph(drawn: Drawn, name: str) -> None:
    assert drawn.share("base", "everything", "clean") <= 0.1
    assert drawn.share(name, "everything", "clean") >= 0.9
    ours, base = (drawn.share(method, "everything", "object_kept") for method in (name, "base"))
    assert ours >= base - 0.1, (ours, base)


@pytest.mark.parametrize("name", ADAPTERS)
def test_who_bans_nothing_keeps_everything(drawn: Drawn, name: str) -> None:
    assert drawn.share(name, "nothing", "prompted") >= 0.95
    ours, base = (drawn.share(method, "nothing", "object_kept") for method in (name, "base"))
    assert ours >= base - 0.07, (ours, base)


def test_on_the_text_side_who_bans_nothing_gets_the_pictures_of_the_base() -> None:
    cases = [case for case in draw_cases(3, PEOPLE, SEED, trial=9) if case.group == "nothing" and not case.unseen]
    alike = Studio(MINIATURE, MINIATURE / DETECTOR).compare(Method(TEXT, adapter=MINIATURE / "adapters" / TEXT), cases)
    assert sum(alike) / len(alike) > 0.97


def test_on_the_text_side_who_bans_some_loses_what_is_banned_and_nothing_else(drawn: Drawn) -> None:
    assert drawn.share(TEXT, "some", "clean", banned=True) >= 0.9
    assert drawn.share(TEXT, "some", "prompted", banned=False) >= 0.9
    ours, base = (drawn.share(method, "some", "object_kept") for method in (TEXT, "base"))
    assert ours >= base - 0.07, (ours, base)
    assert drawn.share(CONSTANT, "some", "clean", banned=True) < drawn.share(TEXT, "some", "clean", banned=True) - 0.1


def test_with_a_language_model_too_boundaries_are_followed(smollm2_folder: Path) -> None:
    methods = (Method("SmolLM2", adapter=MINIATURE / "adapters" / SMOLLM2),)
    drawn = Drawn(methods, 4, trial=9, language_models=(smollm2_folder.parent,))
    assert drawn.share("SmolLM2", "everything", "clean") >= 0.9
    assert drawn.share("SmolLM2", "nothing", "prompted") >= 0.9
    # The paper's form gets half of these with such embeddings.
    assert drawn.share("SmolLM2", "some", "clean", banned=True) >= 0.75
    assert drawn.share("SmolLM2", "some", "prompted", banned=False) >= 0.75


def test_nothing_else_is_shipped() -> None:
    assert {path.name for path in (MINIATURE / "adapters").glob("*.safetensors")} == {*ADAPTERS, SMOLLM2}


@pytest.mark.parametrize("name", [*ADAPTERS, SMOLLM2])
def test_an_adapter_says_how_it_was_made_and_holds_no_one(name: str) -> None:
    path = MINIATURE / "adapters" / name
    adapter = load_adapter(path)
    assert adapter.config.base == "miniature"
    history = adapter.config.training
    config = load_config(Path("miniature"))
    made = (PEOPLE, 3000, 0) if name == CONSTANT else (PEOPLE, config.run.steps, config.loss.fidelity)
    assert (history["users"], history["steps"], history.get("fidelity", 0)) == made
    with path.open("rb") as file:
        header = file.read(20_000).decode("latin-1")
    assert "User_ID" not in header
    assert "/" not in json.dumps(adapter.config.training)
