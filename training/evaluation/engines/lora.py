"""LoRAs from disk, added to the weights of a base model: ``W + strength * alpha / rank * up @ down``.

diffusers reads the file and turns kohya's names into its own, of which there have been four; the addition needs no
further package.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from torch import Tensor, nn

from ....safe_files import DAMAGE
from ...base import BaseModel
from ...base.text import TextTower
from ...errors import BaseModelError

SUFFIX = ".safetensors"
_UNET, _TOWERS = "unet", ("text_encoder", "text_encoder_2")
_NAME = re.compile(
    r"(?P<module>.+?)\.(?:processor\.(?P<layer>to_\w+?)_lora\.|lora_linear_layer\.|lora\.|lora_)"
    r"(?P<side>down|up|A|B)\.weight"
)
_TEXT_MODEL = "text_model."  # transformers' models have had it in their names, and some still do


class _Pair(NamedTuple):
    """What is added to one weight: ``up @ down``, ``[out, rank]`` and ``[rank, in, ...]``, times ``scale``."""

    down: Tensor
    up: Tensor
    scale: float

    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], *self.down.shape[1:]

    def added(self) -> Tensor:
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.scale * product.reshape(self.shape())


def check_lora(base: BaseModel, path: Path) -> None:
    """Raise BaseModelError unless ``path`` is a LoRA for the UNet of ``base``."""
    _fitting(base.empty_unet(), _read(base, path)[_UNET], path, base)


@torch.no_grad()
def fuse_lora(base: BaseModel, unet: nn.Module, towers: Sequence[TextTower], path: Path, strength: float) -> None:
    """Add a LoRA to the weights of ``unet`` and of the text encoders, which it changes in place.

    Raises:
        BaseModelError: the file is damaged, no LoRA, of a kind that is no product of two matrices, or for another
            model.
    """
    pairs = _read(base, path)
    models: dict[str, nn.Module] = {_UNET: unet}
    models |= {name: tower.model for name, tower in zip(_TOWERS, towers, strict=False)}
    for part, model in models.items():
        for weight, pair in _fitting(model, pairs[part], path, base):
            weight.copy_(weight.float() + strength * pair.added().to(weight.device))


def _read(base: BaseModel, path: Path) -> dict[str, dict[str, _Pair]]:
    """Return the pairs of a file by part of the model and name of the module."""
    if not path.is_file() or path.suffix.lower() != SUFFIX:
        raise BaseModelError(f"There is no LoRA {path}. Name a {SUFFIX} file.")
    loader: Any = StableDiffusionXLLoraLoaderMixin if base.is_sdxl else StableDiffusionLoraLoaderMixin
    try:
        tensors, alphas = loader.lora_state_dict(
            str(path.parent), weight_name=path.name, local_files_only=True, unet_config=base.empty_unet().config
        )
        found = {part: _pairs(part, tensors, alphas or {}) for part in (_UNET, *_TOWERS)}
    except DAMAGE as error:
        raise BaseModelError(
            f"{path} cannot be read as a LoRA ({str(error).strip().splitlines()[0]:.200}). It is damaged, or another "
            "kind of file: get it again."
        ) from None
    if not found[_UNET]:
        raise BaseModelError(f"{path} holds no LoRA for a UNet of Stable Diffusion. Name another file.")
    return found


def _pairs(part: str, tensors: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, _Pair]:
    sides: dict[str, dict[str, str]] = {}
    for name in tensors:
        if not name.startswith(f"{part}."):
            continue
        match = _NAME.fullmatch(name, len(part) + 1)
        if match is None:
            raise ValueError(f"{name} is no part of a product of two matrices")
        module = ".".join(filter(None, (match["module"], match["layer"])))
        module = f"{module}.0" if module.endswith(".to_out") else module
        sides.setdefault(module, {})["down" if match["side"] in ("down", "A") else "up"] = name
    found = {}
    for module, names in sides.items():
        down, up = tensors[names["down"]], tensors[names["up"]]
        # diffusers names an alpha after the module or after the whole weight.
        found_under = (f"{names['down'].split('.lora.')[0]}.alpha", f"{names['down']}.alpha")
        rank = down.shape[0]
        alpha = next((alphas[name] for name in found_under if name in alphas), rank)
        found[module] = _Pair(down, up, float(alpha) / rank)
    return found


def _fitting(
    model: nn.Module, pairs: Mapping[str, _Pair], path: Path, base: BaseModel
) -> list[tuple[nn.Parameter, _Pair]]:
    """Return each pair behind the weight that it changes."""
    weights = dict(model.named_parameters())
    found = []
    for module, pair in pairs.items():
        inner = module.removeprefix(_TEXT_MODEL)
        names = (f"{module}.weight", f"{inner}.weight", f"{_TEXT_MODEL}{inner}.weight")
        weight = next((weights[name] for name in names if name in weights), None)
        if weight is None or tuple(weight.shape) != pair.shape():
            there = "is not there" if weight is None else f"has the shape {list(weight.shape)}"
            raise BaseModelError(
                f"{path} is a LoRA for another model than {base.path}: it changes {module} of the shape "
                f"{list(pair.shape())}, which {there}. Name a LoRA for this base."
            )
        found.append((weight, pair))
    return found
