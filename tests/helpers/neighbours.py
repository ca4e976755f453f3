"""What stands beside PSA, as small as it can be: IPAdapter and Attention Couple in attention, a ControlNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ops
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from comfy_testing import DEVICE, TINY, conditioning
from torch import Tensor

from comfyui_psa.adapter import find_sites


def like_ip_adapter(patcher: ModelPatcher, paths: list[str]) -> ModelPatcher:
    """Take the attn2_replace slot of every block: attention over the text plus over an image's tokens."""

    def replace(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        heads = extra_options["n_heads"]
        generator = torch.Generator().manual_seed(q.shape[-1])
        image_k, image_v = torch.randn(2, 1, 4, q.shape[-1], generator=generator).to(q)

        def attend(keys: Tensor, values: Tensor) -> Tensor:
            parts = [tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (q, keys, values)]
            return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)

        return attend(k, v) + 0.7 * attend(image_k.expand(q.shape[0], -1, -1), image_v.expand(q.shape[0], -1, -1))

    patched = patcher.clone()
    for site in find_sites(patcher.model.diffusion_model):
        patched.set_model_attn2_replace(replace, *site.key)
    return patched


def like_stored_prompts(patcher: ModelPatcher, text: Tensor) -> ModelPatcher:
    """Take the attn2_replace slot of every block, and attend to a prompt of its own instead of what it is given."""
    patched = patcher.clone()
    for site in find_sites(patcher.model.diffusion_model):
        attention = patcher.model.diffusion_model.get_submodule(site.path)

        def replace(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any], module: Any = attention) -> Tensor:
            context = text.to(q).expand(q.shape[0], -1, -1)
            parts = (q, module.to_k(context), module.to_v(context))
            query, key, value = (part.unflatten(-1, (module.heads, -1)).transpose(1, 2) for part in parts)
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

        patched.set_model_attn2_replace(replace, *site.key)
    return patched


def like_attention_couple(
    patcher: ModelPatcher, change: Callable[[Tensor], Tensor] = lambda text: text, base_strength: float = 1.0
) -> ModelPatcher:
    """Run conditional chunks twice, with the prompt (times ``base_strength``) and with another one, and mix."""
    other = change(conditioning(TINY, 9)[0][0])

    def expand(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        chunks = extra_options["cond_or_uncond"]
        kinds: list[int] = []
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for kind, *qkv in zip(chunks, *(tensor.chunk(len(chunks)) for tensor in (q, k, v)), strict=True):
            weight = base_strength if kind == 0 else 1.0
            parts.append((qkv[0], qkv[1] * weight, qkv[2] * weight))
            kinds.append(kind)
            if kind == 0:
                context = other.to(q).expand(qkv[0].shape[0], -1, -1)
                parts.append((qkv[0], context, context))
                kinds.append(kind)
        extra_options["cond_or_uncond_couple"] = kinds
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]

    def contract(out: Tensor, extra_options: dict[str, Any]) -> Tensor:
        kinds = extra_options["cond_or_uncond_couple"]
        chunks = list(out.chunk(len(kinds)))
        mixed = []
        while chunks:
            kind, chunk = kinds[len(kinds) - len(chunks)], chunks.pop(0)
            mixed.append(chunk * 0.25 + chunks.pop(0) * 0.75 if kind == 0 else chunk)
        return torch.cat(mixed)

    patched = patcher.clone()
    patched.set_model_attn2_patch(expand)
    patched.set_model_attn2_output_patch(contract)
    return patched


def controlnet(patcher: ModelPatcher, size: tuple[int, int]) -> comfy.controlnet.ControlNet:
    """A ControlNet of random weights for a model, with a picture of height and width ``size`` as its hint."""
    unet = patcher.model.model_config.unet_config
    config = {name: value for name, value in unet.items() if name not in ("out_channels", "transformer_depth_output")}
    network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(8)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    control = comfy.controlnet.ControlNet(network, load_device=DEVICE, manual_cast_dtype=torch.float32)
    return control.set_cond_hint(torch.rand(1, 3, *size, generator=generator), 1.0)
