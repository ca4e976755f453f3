"""Memory for language models, with a pretended GPU: what ComfyUI is asked for, and what is done if it is short."""

from __future__ import annotations

import comfy.model_management as mm
import pytest
import torch

from comfyui_psa.nodes.model_host import ComfyHost

GB = 1024**3


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A CUDA device with 10 GB free once other models are gone; the list holds what was asked to be freed."""
    asked: list[float] = []
    monkeypatch.setattr(mm, "text_encoder_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(mm, "free_memory", lambda size, device, keep_loaded=(): asked.append(size))
    monkeypatch.setattr(mm, "get_free_memory", lambda device: 10 * GB)
    monkeypatch.setattr(mm, "minimum_inference_memory", lambda: 1 * GB)
    return asked


def test_half_precision_on_cuda_and_float32_on_a_cpu(gpu: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    assert ComfyHost().dtype == torch.bfloat16
    monkeypatch.setattr(mm, "text_encoder_device", lambda: torch.device("cpu"))
    assert ComfyHost().dtype == torch.float32


def test_a_model_that_fits_is_loaded_whole(gpu: list[float]) -> None:
    assert ComfyHost().make_room(8 * GB) is None
    assert gpu == [pytest.approx(8 * GB * 1.1 + GB)]


def test_a_larger_model_is_spread_over_gpu_and_memory(gpu: list[float]) -> None:
    memory = ComfyHost().make_room(15 * GB)
    assert memory is not None
    assert memory[0] == 9 * GB
    assert memory["cpu"] > 0
