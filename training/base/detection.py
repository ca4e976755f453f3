"""What a checkpoint holds, from the names and shapes of its weights: configurations in diffusers' terms.

Shapes alone do not tell the number of attention heads: eight per layer in the SD1 family, 64 channels each in
the families with linear projections (SD2, SDXL), as ComfyUI has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Shapes = Mapping[str, tuple[int, ...]]
Depths = Sequence[int]

TIME_DIM = 256  # channels per number in SDXL's size conditioning
_HEADS, _HEAD_CHANNELS = 8, 64


class UnknownLayoutError(ValueError):
    """The weights are of no UNet or VAE of this family; says which part does not fit."""


class _Level(NamedTuple):
    width: int
    down: Depths  # transformer blocks behind each residual block, on the way down
    up: Depths


def unet_config(shapes: Shapes) -> dict[str, Any]:
    """Return the configuration of a UNet from the shapes of its weights in CompVis' names, without prefix.

    Raises:
        UnknownLayoutError: diffusers has no such UNet.
    """
    levels = _levels(shapes)
    widths = [level.width for level in levels]
    attention = next((name for name in shapes if name.endswith("attn2.to_k.weight")), None)
    if attention is None:
        raise UnknownLayoutError("it has no cross-attention")
    linear = any(name.endswith("1.proj_in.weight") and len(shape) == 2 for name, shape in shapes.items())
    config: dict[str, Any] = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": len(levels[0].down),
        "down_block_types": ["CrossAttnDownBlock2D" if any(level.down) else "DownBlock2D" for level in levels],
        "up_block_types": ["CrossAttnUpBlock2D" if any(level.up) else "UpBlock2D" for level in reversed(levels)],
        "cross_attention_dim": shapes[attention][1],
        "attention_head_dim": [max(1, width // _HEAD_CHANNELS) for width in widths] if linear else _HEADS,
        "use_linear_projection": linear,
        **_depths(shapes, levels),
    }
    label = shapes.get("label_emb.0.0.weight")
    if label is not None:
        config["addition_embed_type"] = "text_time"
        config["addition_time_embed_dim"] = TIME_DIM
        config["projection_class_embeddings_input_dim"] = label[1]
    return config


def vae_config(shapes: Shapes, scaling_factor: float) -> dict[str, Any]:
    """Return the configuration of an AutoencoderKL from shapes in CompVis' names, without prefix."""
    widths: list[int] = []
    while f"encoder.down.{len(widths)}.block.0.conv1.weight" in shapes:
        widths.append(shapes[f"encoder.down.{len(widths)}.block.0.conv1.weight"][0])
    return {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": _count(shapes, "encoder.down.0.block."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "scaling_factor": scaling_factor,
    }


def text_config(shapes: Shapes, activation: str) -> dict[str, Any]:
    """Return the configuration of a CLIP text encoder from shapes in transformers' names, behind ``text_model.``."""
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, "text_model.encoder.layers."),
        "num_attention_heads": max(1, width // _HEAD_CHANNELS),
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "hidden_act": activation,
        "projection_dim": shapes.get("text_projection.weight", (width,))[0],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def _levels(shapes: Shapes) -> list[_Level]:
    """Walk the blocks from the outside in; the way up has one residual block more per level."""
    down: list[list[tuple[int, int]]] = [[]]
    for i in range(1, _count(shapes, "input_blocks.")):
        block = f"input_blocks.{i}"
        if f"{block}.0.op.weight" in shapes:
            down.append([])
        else:
            down[-1].append((shapes[f"{block}.0.out_layers.3.weight"][0], _depth(shapes, block)))
    layers = len(down[0])
    up = [_depth(shapes, f"output_blocks.{i}") for i in range(_count(shapes, "output_blocks."))]
    if not layers or any(len(level) != layers for level in down) or len(up) != len(down) * (layers + 1):
        raise UnknownLayoutError(
            f"its levels have {[len(level) for level in down]} blocks down and {len(up)} up in all"
        )
    levels = []
    for i, blocks in enumerate(reversed(down)):
        depths = [depth for _, depth in blocks]
        levels.append(_Level(blocks[0][0], depths, up[i * (layers + 1) : (i + 1) * (layers + 1)]))
        for way in (levels[-1].down, levels[-1].up):
            if any(way) and not all(way):
                raise UnknownLayoutError(f"only some blocks of a level have attention ({way})")
    return levels[::-1]


def _depths(shapes: Shapes, levels: Sequence[_Level]) -> dict[str, Any]:
    """How many transformer blocks there are in each level and in the middle, which shares the last level's entry."""
    depths = [_same(level.down) for level in levels]
    middle = _depth(shapes, "middle_block")
    config: dict[str, Any] = {}
    if not middle:
        middle_exists = "middle_block.0.in_layers.0.weight" in shapes
        config["mid_block_type"] = "UNetMidBlock2D" if middle_exists else None
    elif not any(levels[-1].down):
        depths[-1] = middle
    elif depths[-1] != middle:
        raise UnknownLayoutError(f"its middle is {middle} deep and its last level {depths[-1]}")
    config["transformer_layers_per_block"] = depths
    upwards = [_same(level.up) for level in reversed(levels)]
    if upwards != [_same(level.down) for level in reversed(levels)]:
        config["reverse_transformer_layers_per_block"] = upwards
    return config


def _same(depths: Depths) -> int | list[int]:
    """Write equal depths as one number; a level without attention counts as 1, which is never looked at."""
    return max(1, depths[0]) if len(set(depths)) == 1 else list(depths)


def _depth(shapes: Shapes, block: str) -> int:
    return _count(shapes, f"{block}.1.transformer_blocks.")


def _count(shapes: Shapes, prefix: str) -> int:
    """Count the different names between ``prefix`` and the next dot."""
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})
