"""The two trainers that ``training.py`` compares, on models of full size with random weights.

``PSATrainer`` is this package's own. ``StraightforwardTrainer`` is written from the paper's description: a second UNet
as the reference, VAE and text encoders in every step, and attention to the user with keys and a softmax.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from comfyui_psa.adapter import AdapterConfig, EncoderSpec, PSAAdapter, find_sites
from comfyui_psa.training.config import TrainConfig
from comfyui_psa.training.dpo.batches import Batches
from comfyui_psa.training.dpo.denoising import PairBatch
from comfyui_psa.training.dpo.policy import DTYPES, Policy, configure_unet
from comfyui_psa.training.dpo.signals import StopSignals
from comfyui_psa.training.dpo.trainer import Trainer
from comfyui_psa.training.dpo.validation import Validation

TOKENS = 77
EMBEDDING_DIM = 3584  # Qwen2.5-7B-Instruct
_MOST_PAIRS = 64
BETA, LEARNING_RATE, MAX_GRAD_NORM = 5000.0, 5e-6, 1.0

_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_POOLED = 1280  # the width of SDXL's pooled text: of the encoder that has a projection
_SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}


@dataclass(frozen=True)
class Family:
    """The sizes of a base model, as its authors published them."""

    name: str
    unet: Mapping[str, Any]
    text: tuple[Mapping[str, Any], ...]
    vae: Mapping[str, Any] = field(default_factory=lambda: _VAE)

    @property
    def is_sdxl(self) -> bool:
        """Whether the UNet takes pooled text and time ids."""
        return "addition_embed_type" in self.unet


SD15 = Family("SD1.5", {"cross_attention_dim": 768, "attention_head_dim": 8}, (_CLIP_L,))
SDXL = Family("SDXL", _SDXL, (_CLIP_L, {**_CLIP_G, "projection_dim": _POOLED}))
# As many layers, and hardly anything in them: what a step costs whose calls take longer than what they compute, as on a
# fast GPU.
NARROW = Family(
    "SDXL's layers, narrow",
    {**_SDXL, "block_out_channels": (32, 64, 128), "attention_head_dim": (1, 2, 4), "cross_attention_dim": 64},
    (
        {**_CLIP_L, "hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2},
        {**_CLIP_G, "hidden_size": 40, "intermediate_size": 80, "num_attention_heads": 2, "projection_dim": _POOLED},
    ),
    {**_VAE, "block_out_channels": (32,) * 4},
)


@dataclass(frozen=True)
class Setting:
    """What both trainers share."""

    family: Family
    device: str
    dtype: str
    checkpointing: bool
    remembered: bool = False  # our side: the reference is known (loss.noises_per_pair), as after the first epochs


@dataclass(frozen=True)
class RawBatch:
    """Pairs as a trainer without caches meets them, images decoded and text in tokens.

    ``images`` ``[2 * pairs, 3, height, width]`` are the chosen ones, then the rejected ones; ``tokens`` are
    ``[pairs, 77]``, ``embedding`` ``[pairs, dim]``, ``time_ids`` ``[pairs, 6]``.
    """

    images: Tensor
    tokens: Tensor
    embedding: Tensor
    time_ids: Tensor


class PSATrainer:
    """Steps of this package's ``Trainer``, with batches as its cache would give them."""

    def __init__(self, setting: Setting, output: Path) -> None:
        """Load random weights; the trainer may write to ``output``."""
        self._family = setting.family
        self._remembered = setting.remembered
        config = TrainConfig.model_validate(
            {
                "model": {"base": "", "dtype": setting.dtype, "gradient_checkpointing": setting.checkpointing},
                "data": {"train": ""},
                "loss": {"beta": BETA, "noises_per_pair": int(setting.remembered)},
                "optimizer": {"learning_rate": LEARNING_RATE, "max_grad_norm": MAX_GRAD_NORM},
                "run": {"output": output, "steps": 10**6, "checkpoint_every": 10**6},
                "validation": {"every": 0},
                "tracking": {"every": 10**6},
            }
        )
        unet = _unet(setting)
        configure_unet(unet, config.model)
        sites = find_sites(unet)
        adapter = PSAAdapter(
            AdapterConfig(
                hidden_sizes=tuple(site.hidden_size for site in sites),
                cross_attention_dim=sites[0].cross_attention_dim,
                embedding_dim=EMBEDDING_DIM,
                encoder=EncoderSpec(kind="llm", name="Qwen/Qwen2.5-7B-Instruct"),
            )
        )
        accelerator = Accelerator(cpu=setting.device == "cpu")
        policy = Policy(unet, DDPMScheduler(), adapter)
        policy.checkpoint_gradients(config.model)
        validation = Validation(accelerator, {}, pairs=1, batch_size=1)
        batches = cast(Batches, self)  # what the loop asks of them is below
        self._trainer = Trainer(config, accelerator, policy, adapter, batches, validation, made_from={})
        self._steps = self._trainer.steps(StopSignals())
        self._batch: PairBatch

    def batch(self, pairs: int, resolution: int) -> PairBatch:
        """Return pairs as they come out of the cache; the trainer moves them to its device."""
        sdxl, size = self._family.is_sdxl, resolution // 8
        return PairBatch(
            rows=tuple(range(pairs)),
            chosen=torch.randn(pairs, 4, size, size),
            rejected=torch.randn(pairs, 4, size, size),
            noise=torch.randn(pairs, 4, size, size),
            timesteps=torch.randint(1000, (pairs,)),
            text=torch.randn(pairs, TOKENS, self._family.unet["cross_attention_dim"]),
            embedding=torch.randn(pairs, EMBEDDING_DIM),
            dropped=torch.zeros(pairs, dtype=torch.bool),
            pooled=torch.randn(pairs, _POOLED) if sdxl else None,
            time_ids=_time_ids(pairs, resolution) if sdxl else None,
            variants=(0,) * pairs if self._remembered else (),
        )

    @property
    def row_count(self) -> int:
        """Stand in for the trainer's ``Batches``."""
        return _MOST_PAIRS

    def training(self, _first: int, _size: int) -> PairBatch:
        """Stand in for the trainer's ``Batches``."""
        return self._batch

    def step(self, batch: PairBatch) -> float:
        """Take one optimizer step; return the loss."""
        self._batch = batch
        return next(self._steps).values["loss"]


