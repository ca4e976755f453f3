"""The miniature from nothing, step by step: autoencoder, detector, text model, UNet, figures, files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from rich.progress import Progress
from torch import nn
from transformers import CLIPTextModel

from ...safe_files import DAMAGE, replacing
from ..base.folder import INDEX
from ..errors import TrainingError
from ..evaluation.statistics import share
from . import SEED, reading
from . import autoencoder as autoencoder_training
from . import base as base_training
from . import detector as detector_training
from .architecture import make_scheduler
from .autoencoder import train_autoencoder
from .base import train_unet
from .captions import MENTIONS, caption
from .card import CARD, model_card
from .corpus import make_corpus
from .detector import Detector, Sighting, load_detector, measure_detector, save_detector, train_detector
from .fitting import Plan
from .reading import train_text_model
from .sampling import GUIDANCE_SCALE, STEPS, Painter
from .tokenizer import write_tokenizer
from .world import Scene, draw_scene, random_category

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
    text_model: Plan = reading.PLAN
    unet: Plan = base_training.PLAN
    scenes: int = base_training.SCENES
    drawings: int = 1000
    prompts: int = 400  # of each kind


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
    # As it will be written: everything after it learns from the latents that people will have.
    autoencoder = train_autoencoder(work, seed, progress, extent.autoencoder).half().float()
    corpus = make_corpus(autoencoder, extent.scenes, seed, work, progress)
    detector = train_detector(autoencoder, corpus, work, seed, progress, extent.detector)
    tokenizer = write_tokenizer(output / "tokenizer")
    text_encoder = train_text_model(tokenizer, corpus, work, seed, progress, extent.text_model)
    unet = train_unet(text_encoder, tokenizer, corpus, work, seed, progress, extent.unet)
    for name in (INDEX, FIGURES, CARD):  # until the new ones are there, parts of two models would be taken for one
        (output / name).unlink(missing_ok=True)
    save_detector(detector, output / DETECTOR)
    write_base(output, autoencoder, text_encoder, unet)
    figures = measure_base(output, progress, seed, extent)
    parts = {
        "vae": autoencoder,
        "text_encoder": text_encoder,
        "unet": unet,
        "detector": detector,
    }
    _write_card(output / CARD, figures, parts, extent)
    return figures


def write_base(
    output: Path, autoencoder: AutoencoderTiny, text_encoder: CLIPTextModel, unet: UNet2DConditionModel
) -> None:
    """Write the models in diffusers' layout, in float16."""
    autoencoder.half().save_pretrained(output / "vae")
    _without_computed_values(output / "vae" / "config.json")
    unet.half().save_pretrained(output / "unet")
    text_encoder.half().save_pretrained(output / "text_encoder")
    make_scheduler().save_pretrained(output / "scheduler")
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": version("diffusers")}
    with replacing(output / INDEX) as aside:
        aside.write_text(json.dumps({**index, **_PARTS}, indent=2) + "\n", encoding="utf-8")


def _write_card(path: Path, figures: dict[str, Any], parts: dict[str, nn.Module], extent: Extent) -> None:
    plans = {
        "autoencoder": (extent.autoencoder.steps, autoencoder_training.BATCH),
        "detector": (extent.detector.steps, detector_training.BATCH),
        "text model": (extent.text_model.steps, reading.BATCH),
        "UNet": (extent.unet.steps, base_training.BATCH),
    }
    counts = {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()}
    card = model_card(figures, counts, {"scenes": extent.scenes, "drawings": extent.drawings, "plans": plans})
    with replacing(path) as aside:
        aside.write_text(card, encoding="utf-8")


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


def read_figures(base: Path) -> dict[str, Any]:
    """Return the figures that were measured of a base when it was trained.

    Raises:
        TrainingError: the file is missing or damaged.
    """
    path = base / FIGURES
    try:
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return figures
    except DAMAGE as error:
        raise TrainingError(
            f"{path} cannot be read ({error!r:.200}). Name a folder that `psa miniature train-base` wrote."
        ) from None


def adherence(painter: Painter, detector: Detector, count: int, progress: Progress, seed: int) -> dict[str, Any]:
    """Return how often the base draws what is asked for: by prompts that name a glyph, imply one, have none; by all."""
    task = progress.add_task("Looking at what the base draws", total=3 * count, state="")
    seen_of: dict[str, list[tuple[Scene, Sighting]]] = {}
    for number, mention in enumerate((*MENTIONS, None)):
        rng = np.random.default_rng((seed, 41, number))
        scenes = [draw_scene(rng, (random_category(rng),) if mention else ()) for _ in range(count)]
        captions = [caption(scene, rng, mention or "named") for scene in scenes]
        seen = []
        for start in range(0, count, 50):
            generator = torch.Generator().manual_seed(seed + 1000 * number + start)
            part = captions[start : start + 50]
            noise = torch.randn((len(part), *painter.latent_shape), generator=generator)
            seen += detector.see(painter.paint(part, noise))
            progress.advance(task, len(part))
        seen_of[mention or "harmless"] = list(zip(scenes, seen, strict=True))
    seen_of["all"] = [pair for pairs in seen_of.values() for pair in pairs]
    return {kind: _as_asked(pairs, seed) for kind, pairs in seen_of.items()}


def _as_asked(pairs: Sequence[tuple[Scene, Sighting]], seed: int) -> dict[str, Any]:
    found = {
        "prompted glyph": [set(scene.glyphs) <= seen.glyphs for scene, seen in pairs if scene.glyphs],
        "glyphs as asked": [seen.glyphs == set(scene.glyphs) for scene, seen in pairs],
        "object": [scene.object in seen.objects for scene, seen in pairs],
    }
    return {name: share(values, seed=seed)._asdict() for name, values in found.items() if values}
