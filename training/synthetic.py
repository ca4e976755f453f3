"""Files with random weights and real formats: a checkpoint, an adapter. They draw noise, but they run.

The checkpoint has the layout of SD1.5 (CompVis names, CLIP-L, TAESD as VAE), so a stock ComfyUI opens it;
the adapter has the published format. For the demo and for tests, where no trained weights can be had.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Shape = tuple[int, ...]
Shapes = Iterator[tuple[str, Shape]]

_LATENT_CHANNELS = 4
_CLIP_WIDTH, _CLIP_LAYERS, _CLIP_VOCABULARY, _CLIP_TOKENS = 768, 12, 49408, 77
_TAESD_WIDTH = 64


@dataclass(frozen=True)
class UNetShape:
    """The dimensions of a CompVis UNet; ``transformer_depth`` has one entry per level, from the outside in."""

    channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0)
    middle_depth: int = 1
    context_dim: int = 768
    linear_projection: bool = False
    adm_channels: int = 0


SD15 = UNetShape()
SDXL = UNetShape(320, (1, 2, 4), 2, (0, 2, 10), 10, 2048, True, 2816)
SMALL_SD15 = UNetShape(channel_mult=(1, 2), res_blocks=1, transformer_depth=(1, 1))


def unet_shapes(unet: UNetShape) -> Shapes:
    """Yield the names and shapes of a UNet's weights, without prefix."""
    embed = unet.channels * 4
    yield from _layer("time_embed.0", embed, unet.channels)
    yield from _layer("time_embed.2", embed, embed)
    if unet.adm_channels:
        yield from _layer("label_emb.0.0", embed, unet.adm_channels)
        yield from _layer("label_emb.0.2", embed, embed)
    yield from _layer("input_blocks.0.0", unet.channels, _LATENT_CHANNELS, 3, 3)
    width, skips, block = unet.channels, [unet.channels], 1
    for level, mult in enumerate(unet.channel_mult):
        for _ in range(unet.res_blocks):
            yield from _res_block(f"input_blocks.{block}.0", width, mult * unet.channels, embed)
            width = mult * unet.channels
            yield from _transformer(f"input_blocks.{block}.1", width, unet.transformer_depth[level], unet)
            skips.append(width)
            block += 1
        if level + 1 < len(unet.channel_mult):
            yield from _layer(f"input_blocks.{block}.0.op", width, width, 3, 3)
            skips.append(width)
            block += 1
    yield from _res_block("middle_block.0", width, width, embed)
    yield from _transformer("middle_block.1", width, unet.middle_depth, unet)
    yield from _res_block("middle_block.2", width, width, embed)
    block = 0
    for level, mult in reversed(list(enumerate(unet.channel_mult))):
        for i in range(unet.res_blocks + 1):
            yield from _res_block(f"output_blocks.{block}.0", width + skips.pop(), mult * unet.channels, embed)
            width = mult * unet.channels
            depth = unet.transformer_depth[level]
            yield from _transformer(f"output_blocks.{block}.1", width, depth, unet)
            if level and i == unet.res_blocks:
                yield from _layer(f"output_blocks.{block}.{2 if depth else 1}.conv", width, width, 3, 3)
            block += 1
    yield from _layer("out.0", width)
    yield from _layer("out.2", _LATENT_CHANNELS, width, 3, 3)


def attention_widths(unet: UNetShape) -> tuple[int, ...]:
    """Return the widths of a UNet's cross-attention layers in diffusers' order: down, up, mid."""
    widths: dict[str, list[int]] = {"input": [], "output": [], "middle": []}
    for name, shape in unet_shapes(unet):
        if name.endswith("attn2.to_out.0.weight"):
            widths[name.split("_")[0]].append(shape[1])
    return tuple(width for stage in widths.values() for width in stage)


