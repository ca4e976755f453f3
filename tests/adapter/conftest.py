"""Fixtures of the adapter tests: adapters with random weights, in memory and in the published format."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import comfy.cli_args

comfy.cli_args.args.cpu = True

import pytest  # noqa: E402
import torch  # noqa: E402

from comfyui_psa.adapter import AdapterConfig, EncoderSpec, PSAAdapter  # noqa: E402
from comfyui_psa.training.synthetic import write_release_adapter  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def random_adapter() -> Callable[..., PSAAdapter]:
    """``random_adapter(hidden_sizes=..., ...)``: an adapter in which nothing is zero or one by chance."""

    def make(seed: int = 0, **fields: Any) -> PSAAdapter:
        values: dict[str, Any] = {
            "hidden_sizes": (8, 16, 24),
            "cross_attention_dim": 12,
            "embedding_dim": 10,
            "encoder": EncoderSpec(kind="attributes", name="1"),
        }
        adapter = PSAAdapter(AdapterConfig(**values | fields)).requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return adapter

    return make


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A small adapter of three layers in the published format, keys included."""
    path = tmp_path / "psa_adapter.bin"
    write_release_adapter(path, (8, 16, 24), 12, 10)
    return path


@pytest.fixture
def full_disk() -> Callable[[], AbstractContextManager[None]]:
    """``with full_disk():`` the system refuses to write more than a few bytes to any file."""

    @contextmanager
    def limited() -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