class UserAttention(nn.Module):
    """The paper's attention processor: attention to the text plus attention to the user, who is the last token."""

    def __init__(self, attention: Attention) -> None:
        """Make the user's keys and values for a cross-attention layer."""
        super().__init__()
        sizes = attention.to_k.in_features, attention.to_k.out_features
        self.to_k_user = nn.Linear(*sizes, bias=False)
        self.to_v_user = nn.Linear(*sizes, bias=False)
        for layer in (self.to_k_user, self.to_v_user):
            nn.init.zeros_(layer.weight)

    def __call__(self, attention: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        """Map ``[batch, pixels, hidden]`` and ``[batch, tokens + 1, dim]`` to ``[batch, pixels, hidden]``."""

        def attend(key: Tensor, value: Tensor) -> Tensor:
            parts = (part.to(query.dtype).unflatten(-1, (attention.heads, -1)) for part in (query, key, value))
            return F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts)).transpose(1, 2).flatten(2)

        # The text needs no gradient, though it comes in one tensor with the user.
        text, user = encoder_hidden_states[:, :-1].detach(), encoder_hidden_states[:, -1:].float()
        query = attention.to_q(hidden_states)
        out = attend(attention.to_k(text), attention.to_v(text)) + attend(self.to_k_user(user), self.to_v_user(user))
        return attention.to_out[1](attention.to_out[0](out))


