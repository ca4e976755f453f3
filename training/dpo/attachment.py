"""The adapter on a diffusers UNet: what it adds at each cross-attention layer, in front of ``to_out``.

A forward pre-hook on ``to_out[0]`` adds it, so whatever computes the attention (SDPA, xformers, a compiled
graph) stays as it is; gates also read the layer's input, which a pre-hook on the layer itself takes down. With nothing
applied the UNet is, bit for bit, the base: that is the DPO reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...adapter import Site, SiteGate

Hook = Callable[[nn.Module, tuple[Any, ...]], "tuple[Any, ...] | None"]


class Attachment:
    """Hooks on the cross-attention layers of one UNet, and what they add now."""

    def __init__(self, unet: nn.Module, sites: Sequence[Site]) -> None:
        """Hook into ``sites`` of ``unet``; nothing changes until something is applied."""
        self._vectors: tuple[Tensor, ...] = ()
        self._gates: tuple[SiteGate, ...] = ()
        self._inputs: dict[int, Tensor] = {}
        self._handles = []
        for i, site in enumerate(sites):
            attention, to_out = unet.get_submodule(site.path), unet.get_submodule(f"{site.path}.to_out.0")
            self._handles.append(attention.register_forward_pre_hook(self._look(i)))
            self._handles.append(to_out.register_forward_pre_hook(self._add(i)))

    @contextmanager
    def applied(self, vectors: Sequence[Tensor] = (), gates: Sequence[SiteGate] = ()) -> Iterator[None]:
        """Within the block, add at site ``i`` the vectors ``[batch, hidden_i]``, and what the gate gives.

        With gradient checkpointing the backward pass runs layers again: it belongs into the block too.
        """
        self._vectors, self._gates = tuple(vectors), tuple(gates)
        try:
            yield
        finally:
            self._vectors, self._gates = (), ()
            self._inputs.clear()

    def remove(self) -> None:
        """Take the hooks off the UNet."""
        for handle in self._handles:
            handle.remove()

    def _look(self, index: int) -> Hook:
        def look(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._gates:
                self._inputs[index] = args[0]  # [batch, positions, hidden]

        return look

    def _add(self, index: int) -> Hook:
        def add(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not self._vectors and not self._gates:
                return None
            hidden, *others = args  # [batch, positions, hidden]
            if self._vectors:
                hidden = hidden + self._vectors[index].to(hidden.dtype)[:, None]
            if self._gates:
                hidden = hidden + self._gates[index].to(hidden.dtype)(self._inputs.pop(index))
            return hidden, *others

        return add
