"""Trains the miniature's UNet from nothing, on captioned scenes, with the text model frozen as Stable Diffusion's is.

Trained along, the text model forgets: a place fills a picture, so that all it learns at first is to tell places apart,
and thousands of steps later it still gives every object and glyph the same embedding.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from rich.progress import Progress
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..dpo.denoising import prediction_target
from .architecture import make_scheduler, make_unet
from .captions import caption
from .corpus import Corpus
from .fitting import Part, Plan, fit, halves
from .reading import to_tokens

PLAN = Plan("UNet", steps=6400, learning_rate=2e-3, ema_decay=0.998, weight_decay=0.01, cycles=2)
SCENES = 20_000
BATCH = 16  # 32 were no better after as many steps (600), which took longer
_PROMPT_DROPOUT = 0.12
_NAMED_SHARE = 0.55


def train_unet(
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    corpus: Corpus,
    folder: Path,
    seed: int,
    progress: Progress,
    plan: Plan,
) -> UNet2DConditionModel:
    """Return a new UNet, trained on captioned scenes with Stable Diffusion's loss."""
    torch.manual_seed(seed)
    unet = make_unet()
    scheduler = make_scheduler()

    def loss(step: int, part: Part) -> Tensor:
        rng = np.random.default_rng((seed, 2, step))
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        rows = rng.integers(len(corpus.scenes), size=BATCH)
        captions = [_caption(corpus, int(row), rng) for row in rows]
        latents = corpus.latents[torch.from_numpy(rows)]
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = _timesteps(scheduler.config.num_train_timesteps, generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = prediction_target(scheduler, latents, noise, timesteps)[part]
        text = text_encoder(to_tokens(tokenizer, captions[part])).last_hidden_state
        return F.mse_loss(unet(noisy[part], timesteps[part], text).sample, target)

    fit(plan, unet, loss, folder, seed, progress, halves(BATCH))
    return unet


def _timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Return one for every picture, evenly spread from a random start: small batches then agree on the gradient."""
    places = (torch.rand(1, generator=generator) + torch.arange(BATCH) / BATCH) % 1
    return (places * count).long().clamp(max=count - 1)


def _caption(corpus: Corpus, row: int, rng: np.random.Generator) -> str:
    if rng.random() < _PROMPT_DROPOUT:
        return ""
    return caption(corpus.scenes[row], rng, "named" if rng.random() < _NAMED_SHARE else "implied")
