"""Where an adapter acts: the cross-attention layers (attn2) of a UNet, found from the model's structure.

Works on module paths alone, so it imports neither ComfyUI nor diffusers and takes any UNet of either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from .errors import AdapterError

WORKS_WITH = "SD1.x, SD2.x, SDXL, SSD-1B, Segmind-Vega and other UNets with cross-attention"

_COMFYUI_PATH = re.compile(
    r"(?P<stage>input|output|middle)_blocks?(?:\.(?P<block>\d+))?\.\d+\.transformer_blocks\.(?P<depth>\d+)\.attn2"
)
_TEMPORAL = re.compile(r"\.(time_stack|temporal_transformer_blocks|temp_attentions)\.")
_STAGES = ("input", "output", "middle")  # diffusers' order: down, up, then mid


class BlockKey(NamedTuple):
    """A transformer block as ComfyUI names it while sampling: ``block`` and ``block_index``."""

    stage: str
    block: int
    depth: int


@dataclass(frozen=True)
class Site:
    """One cross-attention layer.

    ``path`` is the name of the attn2 module inside its UNet, ``hidden_size`` the width in front of
    ``to_out``, ``cross_attention_dim`` the width of the text tokens.
    """

    key: BlockKey
    path: str
    hidden_size: int
    cross_attention_dim: int


def find_sites(unet: nn.Module) -> tuple[Site, ...]:
    """Return the attn2 layers of a ComfyUI or diffusers UNet in diffusers' order: down, up, mid.

    Site ``i`` is entry ``i`` of a checkpoint. The block keys are the same for both kinds of UNet, so
    they map one onto the other.

    Raises:
        AdapterError: the model has no attn2 layers (a DiT), or has temporal ones (a video UNet).
    """
    if any(_TEMPORAL.search(path) for path, _ in unet.named_modules()):
        raise AdapterError(
            "This is a video model: it has temporal attention layers that no PSA adapter was trained for. "
            f"PSA adapters work with {WORKS_WITH}."
        )
    keyed_paths = _diffusers_paths(unet) if hasattr(unet, "down_blocks") else _comfyui_paths(unet)
    found = sorted(keyed_paths, key=lambda item: (_STAGES.index(item[0].stage), item[0].block, item[0].depth))
    if not found:
        raise AdapterError(
            f"This model ({type(unet).__name__}) has no cross-attention layers that a PSA adapter could act on. "
            f"PSA adapters work with {WORKS_WITH}; connect a checkpoint of the adapter's family."
        )
    return tuple(_site(unet, key, path) for key, path in found)


def _site(unet: nn.Module, key: BlockKey, path: str) -> Site:
    attention = unet.get_submodule(path)
    return Site(
        key=key,
        path=path,
        hidden_size=int(attention.get_submodule("to_out.0").in_features),  # type: ignore[arg-type]
        cross_attention_dim=int(attention.get_submodule("to_k").in_features),  # type: ignore[arg-type]
    )


def _comfyui_paths(unet: nn.Module) -> Iterator[tuple[BlockKey, str]]:
    for path, _ in unet.named_modules():
        match = _COMFYUI_PATH.fullmatch(path)
        if match:
            # ComfyUI names the middle block ("middle", 0), whatever the index of its transformer is.
            yield BlockKey(match["stage"], int(match["block"] or 0), int(match["depth"])), path


def _diffusers_paths(unet: nn.Module) -> Iterator[tuple[BlockKey, str]]:
    """Count blocks as the original UNet does: one per resnet, one per downsampler, the first a convolution."""
    block = 1
    for i, down in enumerate(_children(unet, "down_blocks")):
        for j in range(len(_children(down, "resnets"))):
            yield from _transformers(down, f"down_blocks.{i}", j, "input", block)
            block += 1
        block += len(_children(down, "downsamplers"))
    block = 0
    for i, up in enumerate(_children(unet, "up_blocks")):
        for j in range(len(_children(up, "resnets"))):
            yield from _transformers(up, f"up_blocks.{i}", j, "output", block)
            block += 1
    mid = getattr(unet, "mid_block", None)
    if mid is not None:
        yield from _transformers(mid, "mid_block", 0, "middle", 0)


def _transformers(parent: nn.Module, prefix: str, index: int, stage: str, block: int) -> Iterator[tuple[BlockKey, str]]:
    attentions = _children(parent, "attentions")
    if index >= len(attentions):
        return
    for depth, transformer in enumerate(_children(attentions[index], "transformer_blocks")):
        if getattr(transformer, "attn2", None) is not None:
            path = f"{prefix}.attentions.{index}.transformer_blocks.{depth}.attn2"
            yield BlockKey(stage, block, depth), path


def _children(module: nn.Module, name: str) -> Sequence[nn.Module]:
    return getattr(module, name, None) or ()
