"""Real ComfyUI models with random weights, in this process, and one call of the sampler on them."""

from __future__ import annotations

from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.samplers
import comfy.supported_models
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from comfyui_psa.adapter import PSAAdapter, find_sites
from comfyui_psa.training.synthetic import UNetShape, random_weights, unet_shapes

DEVICE = comfy.model_management.get_torch_device()  # the CPU, unless PSA_TEST_DEVICE says otherwise
CPU = torch.device("cpu")
TINY = UNetShape(channels=32, channel_mult=(1, 2, 2), transformer_depth=(1, 2, 0), context_dim=24)
TINY_SDXL = UNetShape(32, (1, 2, 2), 2, (0, 2, 3), 3, 40, True, 6 * 256 + 16)
TIMESTEP = 500


def unet_weights(shape: UNetShape = TINY, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights in ComfyUI's names; biases and norms are random too, so that nothing cancels by luck."""
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(unet_shapes(shape), generator)
    for name, weight in weights.items():
        if weight.ndim == 1:
            weights[name] = weight + 0.3 * torch.randn(weight.shape, generator=generator)
    return {name: weight.to(dtype) for name, weight in weights.items()}


def comfy_model(
    weights: dict[str, Tensor], dtype: torch.dtype = torch.float32, manual_cast: torch.dtype | None = None
) -> ModelPatcher:
    """A ComfyUI model of any size: SD1.x, or SDXL where the weights have a label embedding."""
    config = comfy.model_detection.detect_unet_config(dict(weights), "")
    sdxl = "label_emb.0.0.weight" in weights
    extra = {"num_heads": -1, "num_head_channels": 16} if sdxl else {"num_heads": 4, "num_head_channels": -1}
    family = comfy.supported_models.SDXL if sdxl else comfy.supported_models.SD15
    model_config = family(config | extra)
    model_config.unet_config |= extra
    model_config.set_inference_dtype(dtype, manual_cast)
    model = model_config.get_model({}, "")
    model.load_model_weights(dict(weights), "")
    return ModelPatcher(model, load_device=DEVICE, offload_device=CPU)


def conditioning(shape: UNetShape, seed: int, tokens: int = 5, **options: Any) -> list[list[Any]]:
    """A text conditioning of random tokens, as CLIP Text Encode gives it."""
    generator = torch.Generator().manual_seed(seed)
    extra: dict[str, Any] = {}
    if shape.adm_channels:
        extra["pooled_output"] = torch.randn(1, shape.adm_channels - 6 * 256, generator=generator)
    return [[torch.randn(1, tokens, shape.context_dim, generator=generator), extra | options]]


def noise(*shape: int, seed: int = 7) -> Tensor:
    """A latent of noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sigma_at(model: ModelPatcher, timestep: int = TIMESTEP) -> float:
    """The sigma of a training timestep."""
    return float(model.model.model_sampling.sigmas[timestep])


def device_of(model: ModelPatcher) -> torch.device:
    """Where the weights are now."""
    return next(model.model.parameters()).device


@torch.no_grad()
def denoise(
    model: ModelPatcher,
    positive: list[list[Any]],
    negative: list[list[Any]],
    latent: Tensor,
    cfg: float = 1.0,
    sigmas: tuple[float, ...] | None = None,
    guider: comfy.samplers.CFGGuider | None = None,
) -> Tensor:
    """What the model predicts for ``latent`` (already noisy) inside a real sampling run.

    With several ``sigmas`` the predictions of all of them are stacked.
    """
    steps = sigmas or (sigma_at(model),)

    def sampler_function(
        wrapped: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
    ) -> Tensor:
        ones = x.new_ones(x.shape[0])
        predicted = [wrapped(latent.to(x), sigma * ones, **(extra_args or {})) for sigma in sigmas[:-1]]
        return predicted[0] if len(predicted) == 1 else torch.cat(predicted)

    guider = guider or comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    sampler = comfy.samplers.KSAMPLER(sampler_function)
    schedule = torch.tensor([*steps, 0.0])
    raw = guider.sample(latent, torch.zeros_like(latent), sampler, schedule, disable_pbar=True, seed=0)
    return model.model.process_latent_in(raw).cpu()


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest value: 2e-5 and less is float32 rounding."""
    return float((a - b).abs().max() / b.abs().max())


ROUNDING = 2e-5


def site_paths(model: ModelPatcher) -> list[str]:
    """The module paths of the cross-attention layers."""
    return [site.path for site in find_sites(model.model.diffusion_model)]


def baked(weights: dict[str, Tensor], paths: list[str], adapter: PSAAdapter, embedding: Tensor) -> dict[str, Tensor]:
    """The weights of a model that treats everything as PSA would treat this one user."""
    changed = dict(weights)
    projection = adapter.user_proj
    token = F.layer_norm(
        F.linear(embedding, projection.proj.weight, projection.proj.bias),
        (TINY.context_dim,),
        projection.norm.weight,
        projection.norm.bias,
    )
    for i, path in enumerate(paths):
        value = F.linear(token, adapter.get_parameter(f"sites.{i}.to_v_user.weight"))
        bias, weight = f"{path}.to_out.0.bias", f"{path}.to_out.0.weight"
        changed[bias] = weights[bias] + (weights[weight].double() @ value.double()).float()
    return changed
