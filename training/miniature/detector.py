"""Sees what is in a picture: which of the seven glyphs, which object. A small convolutional network.

It learns from drawings and from drawings behind the autoencoder, so that it judges generated pictures as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...profiles import CATEGORIES, Category
from ...safe_files import DAMAGE, replacing
from ..errors import TrainingError
from .corpus import Corpus
from .drawing import draw
from .fitting import Part, Plan, fit
from .pixels import to_pixels
from .sampling import Painter
from .world import LABELS, OBJECTS, Scene, any_scene, labels

PLAN = Plan("detector", steps=1000, learning_rate=2e-3)
BATCH = 64
_DECODED = 3000
_JUDGE_BATCH = 64


class Sighting(NamedTuple):
    """What a picture shows."""

    glyphs: frozenset[Category]
    objects: frozenset[str]


def shown(scene: Scene) -> Sighting:
    """Return what the picture of a scene shows."""
    return Sighting(frozenset(scene.glyphs), frozenset([scene.object] if scene.object else []))


class Detector(nn.Module):
    """Maps pictures ``[batch, 3, 96, 96]`` from -1 to 1 to one logit for each glyph and each object."""

    def __init__(self) -> None:
        """Make an untrained detector, 0.2 million parameters."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=3, padding=1),
            *_block(32, 64, stride=2),
            *_block(64, 96, stride=2),
            *_block(96, 96, stride=1),
        )
        self.labels = nn.Linear(96, LABELS)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits ``[batch, 15]``: the seven categories, then the objects."""
        return self.labels(self.layers(pixels).amax(dim=(2, 3)))

    @torch.no_grad()
    def see(self, images: Sequence[PIL.Image.Image]) -> list[Sighting]:
        """Return what each picture shows; pictures of another size are scaled to 96 pixels."""
        sightings = []
        for start in range(0, len(images), _JUDGE_BATCH):
            pixels = to_pixels(_fitting(image) for image in images[start : start + _JUDGE_BATCH])
            sightings += [_sighting(row) for row in (self(pixels) > 0).tolist()]
        return sightings


def _block(inner: int, outer: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.GroupNorm(8, inner), nn.SiLU(), nn.Conv2d(inner, outer, 3, stride=stride, padding=1)


def _fitting(image: PIL.Image.Image) -> PIL.Image.Image:
    rgb = image.convert("RGB")
    return rgb if rgb.size == (96, 96) else rgb.resize((96, 96), PIL.Image.Resampling.LANCZOS)


def _sighting(row: Sequence[bool]) -> Sighting:
    glyphs, objects = row[: len(CATEGORIES)], row[len(CATEGORIES) :]
    return Sighting(
        frozenset(category for category, there in zip(CATEGORIES, glyphs, strict=True) if there),
        frozenset(name for name, there in zip(OBJECTS, objects, strict=True) if there),
    )


def train_detector(
    autoencoder: AutoencoderTiny, corpus: Corpus, folder: Path, seed: int, progress: Progress, plan: Plan
) -> Detector:
    """Train a detector, half of every batch drawn afresh and half behind the autoencoder."""
    torch.manual_seed(seed)
    detector = Detector()
    scenes = corpus.scenes[:_DECODED]
    decoded = decode(autoencoder, corpus.latents[:_DECODED])
    targets = torch.tensor(labels(scenes))

    def loss(step: int, part: Part) -> Tensor:
        rng = np.random.default_rng((seed, 1, step))
        fresh = [any_scene(rng) for _ in range(BATCH // 2)]
        again = torch.from_numpy(rng.integers(len(scenes), size=BATCH // 2))
        pixels = torch.cat((to_pixels(draw(scene) for scene in fresh), decoded[again]))
        noise = torch.Generator().manual_seed(int(rng.integers(2**31)))
        # Generated pictures are a little off in brightness and never quite clean.
        pixels = pixels * float(rng.uniform(0.85, 1.1)) + float(rng.uniform(-0.1, 0.1))
        pixels = pixels + float(rng.uniform(0, 0.12)) * torch.randn(pixels.shape, generator=noise)
        truth = torch.cat((torch.tensor(labels(fresh)), targets[again]))
        return F.binary_cross_entropy_with_logits(detector(pixels[part]), truth[part])

    fit(plan, detector, loss, folder, seed, progress)
    return detector


@torch.no_grad()
def decode(autoencoder: AutoencoderTiny, latents: Tensor) -> Tensor:
    """Return the pictures of scaled latents as ``[batch, 3, 96, 96]`` from -1 to 1."""
    unscaled = latents / autoencoder.config.scaling_factor
    return torch.cat([autoencoder.decode(part).sample.contiguous() for part in torch.split(unscaled, 32)])


class Accuracy(NamedTuple):
    """Shares of pictures in which all glyphs are told right (none where there is none), and the object."""

    glyphs: float
    objects: float


def accuracy(detector: Detector, scenes: Sequence[Scene], images: Sequence[PIL.Image.Image]) -> Accuracy:
    """Return how often the detector is right about pictures of known scenes."""
    pairs = list(zip(map(shown, scenes), detector.see(images), strict=True))
    return Accuracy(
        sum(truth.glyphs == seen.glyphs for truth, seen in pairs) / len(pairs),
        sum(truth.objects == seen.objects for truth, seen in pairs) / len(pairs),
    )


def measure_detector(detector: Detector, painter: Painter, count: int, seed: int) -> dict[str, Accuracy]:
    """Return the accuracy on fresh drawings, and on the same drawings encoded and decoded."""
    rng = np.random.default_rng((seed, 77))
    scenes = [any_scene(rng) for _ in range(count)]
    images = [draw(scene) for scene in scenes]
    decoded = painter.through_autoencoder(images)
    return {
        "drawings": accuracy(detector, scenes, images),
        "decoded latents": accuracy(detector, scenes, decoded),
    }


def save_detector(detector: Detector, path: Path) -> None:
    """Write the weights in float16."""
    weights = {name: tensor.half().contiguous() for name, tensor in detector.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        save_file(weights, aside, metadata={"format": "psa_miniature_detector", "format_version": "1"})


def load_detector(path: Path) -> Detector:
    """Read a detector.

    Raises:
        TrainingError: the file is missing or no detector.
    """
    detector = Detector()
    try:
        detector.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    except DAMAGE as error:
        raise TrainingError(
            f"{path} is not the detector of the miniature ({error!r:.200}). Get the pack again, or train it with "
            "`psa miniature train-base`."
        ) from None
    return detector.eval().requires_grad_(False)
