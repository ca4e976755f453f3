"""Weights in the names of single-file checkpoints, brought into diffusers' and transformers' models.

UNet, VAE and OpenCLIP are renamed by diffusers' own functions; the rest is what those leave out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from torch import Tensor, nn

from ..errors import BaseModelError

M = TypeVar("M", bound=nn.Module)

_TEXT_MODEL = "text_model."


def fill(make: Callable[[], M], weights: Mapping[str, Tensor], dtype: torch.dtype, path: Path) -> M:
    """Make a model and give it ``weights`` by name, as ``dtype``; weights that it does not know are left out.

    Raises:
        BaseModelError: a weight is missing, or has another shape.
    """
    with init_empty_weights(include_buffers=False):
        model = make()
    expected = model.state_dict()
    missing = sorted(expected.keys() - weights.keys())
    if missing:
        raise BaseModelError(
            f"{path} is incomplete: {len(missing)} weights are missing ({missing[0]}, ...). Get it again."
        )
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise BaseModelError(
                f"In {path} the weight {name} has shape {list(weights[name].shape)}, expected {list(tensor.shape)}. "
                "It is a kind of model that is not known here: choose another base model."
            )
    model.load_state_dict({name: weights[name].to(dtype).contiguous() for name in expected}, assign=True)
    return model.requires_grad_(False).eval()


def clip_weights(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Rename OpenAI's CLIP behind ``prefix``: everything behind ``text_model.``, as transformers 4 has it."""
    return {
        _TEXT_MODEL + name.removeprefix(prefix).removeprefix(_TEXT_MODEL): tensor for name, tensor in weights.items()
    }


def open_clip_weights(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Rename OpenCLIP's text tower behind ``prefix`` and split its attention matrices."""
    width = weights[f"{prefix}positional_embedding"].shape[-1]
    # diffusers asks the model for nothing but its width, and leaves out the last layer of SD2's by its full name.
    inner = {f"model.{name.removeprefix(prefix)}": tensor for name, tensor in weights.items()}
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
    renamed: dict[str, Tensor] = convert_open_clip_checkpoint(model, inner, prefix="model.")
    return renamed


def named_for(make: Callable[[], nn.Module], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename text weights for the installed transformers, whose CLIPTextModel lacks ``text_model.`` from 5.6 on."""
    with torch.device("meta"):
        expected: Mapping[str, Any] = make().state_dict()
    return {name if name in expected else name.removeprefix(_TEXT_MODEL): tensor for name, tensor in weights.items()}


def tiny_vae_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename TAESD (without prefix); its decoder counts a first layer that has no weights."""
    renamed = {}
    for name, tensor in weights.items():
        part, _, rest = name.partition(".")
        number, _, rest = rest.partition(".")
        if part == "taesd_encoder":
            renamed[f"encoder.layers.{number}.{rest}"] = tensor
        elif part == "taesd_decoder":
            renamed[f"decoder.layers.{int(number) - 1}.{rest}"] = tensor
    return renamed
