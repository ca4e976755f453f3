"""What is trained and what it is compared with: one frozen UNet with an adapter attached, or without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from ...adapter import PSAAdapter, find_sites
from ..config import ModelSection
from ..errors import TrainingError
from .attachment import Attachment
from .denoising import PairBatch, pair_errors
from .loss import PairErrors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Vectors = Callable[[Tensor, Tensor], "tuple[Tensor, ...]"]


class Policy:
    """The UNet with and without the adapter. The UNet is there once: without vectors it is the reference."""

    def __init__(self, unet: UNet2DConditionModel, scheduler: DDPMScheduler, adapter: PSAAdapter) -> None:
        """Attach to ``unet``, which is frozen; raise AdapterError if ``adapter`` is for another one."""
        sites = find_sites(unet)
        adapter.check_sites(sites)
        self.unet = unet.requires_grad_(False).eval()
        self.scheduler = scheduler
        self._attachment = Attachment(unet, sites)

    @torch.no_grad()
    def reference_errors(self, batch: PairBatch) -> PairErrors:
        """Return the errors of the base model, ``[pairs]`` each."""
        return pair_errors(self.unet, self.scheduler, batch)

    @contextmanager
    def errors(self, vectors: nn.Module | Vectors, batch: PairBatch) -> Iterator[PairErrors]:
        """Yield the errors with each pair's user; the backward pass belongs into the block."""
        values = vectors(batch.embedding, batch.dropped)
        with self.applied([value.repeat(2, 1) for value in values]):
            yield pair_errors(self.unet, self.scheduler, batch)

    @contextmanager
    def applied(self, vectors: Sequence[Tensor]) -> Iterator[None]:
        """Let the UNet add ``vectors[i]``, ``[batch, hidden_i]``, at site ``i`` within the block."""
        with self._attachment.applied(vectors):
            yield


def configure_unet(unet: UNet2DConditionModel, section: ModelSection) -> None:
    """Switch on what the configuration asks for: xformers, gradient checkpointing.

    Raises:
        TrainingError: xformers is not installed, or not for this device.
    """
    if section.attention == "xformers":
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise TrainingError(
                f'model.attention = "xformers" cannot be used here ({reason}). Install xformers for this torch on a '
                'machine with CUDA, or use "sdpa", which torch has built in.'
            ) from None
    if section.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
