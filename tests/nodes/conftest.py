"""Fixtures of the node tests: a tiny SD1.x model, an adapter in the published format, users."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_testing import TINY, baked, comfy_model, site_paths, unet_weights
from torch import Tensor

from comfyui_psa.adapter import PSAAdapter, find_sites, load_adapter
from comfyui_psa.profiles import SafetyEmbedding
from comfyui_psa.training.synthetic import write_release_adapter

EMBEDDING_DIM = 12

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def weights() -> dict[str, Tensor]:
    return unet_weights(TINY)


@pytest.fixture(scope="session")
def model(weights: dict[str, Tensor]) -> ModelPatcher:
    return comfy_model(weights)


@pytest.fixture(scope="session")
def adapter_path(model: ModelPatcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "psa_adapter.bin"
    sizes = tuple(site.hidden_size for site in find_sites(model.model.diffusion_model))
    write_release_adapter(path, sizes, TINY.context_dim, EMBEDDING_DIM)
    return path


@pytest.fixture(scope="session")
def adapter(adapter_path: Path) -> PSAAdapter:
    return load_adapter(adapter_path)


@pytest.fixture(scope="session")
def users() -> Callable[..., SafetyEmbedding]:
    """Embeddings of simulated users by number: ``users(0, 3)`` are two."""

    def make(*numbers: int) -> SafetyEmbedding:
        rows = [torch.randn(EMBEDDING_DIM, generator=torch.Generator().manual_seed(n)) for n in numbers]
        return SafetyEmbedding(torch.stack(rows))

    return make


@pytest.fixture(scope="session")
def paths(model: ModelPatcher) -> list[str]:
    return site_paths(model)


@pytest.fixture(scope="session")
def expected_halves(
    weights: dict[str, Tensor], paths: list[str], adapter: PSAAdapter, users: Callable[..., SafetyEmbedding]
) -> Any:
    """Two models without PSA: one bakes in user 0, the other the null user."""

    def make(weights: dict[str, Tensor] = weights) -> tuple[ModelPatcher, ModelPatcher]:
        user = users(0).vectors[0]
        return (
            comfy_model(baked(weights, paths, adapter, user)),
            comfy_model(baked(weights, paths, adapter, torch.zeros_like(user))),
        )

    return make
