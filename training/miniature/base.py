"""Trains the miniature's UNet and text model together, from nothing, on captioned scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from rich.progress import Progress
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ..dpo.denoising import prediction_target
from .architecture import TOKENS, make_scheduler, make_text_encoder, make_unet
from .captions import caption
from .corpus import Corpus
from .fitting import Plan, fit

PLAN = Plan("UNet", steps=4000, learning_rate=2e-3, ema_decay=0.998, weight_decay=0.01)
SCENES = 20_000
BATCH = 64
_PROMPT_DROPOUT = 0.12
_NAMED_SHARE = 0.55


class Denoiser(nn.Module):
    """UNet and text model, which learn together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        """Join the two."""
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """Predict v for ``[batch, channels, 12, 12]`` from prompts as ``[batch, 32]`` token numbers."""
        text = self.text_encoder(tokens).last_hidden_state
        return self.unet(noisy, timesteps, text).sample


def train_denoiser(
    tokenizer: CLIPTokenizer, corpus: Corpus, folder: Path, seed: int, progress: Progress, plan: Plan
) -> Denoiser:
    """Train UNet and text model on captioned scenes, with Stable Diffusion's loss."""
    torch.manual_seed(seed)
    text_encoder = make_text_encoder(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    model = Denoiser(make_unet(), text_encoder)
    scheduler = make_scheduler()

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((seed, 2, step))
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        rows = rng.integers(len(corpus.scenes), size=BATCH)
        captions = [_caption(corpus, int(row), rng) for row in rows]
        latents = corpus.latents[torch.from_numpy(rows)]
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (BATCH,), generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = prediction_target(scheduler, latents, noise, timesteps)
        return F.mse_loss(model(noisy, timesteps, to_tokens(tokenizer, captions)), target)

    fit(plan, model, loss, folder, seed, progress)
    return model


def _caption(corpus: Corpus, row: int, rng: np.random.Generator) -> str:
    if rng.random() < _PROMPT_DROPOUT:
        return ""
    return caption(corpus.scenes[row], rng, "named" if rng.random() < _NAMED_SHARE else "implied")


def to_tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Return token numbers ``[captions, 32]``, padded as CLIP does."""
    encoded = tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return encoded.input_ids
