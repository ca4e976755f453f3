"""The scenes from which the base model learns, as latents that are computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...profiles import CATEGORIES
from ...safe_files import DAMAGE, replacing
from .drawing import draw
from .pixels import to_pixels
from .world import Scene, any_scene

_BATCH = 32


@dataclass(frozen=True)
class Corpus:
    """Scenes and their latents as the UNet sees them, scaled to unit deviation: ``[scenes, channels, 12, 12]``."""

    scenes: Sequence[Scene]
    latents: Tensor


def make_corpus(autoencoder: AutoencoderTiny, count: int, seed: int, folder: Path, progress: Progress) -> Corpus:
    """Draw ``count`` scenes and encode them, or read their latents from ``folder``.

    The autoencoder's ``scaling_factor`` becomes what gives these latents a deviation of 1.
    """
    rng = np.random.default_rng((seed, count))
    # Lists of any length: a negative prompt may name everything that a person bans.
    scenes = [any_scene(rng, most=len(CATEGORIES)) for _ in range(count)]
    path = folder / f"latents-{count}-{seed}-{_digest(autoencoder)}.safetensors"
    latents = _load(path)
    if latents is None:
        latents = encode(autoencoder, scenes, progress)
        with replacing(path) as aside:
            save_file({"latents": latents}, aside)
    scale = round(1 / float(latents.std()), 3)
    autoencoder.register_to_config(scaling_factor=scale)
    return Corpus(scenes, latents * scale)


def encode(autoencoder: AutoencoderTiny, scenes: Sequence[Scene], progress: Progress) -> Tensor:
    """Return the latents of drawn scenes as the autoencoder gives them, float32 ``[scenes, channels, 12, 12]``."""
    task = progress.add_task("Drawing and encoding scenes", total=len(scenes), state="")

    @torch.no_grad()
    def latents_of(start: int) -> Tensor:
        pixels = to_pixels(draw(scene) for scene in scenes[start : start + _BATCH])
        return autoencoder.encode(pixels.contiguous(memory_format=torch.channels_last)).latents.contiguous()

    latents = []
    # A thread for each batch: small models gain nothing from two threads in one operation.
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as threads:
        for part in threads.map(latents_of, range(0, len(scenes), _BATCH)):
            latents.append(part)
            progress.advance(task, len(part))
    return torch.cat(latents)


def _digest(autoencoder: AutoencoderTiny) -> str:
    found = hashlib.sha256()
    for weight in autoencoder.encoder.state_dict().values():
        found.update(weight.float().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


def _load(path: Path) -> Tensor | None:
    try:
        return load_file(path)["latents"]
    except DAMAGE:
        return None
