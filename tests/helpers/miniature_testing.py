"""A miniature with random weights, as training writes it, in ComfyUI and in diffusers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy_testing import TIMESTEP
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

import nodes
from comfyui_psa.nodes.miniature_model import Miniature
from comfyui_psa.training.miniature import MINIATURE, PEOPLE, SEED
from comfyui_psa.training.miniature.architecture import make_autoencoder, make_scheduler, make_text_encoder, make_unet
from comfyui_psa.training.miniature.cases import draw_cases
from comfyui_psa.training.miniature.evaluation import Embeddings, Outcome, Studio
from comfyui_psa.training.miniature.methods import Method
from comfyui_psa.training.miniature.people import GROUPS, Group
from comfyui_psa.training.miniature.recipe import DETECTOR
from comfyui_psa.training.miniature.tokenizer import write_tokenizer


@torch.no_grad()
def randomised(model: Any, seed: int) -> Any:
    """Draw every weight, biases and norms too, so that nothing cancels by luck; saved in half precision."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        values = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            weight.copy_(0.3 * values + float(name.endswith("weight")))
        else:
            weight.copy_(values if "token_embedding" in name else values / weight[0].numel() ** 0.5)
    return model.half()


def write_miniature(folder: Path) -> Path:
    """Write one into ``folder``, and return it."""
    tokenizer = write_tokenizer(folder / "tokenizer")
    text = make_text_encoder(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    randomised(text, 1).save_pretrained(folder / "text_encoder")
    randomised(make_unet(), 2).save_pretrained(folder / "unet")
    randomised(make_autoencoder(), 3).save_pretrained(folder / "vae")
    make_scheduler().save_pretrained(folder / "scheduler")
    return folder


class Reference:
    """The same folder in diffusers and transformers, in float32."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
        self.vae = AutoencoderTiny.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """The text as the UNet gets it, ``[1, 32, 128]``."""
        tokens = self.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert tokens.shape == (1, 32)
        return self.text_encoder(tokens).last_hidden_state

    @torch.no_grad()
    def predict(self, latent: Tensor, sigma: float, prompt: str, timestep: int = TIMESTEP) -> Tensor:
        """What the UNet predicts for ``latent``, which is noisy as ComfyUI has it."""
        scaled = latent / (sigma**2 + 1) ** 0.5
        return self.unet(scaled, timestep, self.encode(prompt)).sample

    def denoised(self, latent: Tensor, sigma: float, prompt: str) -> Tensor:
        """The latent without the noise that the UNet predicts."""
        v = self.predict(latent, sigma, prompt)
        return latent / (sigma**2 + 1) - v * sigma / (sigma**2 + 1) ** 0.5


def encode(loaded: Miniature, prompt: str) -> Any:
    """A conditioning from ComfyUI's CLIP Text Encode."""
    return nodes.CLIPTextEncode().encode(loaded.clip, prompt)[0]


def copied(folder: Path, place: Path) -> Path:
    """A copy made of links, for tests that change it."""
    shutil.copytree(folder, place, copy_function=os.link, dirs_exist_ok=True)
    return place


def replace(path: Path, content: bytes) -> None:
    """Another file in place of ``path``, which may be a link into the folder that was copied."""
    path.unlink()
    path.write_bytes(content)


def edit(folder: Path, name: str, **changes: Any) -> None:
    """Change values of a JSON file."""
    values = json.loads((folder / name).read_text(encoding="utf-8")) | changes
    replace(folder / name, json.dumps(values).encode())


class Drawn:
    """What methods make of prompts with a glyph, for people in the training; others are kept for the results."""

    def __init__(
        self,
        methods: Sequence[Method],
        per_cell: int,
        trial: int,
        groups: Sequence[Group] = GROUPS,
        language_models: Sequence[Path] = (),
    ) -> None:
        drawn = draw_cases(per_cell, PEOPLE, SEED, trial)
        cases = [case for case in drawn if case.category and not case.unseen and case.group in groups]
        studio = Studio(MINIATURE, MINIATURE / DETECTOR, Embeddings(language_models))
        self._outcomes: dict[str, list[Outcome]] = {method.name: studio.draw(method, cases) for method in methods}

    def share(self, method: str, group: str, measure: str, banned: bool | None = None) -> float:
        """Over prompts that name or imply a glyph; ``banned`` or allowed ones alone."""
        asked = [o for o in self._outcomes[method] if o.case.group == group]
        asked = [o for o in asked if banned is None or o.case.banned == banned]
        return float(np.mean([getattr(outcome, measure) for outcome in asked]))
