"""The adapter on a diffusers UNet: one vector per cross-attention layer, in front of ``to_out``.

A forward pre-hook on ``to_out[0]`` adds it, so whatever computes the attention (SDPA, xformers, a compiled
graph) stays as it is. Without vectors the UNet is, bit for bit, the base: that is the DPO reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...adapter import Site

Hook = Callable[[nn.Module, tuple[Any, ...]], "tuple[Any, ...] | None"]


class Attachment:
    """Hooks on the cross-attention layers of one UNet, and the vectors that they add now."""

    def __init__(self, unet: nn.Module, sites: Sequence[Site]) -> None:
        """Hook into ``sites`` of ``unet``; nothing changes until vectors are applied."""
        self._vectors: tuple[Tensor, ...] | None = None
        self._handles = [
            unet.get_submodule(f"{site.path}.to_out.0").register_forward_pre_hook(self._hook(i))
            for i, site in enumerate(sites)
        ]

    @contextmanager
    def applied(self, vectors: Sequence[Tensor]) -> Iterator[None]:
        """Add ``vectors[i]``, ``[batch, hidden_i]``, at site ``i`` within the block.

        With gradient checkpointing the backward pass runs layers again: it belongs into the block too.
        """
        self._vectors = tuple(vectors)
        try:
            yield
        finally:
            self._vectors = None

    def remove(self) -> None:
        """Take the hooks off the UNet."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, index: int) -> Hook:
        def add(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self._vectors is None:
                return None
            hidden, *others = args  # [batch, tokens, hidden]
            return hidden + self._vectors[index].to(hidden.dtype)[:, None], *others

        return add
