"""Memory for language models, asked from ComfyUI's model management and given back before sampling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ..profiles.encoders import CPUHost
from ..profiles.encoders.llm import MaxMemory


class ComfyHost:
    """Runs a language model where ComfyUI runs text encoders: bfloat16 on CUDA, float32 on the CPU."""

    def __init__(self) -> None:
        """Take ComfyUI's text encoder device as it is now."""
        self.device: torch.device = mm.text_encoder_device()
        self.dtype = torch.float32 if mm.is_device_cpu(self.device) else torch.bfloat16

    def make_room(self, size: int) -> MaxMemory | None:
        """Let ComfyUI unload other models; return a memory map if ``size`` bytes do not fit even then."""
        if mm.is_device_cpu(self.device):
            return CPUHost().make_room(size)
        reserve = mm.minimum_inference_memory()
        mm.free_memory(size * 1.1 + reserve, self.device)
        free = int(mm.get_free_memory(self.device) - reserve)
        if size * 1.1 <= free:
            return None
        in_ram = CPUHost().make_room(size) or {"cpu": size}
        return {self.device.index or 0: max(free, 0), **in_ram}

    def release(self) -> None:
        """Return cached device memory."""
        mm.soft_empty_cache()

    @contextmanager
    def hold(self, model: nn.Module) -> Iterator[None]:
        """Register the model with ComfyUI while it is in use, and take it off the device afterwards."""
        # ComfyUI keeps notes on the module (its device, ...) that a transformers model does not take.
        patcher = ModelPatcher(
            nn.ModuleList([model]), load_device=self.device, offload_device=mm.text_encoder_offload_device()
        )
        mm.load_models_gpu([patcher], force_full_load=True)
        try:
            yield
        finally:
            patcher.detach()
            mm.current_loaded_models[:] = [loaded for loaded in mm.current_loaded_models if loaded.model is not patcher]
