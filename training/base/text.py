"""Captions to text embeddings, as the UNet of the family expects them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import CLIPTokenizer

_BATCH = 32


class TextEmbedding(NamedTuple):
    """What the UNet sees of one caption, float32 on the CPU."""

    hidden: Tensor  # [tokens, dim]
    pooled: Tensor | None  # [dim]; SDXL


class TextTower(NamedTuple):
    """One text encoder with its tokenizer; ``padding`` is the number that fills up short captions, if another one."""

    tokenizer: CLIPTokenizer
    model: Any  # CLIPTextModel or CLIPTextModelWithProjection
    padding: int | None = None

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Return the token numbers ``[captions, tokens]``; long captions are cut."""
        length = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        encoded = self.tokenizer(
            list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        numbers: Tensor = encoded.input_ids
        if self.padding is not None:
            numbers = numbers.masked_fill(encoded.attention_mask == 0, self.padding)
        return numbers


class TextEncoder:
    """The text encoders of a base model on a device."""

    def __init__(self, towers: Sequence[TextTower], is_sdxl: bool, device: torch.device) -> None:
        """Move the towers to ``device``.

        SDXL takes the last but one layer of every tower and the pooled text of the last tower; other models take
        the last layer, normalised, of the only one.
        """
        self._towers = tuple(towers)
        self._is_sdxl = is_sdxl
        self._device = device
        for tower in self._towers:
            tower.model.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[TextEmbedding]:
        """Encode captions, in float32."""
        embeddings: list[TextEmbedding] = []
        for start in range(0, len(captions), _BATCH):
            embeddings += self._encode_batch(captions[start : start + _BATCH])
        return embeddings

    def _encode_batch(self, captions: Sequence[str]) -> list[TextEmbedding]:
        outputs = [
            tower.model(tower.tokens(captions).to(self._device), output_hidden_states=self._is_sdxl)
            for tower in self._towers
        ]
        if not self._is_sdxl:
            return [TextEmbedding(row.clone(), None) for row in outputs[0].last_hidden_state.cpu()]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1).cpu()
        pooled = outputs[-1].text_embeds.cpu()
        return [TextEmbedding(row.clone(), pool.clone()) for row, pool in zip(hidden, pooled, strict=True)]