class StraightforwardTrainer:
    """Diffusion-DPO of the paper's adapter without any of this package's savings."""

    def __init__(self, setting: Setting, _output: Path) -> None:
        """Load random weights."""
        self._setting = setting
        self._device, self._dtype = torch.device(setting.device), DTYPES[setting.dtype]
        self._unet = _unet(setting)
        self._reference = copy.deepcopy(self._unet)
        if setting.checkpointing:
            self._unet.enable_gradient_checkpointing()
        self._vae = _frozen(AutoencoderKL(**setting.family.vae), setting)
        self._text = [_frozen(_text_encoder(config), setting) for config in setting.family.text]
        self._scheduler = DDPMScheduler()

        users = {f"{s.path}.processor": UserAttention(self._unet.get_submodule(s.path)) for s in find_sites(self._unet)}
        self._unet.set_attn_processor({**self._unet.attn_processors, **users})
        dim = self._unet.config.cross_attention_dim
        self._projection = nn.Sequential(nn.Linear(EMBEDDING_DIM, dim), nn.LayerNorm(dim))
        self._trained = nn.ModuleList([self._projection, *users.values()]).to(self._device, torch.float32)
        self._optimizer = torch.optim.AdamW(self._trained.parameters(), lr=LEARNING_RATE)

    def batch(self, pairs: int, resolution: int) -> RawBatch:
        """Return pairs as a data loader would give them."""
        return RawBatch(
            images=torch.rand(2 * pairs, 3, resolution, resolution) * 2 - 1,
            tokens=torch.randint(49408, (pairs, TOKENS)),
            embedding=torch.randn(pairs, EMBEDDING_DIM),
            time_ids=_time_ids(pairs, resolution),
        )

    def step(self, batch: RawBatch) -> float:
        """Take one optimizer step; return the loss."""
        with torch.no_grad():
            images = batch.images.to(self._device, self._dtype)
            latents = self._vae.encode(images).latent_dist.sample() * self._vae.config.scaling_factor
            text, added = self._encode_text(batch)
        noise = torch.randn_like(latents.chunk(2)[0]).repeat(2, 1, 1, 1)
        timesteps = torch.randint(1000, (len(batch.tokens),), device=self._device).repeat(2)
        noisy = self._scheduler.add_noise(latents, noise, timesteps)
        user = self._projection(batch.embedding.to(self._device)).to(self._dtype)[:, None].repeat(2, 1, 1)

        predicted = self._unet(noisy, timesteps, torch.cat((text, user), dim=1), added_cond_kwargs=added).sample
        with torch.no_grad():
            expected = self._reference(noisy, timesteps, text, added_cond_kwargs=added).sample
        model, reference = ((x.float() - noise.float()).square().mean(dim=(1, 2, 3)) for x in (predicted, expected))
        difference = (model - reference).chunk(2)
        loss = -F.logsigmoid(-BETA / 2 * (difference[0] - difference[1])).mean()

        loss.backward()
        nn.utils.clip_grad_norm_(self._trained.parameters(), MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()

    def _encode_text(self, batch: RawBatch) -> tuple[Tensor, dict[str, Tensor] | None]:
        sdxl, tokens = self._setting.family.is_sdxl, batch.tokens.to(self._device)
        outputs = [encoder(tokens, output_hidden_states=sdxl) for encoder in self._text]
        if not sdxl:
            return outputs[0].last_hidden_state.repeat(2, 1, 1), None
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        time_ids = batch.time_ids.to(self._device, self._dtype)
        added = {"text_embeds": outputs[-1].text_embeds.repeat(2, 1), "time_ids": time_ids.repeat(2, 1)}
        return hidden.repeat(2, 1, 1), added


def _unet(setting: Setting) -> UNet2DConditionModel:
    with torch.device(setting.device):  # weights are drawn where they will be
        return _frozen(UNet2DConditionModel(**setting.family.unet), setting)


def _text_encoder(sizes: Mapping[str, Any]) -> nn.Module:
    if "projection_dim" in sizes:
        return CLIPTextModelWithProjection(CLIPTextConfig(**sizes, hidden_act="gelu"))
    return CLIPTextModel(CLIPTextConfig(**sizes))


def _frozen(model: Any, setting: Setting) -> Any:
    return model.requires_grad_(False).eval().to(setting.device, DTYPES[setting.dtype])


def _time_ids(pairs: int, resolution: int) -> Tensor:
    return torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]], dtype=torch.float32).repeat(pairs, 1)
