"""Trains the miniature's text model: it learns what a caption speaks of, in a minute, and is frozen from then on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from .architecture import TEXT_DIM, TOKENS, make_text_encoder
from .captions import MENTIONS, caption
from .corpus import Corpus
from .fitting import Part, Plan, fit
from .world import LABELS, PLACES, labels

PLAN = Plan("text model", steps=500, learning_rate=1e-3, ema_decay=0.98)
BATCH = 64


class _Reader(nn.Module):
    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.answers = nn.Linear(TEXT_DIM, LABELS + len(PLACES))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.answers(self.text_encoder(tokens).pooler_output)


def train_text_model(
    tokenizer: CLIPTokenizer, corpus: Corpus, folder: Path, seed: int, progress: Progress, plan: Plan
) -> CLIPTextModel:
    """Return a text model whose last token tells the place, the object and the glyphs of a caption."""
    torch.manual_seed(seed)
    reader = _Reader(make_text_encoder(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id))

    def loss(step: int, part: Part) -> Tensor:
        rng = np.random.default_rng((seed, 3, step))
        scenes = [corpus.scenes[int(row)] for row in rng.integers(len(corpus.scenes), size=BATCH)]
        captions = [caption(scene, rng, MENTIONS[int(rng.integers(2))]) for scene in scenes]
        places = torch.tensor([PLACES.index(scene.place) for scene in scenes])
        truth = torch.cat((torch.tensor(labels(scenes)), F.one_hot(places, len(PLACES))), dim=1)
        return F.binary_cross_entropy_with_logits(reader(to_tokens(tokenizer, captions[part])), truth[part])

    fit(plan, reader, loss, folder, seed, progress)
    return reader.text_encoder


def to_tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Return token numbers ``[captions, 32]``, padded as CLIP does."""
    encoded = tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return encoded.input_ids
