"""The independent computation: a diffusers UNet whose attn2 runs the paper's true two-branch attention."""

from __future__ import annotations

from typing import Any

import comfy.utils
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from comfyui_psa.training.synthetic import UNetShape


def diffusers_unet(model: ModelPatcher, shape: UNetShape, weights: dict[str, Tensor]) -> UNet2DConditionModel:
    """The same UNet in diffusers, with the same weights."""
    sdxl = bool(shape.adm_channels)
    levels = range(len(shape.channel_mult))
    widths = tuple(shape.channels * mult for mult in shape.channel_mult)
    depths = tuple(max(depth, 1) for depth in shape.transformer_depth)
    options: dict[str, Any] = {}
    if sdxl:
        options = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shape.adm_channels,
        }
    unet = UNet2DConditionModel(
        block_out_channels=widths,
        layers_per_block=shape.res_blocks,
        down_block_types=tuple("CrossAttnDownBlock2D" if shape.transformer_depth[i] else "DownBlock2D" for i in levels),
        up_block_types=tuple(
            "CrossAttnUpBlock2D" if shape.transformer_depth[i] else "UpBlock2D" for i in reversed(levels)
        ),
        transformer_layers_per_block=depths,
        cross_attention_dim=shape.context_dim,
        attention_head_dim=tuple(width // 16 for width in widths) if sdxl else 4,
        use_linear_projection=shape.linear_projection,
        **options,
    )
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    renamed = {name: weights[names[name]] for name in unet.state_dict()}
    unet.load_state_dict(renamed, strict=True)
    return unet.eval()


class TwoBranchAttention:
    """Attention over the text plus attention over the user's token, keys and softmax included."""

    def __init__(self, key_weight: Tensor, value_weight: Tensor, strength: float) -> None:
        self.key_weight = key_weight
        self.value_weight = value_weight
        self.strength = strength
        self.user_token: Tensor | None = None

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        assert encoder_hidden_states is not None
        query = attn.to_q(hidden_states)
        out = _attend(query, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states), attn.heads)
        if self.user_token is not None:
            keys = F.linear(self.user_token, self.key_weight)
            values = F.linear(self.user_token, self.value_weight)
            out = out + self.strength * _attend(query, keys, values, attn.heads)
        return attn.to_out[1](attn.to_out[0](out))


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    def split(tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)

    query, key, value = split(query), split(key), split(value)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)


class TwoBranchUNet:
    """A diffusers UNet with the published processor, fed from a published checkpoint."""

    def __init__(
        self, unet: UNet2DConditionModel, release: dict[str, dict[str, Tensor]], strength: float = 1.0
    ) -> None:
        self.unet = unet
        self.projection = {name: weight.float() for name, weight in release["user_proj"].items()}
        layers = release["psa_adapter"]
        self.processors: list[TwoBranchAttention] = []
        processors = dict(unet.attn_processors)
        # The release numbers its layers as diffusers lists them.
        for i, name in enumerate(name for name in processors if "attn2" in name):
            processors[name] = TwoBranchAttention(
                layers[f"{i}.to_k_user.0.weight"], layers[f"{i}.to_v_user.0.weight"], strength
            )
            self.processors.append(processors[name])
        unet.set_attn_processor(processors)

    def user_token(self, embedding: Tensor) -> Tensor:
        """``[users, 1, ctx]`` from ``[users, dim]``."""
        weights = self.projection
        projected = F.linear(embedding, weights["proj.weight"], weights["proj.bias"])
        return F.layer_norm(projected, projected.shape[-1:], weights["norm.weight"], weights["norm.bias"])[:, None]

    @torch.no_grad()
    def __call__(self, x: Tensor, timestep: int, context: Tensor, embedding: Tensor | None, **added: Any) -> Tensor:
        """Predict the noise in ``x`` (scaled model input) for these users, or none."""
        token = None if embedding is None else self.user_token(embedding)
        for processor in self.processors:
            processor.user_token = token
        return self.unet(x, timestep, context, **added).sample
