"""The two nodes of ComfyUI_IPAdapter_plus that an example uses: its inputs and outputs, and its place in attention.

A ComfyUI of the tests loads it as a pack. What it adds to attention is of no use, but it takes the slot that the real
one takes: ``attn2_replace`` of every block.
"""

from __future__ import annotations

from typing import Any

import folder_paths
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from torch import Tensor

BLOCKS = [("input", block) for block in range(12)] + [("middle", 0)] + [("output", block) for block in range(12)]
PRESETS = [
    *("LIGHT - SD1.5 only (low strength)", "STANDARD (medium strength)", "VIT-G (medium strength)"),
    *("PLUS (high strength)", "PLUS FACE (portraits)", "FULL FACE - SD1.5 only (portraits stronger)"),
]
SHARE = {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.001}

folder_paths.add_model_folder_path("ipadapter", f"{folder_paths.models_dir}/ipadapter")


class UnifiedLoader:
    CATEGORY = "ipadapter"
    FUNCTION = "load_models"
    RETURN_TYPES = ("MODEL", "IPADAPTER")
    RETURN_NAMES = ("model", "ipadapter")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("MODEL",), "preset": (PRESETS,)},
            "optional": {"ipadapter": ("IPADAPTER",)},
        }

    def load_models(self, model: ModelPatcher, preset: str, ipadapter: Any = None) -> tuple[ModelPatcher, str]:
        return model, preset


class IPAdapter:
    CATEGORY = "ipadapter"
    FUNCTION = "apply_ipadapter"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "ipadapter": ("IPADAPTER",),
                "image": ("IMAGE",),
                "weight": ("FLOAT", {"default": 1.0, "min": -1, "max": 3, "step": 0.05}),
                "start_at": ("FLOAT", SHARE),
                "end_at": ("FLOAT", SHARE | {"default": 1.0}),
                "weight_type": (["standard", "prompt is more important", "style transfer"],),
            },
            "optional": {"attn_mask": ("MASK",)},
        }

    def apply_ipadapter(self, model: ModelPatcher, image: Tensor, weight: float, **_: Any) -> tuple[ModelPatcher]:
        def replace(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
            direction = torch.randn(q.shape[-1], generator=torch.Generator().manual_seed(0)).to(q)
            return optimized_attention(q, k, v, extra_options["n_heads"]) + weight * image.mean().to(q) * direction

        patched = model.clone()
        for block in BLOCKS:
            patched.set_model_attn2_replace(replace, *block)
        return (patched,)


NODE_CLASS_MAPPINGS = {"IPAdapterUnifiedLoader": UnifiedLoader, "IPAdapter": IPAdapter}
NODE_DISPLAY_NAME_MAPPINGS = {"IPAdapterUnifiedLoader": "IPAdapter Unified Loader"}