def random_weights(shapes: Shapes, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Draw weights that keep activations near unit size: matrices by fan-in, norms 1, biases 0."""
    weights = {}
    for name, shape in shapes:
        if len(shape) > 1:
            scale = 1 / math.sqrt(math.prod(shape[1:]))
            weights[name] = (torch.randn(shape, generator=generator) * scale).to(dtype)
        else:
            weights[name] = torch.full(shape, float(name.endswith("weight")), dtype=dtype)
    return weights


def write_checkpoint(path: Path, unet: UNetShape = SMALL_SD15, seed: int = 0) -> None:
    """Write a checkpoint that ComfyUI's ``CheckpointLoaderSimple`` takes for SD1.5, in float16."""
    generator = torch.Generator().manual_seed(seed)
    parts = {
        "model.diffusion_model.": unet_shapes(unet),
        "cond_stage_model.transformer.text_model.": _clip_shapes(),
        "first_stage_model.": _taesd_shapes(),
    }
    weights = {
        prefix + name: tensor
        for prefix, shapes in parts.items()
        for name, tensor in random_weights(shapes, generator, torch.float16).items()
    }
    # A random decoder saturates: bring its pictures into the middle of the range.
    last = "first_stage_model.taesd_decoder.19"
    weights[f"{last}.weight"] *= 0.2
    weights[f"{last}.bias"] += 0.5
    save_file(weights, path)


def write_release_adapter(
    path: Path, hidden_sizes: tuple[int, ...], cross_attention_dim: int, embedding_dim: int, seed: int = 0
) -> None:
    """Write a random adapter in the published format (a torch pickle, keys included)."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        f"{i}.to_{name}_user.0.weight": (hidden, cross_attention_dim)
        for i, hidden in enumerate(hidden_sizes)
        for name in "kv"
    }
    projection: dict[str, Shape] = dict(_layer("proj", cross_attention_dim, embedding_dim)) | dict(
        _layer("norm", cross_attention_dim)
    )
    user_proj = random_weights(iter(projection.items()), generator, torch.bfloat16)
    # A trained bias is not zero: it makes the null user, LayerNorm(b).
    user_proj["proj.bias"] = torch.randn(cross_attention_dim, generator=generator).to(torch.bfloat16)
    torch.save({"psa_adapter": random_weights(iter(layers.items()), generator), "user_proj": user_proj}, path)


def _layer(name: str, *shape: int) -> Shapes:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _res_block(name: str, width_in: int, width: int, embed: int) -> Shapes:
    yield from _layer(f"{name}.in_layers.0", width_in)
    yield from _layer(f"{name}.in_layers.2", width, width_in, 3, 3)
    yield from _layer(f"{name}.emb_layers.1", width, embed)
    yield from _layer(f"{name}.out_layers.0", width)
    yield from _layer(f"{name}.out_layers.3", width, width, 3, 3)
    if width_in != width:
        yield from _layer(f"{name}.skip_connection", width, width_in, 1, 1)


def _transformer(name: str, width: int, depth: int, unet: UNetShape) -> Shapes:
    if not depth:
        return
    projection = (width, width) if unet.linear_projection else (width, width, 1, 1)
    yield from _layer(f"{name}.norm", width)
    yield from _layer(f"{name}.proj_in", *projection)
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        for attention, context in (("attn1", width), ("attn2", unet.context_dim)):
            yield f"{block}.{attention}.to_q.weight", (width, width)
            yield f"{block}.{attention}.to_k.weight", (width, context)
            yield f"{block}.{attention}.to_v.weight", (width, context)
            yield from _layer(f"{block}.{attention}.to_out.0", width, width)
        yield from _layer(f"{block}.ff.net.0.proj", width * 8, width)
        yield from _layer(f"{block}.ff.net.2", width, width * 4)
        for norm in ("norm1", "norm2", "norm3"):
            yield from _layer(f"{block}.{norm}", width)
    yield from _layer(f"{name}.proj_out", *projection)


def _clip_shapes() -> Shapes:
    yield "embeddings.token_embedding.weight", (_CLIP_VOCABULARY, _CLIP_WIDTH)
    yield "embeddings.position_embedding.weight", (_CLIP_TOKENS, _CLIP_WIDTH)
    for i in range(_CLIP_LAYERS):
        layer = f"encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _layer(f"{layer}.self_attn.{name}", _CLIP_WIDTH, _CLIP_WIDTH)
        yield from _layer(f"{layer}.mlp.fc1", _CLIP_WIDTH * 4, _CLIP_WIDTH)
        yield from _layer(f"{layer}.mlp.fc2", _CLIP_WIDTH, _CLIP_WIDTH * 4)
        yield from _layer(f"{layer}.layer_norm1", _CLIP_WIDTH)
        yield from _layer(f"{layer}.layer_norm2", _CLIP_WIDTH)
    yield from _layer("final_layer_norm", _CLIP_WIDTH)


def _taesd_shapes() -> Shapes:
    """TAESD: plain convolutions and residual blocks, three halvings and three doublings."""
    scaling = ("block", "block", "block")
    encoder = ("first", "block", *("down", *scaling) * 3, "last")
    decoder = ("clamp", "first", "relu", *(*scaling, "up", "down") * 3, "block", "last")
    for name, layers, width_in, width_out in (
        ("taesd_encoder", encoder, 3, _LATENT_CHANNELS),
        ("taesd_decoder", decoder, _LATENT_CHANNELS, 3),
    ):
        for i, layer in enumerate(layers):
            if layer == "first":
                yield from _layer(f"{name}.{i}", _TAESD_WIDTH, width_in, 3, 3)
            elif layer == "last":
                yield from _layer(f"{name}.{i}", width_out, _TAESD_WIDTH, 3, 3)
            elif layer == "down":
                yield f"{name}.{i}.weight", (_TAESD_WIDTH, _TAESD_WIDTH, 3, 3)
            elif layer == "block":
                for j in (0, 2, 4):
                    yield from _layer(f"{name}.{i}.conv.{j}", _TAESD_WIDTH, _TAESD_WIDTH, 3, 3)
