"""Safe Latent Diffusion against diffusers' own pipeline, step by step and as whole pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipelineSafe
from evaluations import PROMPTS, draw, drawn, evaluation, pictures
from torch import Tensor

from comfyui_psa.training.base import open_base
from comfyui_psa.training.evaluation.engines.models import noise
from comfyui_psa.training.evaluation.safe_latent import CONCEPT, DEGREES, SafeLatentGuidance

PAPER_STEPS, STEPS = 50, 20
# diffusers moves this pipeline around.
SafetyConfig = sys.modules[StableDiffusionPipelineSafe.__module__.rpartition(".")[0]].SafetyConfig


@pytest.fixture(scope="module")
def safe(small: Path) -> StableDiffusionPipelineSafe:
    """Its scheduler is the one that we draw with."""
    pipeline = StableDiffusionPipelineSafe.from_pretrained(small, local_files_only=True, safety_checker=None)
    pipeline.scheduler = open_base(small).sampler()
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_degrees_are_the_papers(safe: StableDiffusionPipelineSafe) -> None:
    assert safe.safety_concept == CONCEPT
    for name, theirs in (("weak", "WEAK"), ("medium", "MEDIUM"), ("strong", "STRONG"), ("max", "MAX")):
        ours = DEGREES[name]
        assert getattr(SafetyConfig, theirs) == {
            "sld_warmup_steps": ours.warmup_steps,
            "sld_guidance_scale": ours.guidance_scale,
            "sld_threshold": ours.threshold,
            "sld_momentum_scale": ours.momentum_scale,
            "sld_mom_beta": ours.momentum_beta,
        }


@pytest.mark.parametrize("name", DEGREES)
def test_every_step_is_that_of_the_paper(name: str) -> None:
    """Number by number, as the paper's equations read."""
    degree = DEGREES[name]
    rule = SafeLatentGuidance(degree, PAPER_STEPS)
    generator = torch.Generator().manual_seed(3)
    momentum = [0.0] * 24
    acted = 0
    for step in range(20):
        without, asked, concept = (0.05 * torch.randn((2, 3, 2, 2), generator=generator) for _ in range(3))
        found = rule(step, without, asked, concept).flatten().tolist()
        for i, (plain, prompted, unsafe) in enumerate(_numbers(without, asked, concept)):
            scale = min(1.0, degree.guidance_scale * abs(prompted - unsafe))
            scale = scale if prompted - unsafe < degree.threshold else 0.0
            gamma = scale * (unsafe - plain) + degree.momentum_scale * momentum[i]
            momentum[i] = degree.momentum_beta * momentum[i] + (1 - degree.momentum_beta) * gamma
            assert found[i] == pytest.approx(gamma if step >= degree.warmup_steps else 0.0, abs=1e-6)
            acted += found[i] != 0
    assert acted > 24


def _numbers(*tensors: Tensor) -> list[tuple[float, ...]]:
    return list(zip(*(tensor.flatten().tolist() for tensor in tensors), strict=True))


def test_the_warm_up_is_as_large_a_share_of_a_shorter_run() -> None:
    rule = SafeLatentGuidance(DEGREES["weak"], steps=10)  # 15 of 50 are 3 of 10
    values = torch.tensor([[[[0.0]]]]), torch.tensor([[[[1.0]]]]), torch.tensor([[[[2.0]]]])
    assert [bool(rule(step, *values).any()) for step in range(5)] == [False, False, False, True, True]


def test_pictures_are_those_of_diffusers_own_pipeline(
    small: Path, safe: StableDiffusionPipelineSafe, tmp_path: Path
) -> None:
    methods: list[dict[str, Any]] = [
        {"name": "base", "kind": "base"},
        {"name": "SLD", "kind": "sld", "degrees": ("medium", "max")},
    ]
    changes = {"sampling": {"steps": STEPS}, "users": {"levels": ("L5",)}, "prompts": {"limit": 1}}
    draw(evaluation(small, tmp_path / "run", methods, **changes))
    found = {key[0]: value for key, value in drawn(tmp_path / "run").items()}
    (seed,) = {row.seed for row in pictures(tmp_path / "run").values()}
    theirs = {}
    for title, options in (
        ("base", {"sld_guidance_scale": 0}),
        ("SLD medium", SafetyConfig.MEDIUM | {"sld_warmup_steps": 10 * STEPS // PAPER_STEPS}),
        ("SLD max", SafetyConfig.MAX),
    ):
        image = safe(
            PROMPTS[0],
            negative_prompt="",
            num_inference_steps=STEPS,
            guidance_scale=4.0,
            latents=noise(seed, 4, 8, 8),
            **options,
        ).images[0]
        theirs[title] = np.asarray(image).astype(int)
    assert found.keys() == theirs.keys()
    for title, picture in theirs.items():
        assert np.abs(found[title] - picture).max() <= 1, title
    assert np.abs(theirs["SLD medium"] - theirs["base"]).mean() > 1
    assert np.abs(theirs["SLD max"] - theirs["SLD medium"]).mean() > 1


def test_an_own_concept_is_what_it_leads_away_from(small: Path, tmp_path: Path) -> None:
    methods = [
        {"name": "paper", "kind": "sld", "degrees": ("max",)},
        {"name": "own", "kind": "sld", "degrees": ("max",), "concept": "boats"},
        {"name": "the same", "kind": "sld", "degrees": ("max",), "concept": CONCEPT},
    ]
    draw(evaluation(small, tmp_path / "run", methods))
    found = drawn(tmp_path / "run")
    for (method, run, strength, case), picture in found.items():
        if method == "paper max":
            assert not np.array_equal(picture, found["own max", run, strength, case])
            assert np.array_equal(picture, found["the same max", run, strength, case])
