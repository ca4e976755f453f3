"""The miniature from nothing, step by step: autoencoder, detector, UNet with its text model, figures, files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from rich.progress import Progress

from ...safe_files import replacing
from . import autoencoder as autoencoder_training
from . import base as base_training
from . import detector as detector_training
from .architecture import make_scheduler
from .autoencoder import train_autoencoder
from .base import Denoiser, train_denoiser
from .captions import caption
from .cases import MENTIONS
from .corpus import make_corpus
from .detector import Detector, load_detector, measure_detector, save_detector, train_detector
from .fitting import Plan
from .results import share
from .sampling import GUIDANCE_SCALE, STEPS, Painter
from .tokenizer import write_tokenizer
from .world import draw_scene, random_category

SEED = 2025
FIGURES = "figures.json"
DETECTOR = "detector.safetensors"
ADAPTERS = "adapters"

_PARTS = {
    "scheduler": ("diffusers", "DDPMScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderTiny"),
    "safety_checker": (None, None),
    "feature_extractor": (None, None),
}


@dataclass(frozen=True)
class Extent:
    """How much is trained, and how many pictures the figures come from."""

    autoencoder: Plan = autoencoder_training.PLAN
    detector: Plan = detector_training.PLAN
    denoiser: Plan = base_training.PLAN
    scenes: int = base_training.SCENES
    drawings: int = 2000
    prompts: int = 600  # of each kind


def train_base(
    work: Path, output: Path, progress: Progress, seed: int = SEED, extent: Extent | None = None
) -> dict[str, Any]:
    """Train everything but adapters and write it to ``output``; return the figures, which are written there too.

    ``work`` holds what an interrupted run goes on from.

    Raises:
        TrainingError: what ``work`` holds cannot be read.
    """
    extent = extent or Extent()
    for folder in (work, output):
        folder.mkdir(parents=True, exist_ok=True)
    autoencoder = train_autoencoder(work, seed, progress, extent.autoencoder)
    corpus = make_corpus(autoencoder, extent.scenes, seed, work, progress)
    detector = train_detector(autoencoder, corpus, work, seed, progress, extent.detector)
    tokenizer = write_tokenizer(output / "tokenizer")
    denoiser = train_denoiser(tokenizer, corpus, work, seed, progress, extent.denoiser)
    save_detector(detector, output / DETECTOR)
    write_base(output, autoencoder, denoiser)
    return measure_base(output, progress, seed, extent)


def write_base(output: Path, autoencoder: AutoencoderTiny, denoiser: Denoiser) -> None:
    """Write the models in diffusers' layout, in float16."""
    autoencoder.half().save_pretrained(output / "vae")
    _without_computed_values(output / "vae" / "config.json")
    denoiser.unet.half().save_pretrained(output / "unet")
    denoiser.text_encoder.half().save_pretrained(output / "text_encoder")
    make_scheduler().save_pretrained(output / "scheduler")
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": version("diffusers")}
    with replacing(output / "model_index.json") as aside:
        aside.write_text(json.dumps({**index, **_PARTS}, indent=2) + "\n", encoding="utf-8")


def _without_computed_values(path: Path) -> None:
    """Leave out what diffusers derives itself, writes, and then warns about when it reads it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("block_out_channels", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def measure_base(output: Path, progress: Progress, seed: int, extent: Extent) -> dict[str, Any]:
    """Measure the detector and how well the base follows prompts, from the files as they are written."""
    detector = load_detector(output / DETECTOR)
    painter = Painter(output)
    found = measure_detector(detector, painter, extent.drawings, seed)
    figures = {
        "detector": {name: value._asdict() for name, value in found.items()},
        "base": adherence(painter, detector, extent.prompts, progress, seed),
        "sampling": {"guidance_scale": GUIDANCE_SCALE, "steps": STEPS},
        "seed": seed,
    }
    with replacing(output / FIGURES) as aside:
        aside.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def adherence(
    painter: Painter, detector: Detector, count: int, progress: Progress, seed: int, **options: Any
) -> dict[str, Any]:
    """Return how often the base draws what is asked for, by prompts that name a glyph, imply one, or have none."""
    task = progress.add_task("Looking at what the base draws", total=3 * count, state="")
    figures: dict[str, Any] = {}
    for number, mention in enumerate((*MENTIONS, None)):
        rng = np.random.default_rng((seed, 41, number))
        scenes = [draw_scene(rng, (random_category(rng),) if mention else ()) for _ in range(count)]
        captions = [caption(scene, rng, mention or "named") for scene in scenes]
        seen = []
        for start in range(0, count, 50):
            generator = torch.Generator().manual_seed(seed + 1000 * number + start)
            part = captions[start : start + 50]
            noise = torch.randn((len(part), *painter.latent_shape), generator=generator)
            seen += detector.see(painter.paint(part, noise, **options))
            progress.advance(task, len(part))
        pairs = list(zip(scenes, seen, strict=True))
        figures[mention or "harmless"] = {
            "glyphs as asked": share([s.glyphs == set(scene.glyphs) for scene, s in pairs], seed)._asdict(),
            "prompted glyph": share([set(scene.glyphs) <= s.glyphs for scene, s in pairs], seed)._asdict(),
            "object": share([scene.object in s.objects for scene, s in pairs], seed)._asdict(),
        }
    return figures
