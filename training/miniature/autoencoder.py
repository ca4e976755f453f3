"""Trains the autoencoder on drawn scenes: sharp edges, latents of unit size that stand some noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from rich.progress import Progress
from torch import Tensor, nn

from ..errors import TrainingError
from .architecture import make_autoencoder
from .drawing import SIZE, draw
from .fitting import Part, Plan, fit, halves
from .pixels import to_pixels
from .world import Scene, any_scene

PLAN = Plan("autoencoder", steps=10000, learning_rate=2.5e-3)
BATCH = 8
_CROP = 48  # pixels; objects and glyphs are smaller
_ANYWHERE_SHARE = 0.2
_DRAWN_AHEAD = 8000
_NOISE = 0.25  # of the latents: near latents give near pictures, and what is generated is never exact
_UNIT = 0.02


def train_autoencoder(folder: Path, seed: int, progress: Progress, plan: Plan) -> AutoencoderTiny:
    """Train an autoencoder, or go on with the one in ``folder``; return it ready for use."""
    torch.manual_seed(seed)
    # With channels last a CPU is a little faster. No bfloat16: where a CPU lacks it, it takes ten times as long.
    model = _initialised(make_autoencoder()).to(memory_format=torch.channels_last)
    rng = np.random.default_rng((seed, 0))
    scenes = [any_scene(rng) for _ in range(min(_DRAWN_AHEAD, plan.steps * BATCH))]
    drawn = np.stack([np.asarray(draw(scene)) for scene in scenes])

    def loss(step: int, part: Part) -> Tensor:
        rng = np.random.default_rng((seed, 0, step))
        rows = rng.integers(len(drawn), size=BATCH)
        pixels = to_pixels(_crop(drawn[row], scenes[row], rng) for row in rows)[part]
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        latents = model.encode(pixels.contiguous(memory_format=torch.channels_last)).latents
        noisy = latents + _NOISE * torch.randn((BATCH, *latents.shape[1:]), generator=generator)[part]
        decoded = model.decode(noisy).sample
        return reconstruction_loss(decoded, pixels, step >= 0.4 * plan.steps) + _UNIT * unit_loss(latents)

    fit(plan, model, loss, folder, seed, progress, halves(BATCH))
    check_it_sees(model, to_pixels(drawn[:BATCH]))
    return model


@torch.no_grad()
def check_it_sees(model: AutoencoderTiny, pixels: Tensor) -> None:
    """Raise TrainingError if all of the pictures ``[batch, 3, height, width]`` come back as the same one."""
    decoded = model.decode(model.encode(pixels).latents).sample
    if torch.equal(decoded, decoded[:1].expand_as(decoded)):
        raise TrainingError(
            "The autoencoder gives the same picture back whatever it is given: training has switched a layer off. "
            "Begin again with another --seed and another --work."
        )


def _crop(picture: np.ndarray, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Cut out a square, mostly around an object or a glyph: there is more to learn than in the sky."""
    spots = [*scene.glyph_spots, *([scene.object_spot] * 2 if scene.object else [])]
    spot = spots[int(rng.integers(len(spots)))]
    centre = np.array((spot.y, spot.x)) + rng.uniform(-0.15, 0.15, 2)
    if rng.random() < _ANYWHERE_SHARE:
        centre = rng.uniform(0, 1, 2)
    top, left = np.clip(np.round(centre * SIZE - _CROP / 2), 0, SIZE - _CROP).astype(int)
    return picture[top : top + _CROP, left : left + _CROP]


def reconstruction_loss(found: Tensor, expected: Tensor, sharp: bool) -> Tensor:
    """Return the error of pictures ``[batch, 3, height, width]``.

    Squares alone first, which find shapes soonest; if ``sharp``, absolute differences of pixels and of edges as well.
    """
    error = found - expected
    squares = 4 * error.square().mean()
    if not sharp:
        return squares
    across, down = error.diff(dim=-1), error.diff(dim=-2)
    return squares + error.abs().mean() + across.abs().mean() + down.abs().mean()


def unit_loss(latents: Tensor) -> Tensor:
    """Return how far each latent channel is from mean 0 and deviation 1 over these pictures, half a batch."""
    deviation, mean = torch.std_mean(latents, dim=(0, 2, 3))
    return mean.square().mean() + (deviation - 1).square().mean()


def _initialised(model: AutoencoderTiny) -> AutoencoderTiny:
    """Draw weights as for ReLU without normalisation: torch's defaults let signals fade from layer to layer."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith("conv.4"):  # the last one of a residual block
                module.weight.data.mul_(0.3)
    return model
