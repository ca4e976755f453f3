"""The text side and the gated kind by their formulas, head by head in float64, nothing folded or shared with ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from comfyui_psa.adapter import AdapterConfig, EncoderSpec, GatedSpec, PSAAdapter, TextSpec
from comfyui_psa.profiles import SafetyEmbedding

EMBEDDING_DIM = 12
GATED = GatedSpec(num_tokens=3, token_dim=10, heads=4, head_dim=5)
TEXT = TextSpec(num_tokens=3, token_dim=10, inner_dim=8, heads=2)
MLP = TextSpec(form="mlp", num_tokens=1, token_dim=10, inner_dim=8)


def kinds_adapter(hidden_sizes: tuple[int, ...], context_dim: int, seed: int = 0, **kinds: Any) -> PSAAdapter:
    """An adapter of these kinds alone, in which nothing is zero or one by chance."""
    described: dict[str, Any] = {"constant": False, "null": "none", "hidden_sizes": hidden_sizes, **kinds}
    config = AdapterConfig(
        cross_attention_dim=context_dim,
        embedding_dim=EMBEDDING_DIM,
        encoder=EncoderSpec(kind="attributes", name="1"),
        **described,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # whatever ran before
        adapter = PSAAdapter(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    adapter.embedding_mean.copy_(torch.randn(EMBEDDING_DIM, generator=generator))
    adapter.embedding_std.copy_(torch.rand(EMBEDDING_DIM, generator=generator) + 0.5)
    return adapter


def users(*numbers: int) -> SafetyEmbedding:
    """Embeddings of simulated users by number."""
    return SafetyEmbedding(
        torch.stack([torch.randn(EMBEDDING_DIM, generator=torch.Generator().manual_seed(n)) for n in numbers])
    )


def user_tokens(weights: Mapping[str, Tensor], adapter: PSAAdapter, embedding: Tensor) -> Tensor:
    """``[T, token_dim]`` of one user, ``[embedding_dim]``."""
    standardised = (embedding.double() - adapter.embedding_mean.double()) / adapter.embedding_std.double()
    width = weights["norm.weight"].shape[0]
    projected = (weights["proj.weight"] @ standardised + weights["proj.bias"]).reshape(-1, width)
    return F.layer_norm(projected, (width,), weights["norm.weight"], weights["norm.bias"])


def attend_beside_sink(query: Tensor, key: Tensor, value: Tensor, sink: Tensor) -> Tensor:
    """``[positions, d]``, ``[T, d]``, ``[T, width]`` of one head to ``[positions, width]``; the sink is worth zero."""
    rows = []
    for q in query:
        scores = [math.exp(float(q @ k) / math.sqrt(len(q))) for k in key]
        total = sum(scores) + math.exp(float(sink))
        rows.append(sum((score / total) * v for score, v in zip(scores, value, strict=True)))
    return torch.stack(rows)


def changed_text(adapter: PSAAdapter, embedding: Tensor, text: Tensor, part: str = "tokens") -> Tensor:
    """What a user, ``[embedding_dim]``, makes of ``[1, tokens, dim]`` (``part`` "pooled": of ``[1, dim]``)."""
    weights = {name: value.double() for name, value in adapter.text.state_dict().items()}
    own = {name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(part)}
    projection = {name.removeprefix("user_proj."): value for name, value in weights.items()}
    user = user_tokens(projection, adapter, embedding)
    rows = text.double().reshape(-1, text.shape[-1])
    normed = F.layer_norm(rows, rows.shape[-1:], own["norm.weight"], own["norm.bias"])
    if "to_hidden.weight" in own:
        hidden = normed @ own["to_hidden.weight"].T + own["to_hidden.bias"] + user @ own["to_hidden_user.weight"].T
        residual = F.gelu(hidden) @ own["to_out.weight"].T
    else:
        heads = own["sink"].shape[0]
        query, key, value = (
            (source @ own[f"{name}.weight"].T).chunk(heads, dim=-1)
            for source, name in ((normed, "to_q"), (user, "to_k_user"), (user, "to_v_user"))
        )
        parts = [attend_beside_sink(*qkvs) for qkvs in zip(query, key, value, own["sink"], strict=True)]
        residual = torch.cat(parts, dim=-1) @ own["to_out.weight"].T
    return (rows + residual).reshape(text.shape).float()


class GatedBranch:
    """Attention to the text plus attention to a user's tokens and the sink, in front of ``to_out``."""

    def __init__(self, weights: Mapping[str, Tensor], users: list[Tensor]) -> None:
        self.weights = {name: value.double() for name, value in weights.items()}
        self.users = users

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        assert encoder_hidden_states is not None
        query, key, value = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (
                attn.to_q(hidden_states),
                attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
            )
        )
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        added = [self._added(n.double(), user) for n, user in zip(hidden_states, self.users, strict=True)]
        return attn.to_out[1](attn.to_out[0](out + torch.stack(added).float()))

    def _added(self, n: Tensor, user: Tensor) -> Tensor:
        heads = self.weights["sink"].shape[0]
        query, key, value = (
            (source @ self.weights[f"{name}.weight"].T).chunk(heads, dim=-1)
            for source, name in ((n, "to_q_user"), (user, "to_k_user"), (user, "to_v_user"))
        )
        parts = [attend_beside_sink(*qkvs) for qkvs in zip(query, key, value, self.weights["sink"], strict=True)]
        return torch.cat(parts, dim=-1)


def with_gated_users(unet: UNet2DConditionModel, adapter: PSAAdapter, embeddings: list[Tensor]) -> UNet2DConditionModel:
    """Give a UNet the gated branch for a batch of these users."""
    weights = {name.removeprefix("gated_user_proj."): v.double() for name, v in adapter.state_dict().items()}
    users = [user_tokens(weights, adapter, embedding) for embedding in embeddings]
    processors = dict(unet.attn_processors)
    names = [name for name in processors if "attn2" in name]
    for name, site in zip(names, adapter.gated_sites, strict=True):
        processors[name] = GatedBranch(site.state_dict(), users)
    unet.set_attn_processor(processors)
    return unet
