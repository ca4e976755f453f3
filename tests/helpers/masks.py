"""Masks, what is left of them at a layer, and layers that add what users do times a mask: written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from kinds_by_hand import GatedBranch, user_tokens
from torch import Tensor

from comfyui_psa.adapter import PSAAdapter, find_sites

SCALE = 8  # pixels of a picture for one of a latent


def left_half(height: int, width: int) -> Tensor:
    """``[1, height, width]``: 1 in the left half, 0 in the right one."""
    mask = torch.zeros(1, height, width)
    mask[..., : width // 2] = 1
    return mask


def soft(height: int, width: int, seed: int = 0) -> Tensor:
    """A mask in which nothing is alike, ``[1, height, width]``."""
    return torch.rand(1, height, width, generator=torch.Generator().manual_seed(seed))


def in_pixels(mask: Tensor) -> Tensor:
    """A mask of a latent as one of its picture."""
    return mask.repeat_interleave(SCALE, dim=1).repeat_interleave(SCALE, dim=2)


def at_layer(mask: Tensor, height: int, width: int) -> Tensor:
    """``[height, width]`` of a layer: each position is the mean of what it covers of ``mask`` ``[h, w]``."""
    high, wide = mask.shape
    rows = []
    for y in range(height):
        top, bottom = y * high // height, -(-(y + 1) * high // height)
        row = []
        for x in range(width):
            left, right = x * wide // width, -(-(x + 1) * wide // width)
            row.append(mask[top:bottom, left:right].mean())
        rows.append(torch.stack(row))
    return torch.stack(rows)


Added = Callable[[int, Tensor], Tensor]  # a site and its input ``[positions, hidden]``, to what it adds


def with_layers_by_hand(model: ModelPatcher, added: Mapping[int, Added], masks: Tensor) -> ModelPatcher:
    """A model in which what layers add is multiplied with masks.

    ``added`` is what they add to each chunk, by its number (0: the user's); ``masks`` is ``[images, h, w]`` of what the
    model sees.
    """
    index = {site.key: i for i, site in enumerate(find_sites(model.model.diffusion_model))}

    def receive(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        options["by_hand"] = n
        return n, context, value

    def add(out: Tensor, options: dict[str, Any]) -> Tensor:
        site = index[(*options["block"], options["block_index"])]
        height, width = options["activations_shape"][-2:]
        images = len(out) // len(options["cond_or_uncond"])
        out = out.clone()
        for row in range(len(out)):
            chunk = options["cond_or_uncond"][row // images]
            if chunk in added:
                weight = at_layer(masks[row % images], height, width).reshape(-1, 1)
                out[row] += (weight.to(out) * added[chunk](site, options["by_hand"][row])).to(out)
        return out

    patched = model.clone()
    patched.set_model_attn2_patch(receive)
    patched.set_model_attn2_output_patch(add)
    return patched


def constant_by_hand(model: ModelPatcher, adapter: PSAAdapter, embedding: Tensor) -> Added:
    """What the paper's layers add for a user, ``[embedding_dim]``."""
    projection = adapter.user_proj
    standardised = (embedding - adapter.embedding_mean) / adapter.embedding_std
    token = F.layer_norm(
        F.linear(standardised, projection.proj.weight, projection.proj.bias),
        projection.norm.weight.shape,
        projection.norm.weight,
        projection.norm.bias,
    )
    weights = _to_out(model)
    return lambda site, n: (
        weights(site) @ F.linear(token, adapter.get_parameter(f"sites.{site}.to_v_user.weight")).double()
    ).expand(len(n), -1)


def gated_by_hand(model: ModelPatcher, adapter: PSAAdapter, embedding: Tensor) -> Added:
    """What gates add for a user, ``[embedding_dim]``."""
    projection = {name.removeprefix("gated_user_proj."): v.double() for name, v in adapter.state_dict().items()}
    user = user_tokens(projection, adapter, embedding)
    weights = _to_out(model)
    return lambda site, n: (
        GatedBranch(adapter.gated_sites[site].state_dict(), [user])._added(n.cpu().double(), user) @ weights(site).T
    )


def _to_out(model: ModelPatcher) -> Callable[[int], Tensor]:
    sites = find_sites(model.model.diffusion_model)
    unet = model.model.diffusion_model
    return lambda site: unet.get_submodule(f"{sites[site].path}.to_out.0").weight.detach().cpu().double()
