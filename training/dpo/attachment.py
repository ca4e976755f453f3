"""The adapter on a diffusers UNet: what it adds at each cross-attention layer, in front of ``to_out``.

A forward pre-hook on ``to_out[0]`` adds it, so whatever computes the attention (SDPA, xformers, a compiled
graph) stays as it is; gates also read the layer's input, which a pre-hook on the layer itself takes down. With nothing
applied the UNet is, bit for bit, the base: the DPO reference, where that does not run along behind the users' pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...adapter import Site, SiteGate

Hook = Callable[[nn.Module, tuple[Any, ...]], "tuple[Any, ...] | None"]


class _Addition(NamedTuple):
    """What is added at one site: a vector ``[users, hidden]``, and what a gate gives; None where there is none."""

    vector: Tensor | None
    gate: SiteGate | None

    def added_to(self, hidden: Tensor, seen: Tensor) -> Tensor:
        """Return the sum; ``seen`` is the layer's input, for the gate. Both are ``[users, positions, hidden]``."""
        if self.vector is not None:
            hidden = hidden + self.vector.to(hidden.dtype)[:, None]
        if self.gate is not None:
            hidden = hidden + self.gate.to(hidden.dtype)(seen)
        return hidden

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.vector, *(self.gate or ())) if tensor is not None]

    def made_of(self, tensors: Iterator[Tensor]) -> _Addition:
        """Return one like it, with its tensors taken from an iterator in the order of ``tensors()``."""
        vector = None if self.vector is None else next(tensors)
        return _Addition(vector, None if self.gate is None else SiteGate(*islice(tensors, len(self.gate))))


class Attachment:
    """Hooks on the cross-attention layers of one UNet, and what they add now."""

    def __init__(self, unet: nn.Module, sites: Sequence[Site]) -> None:
        """Hook into ``sites`` of ``unet``; nothing changes until something is applied."""
        self._additions: tuple[_Addition, ...] = ()
        self._pictures: int | None = None
        self._inputs: dict[int, Tensor] = {}
        self._attentions = [unet.get_submodule(site.path) for site in sites]
        self._sites_in: dict[nn.Module, tuple[int, ...]] = {}
        self._handles = []
        for i, (attention, site) in enumerate(zip(self._attentions, sites, strict=True)):
            to_out = unet.get_submodule(f"{site.path}.to_out.0")
            self._handles.append(attention.register_forward_pre_hook(self._look(i)))
            self._handles.append(to_out.register_forward_pre_hook(self._add(i)))

    @contextmanager
    def applied(
        self, vectors: Sequence[Tensor] = (), gates: Sequence[SiteGate] = (), pictures: int | None = None
    ) -> Iterator[None]:
        """Within the block, add at site ``i`` the vectors ``[batch, hidden_i]``, and what the gate gives.

        With ``pictures`` vectors and gates are those of that many at the beginning of the batch, ``[pictures, ...]``,
        and the others stay the base's.
        With gradient checkpointing the backward pass runs layers again: it belongs into the block too.
        """
        additions = zip_longest(vectors, gates)
        with self._adding(tuple(_Addition(vector, gate) for vector, gate in additions), pictures):
            yield

    @property
    def pictures(self) -> int | None:
        """How many pictures at the beginning of the batch are the users'; None: all."""
        return self._pictures

    def tensors_in(self, block: nn.Module) -> list[Tensor]:
        """Return what is added within a block of the UNet, flat."""
        return [tensor for i in self._within(block) for tensor in self._additions[i].tensors()]

    @contextmanager
    def replaced_in(self, block: nn.Module, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Within the block, add ``tensors`` in place of ``tensors_in(block)``, to all pictures."""
        rest, additions = iter(tensors), list(self._additions)
        for i in self._within(block):
            additions[i] = additions[i].made_of(rest)
        with self._adding(tuple(additions), None):
            yield

    def remove(self) -> None:
        """Take the hooks off the UNet."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def _adding(self, additions: tuple[_Addition, ...], pictures: int | None) -> Iterator[None]:
        before = self._additions, self._pictures
        self._additions, self._pictures = additions, pictures
        try:
            yield
        finally:
            self._additions, self._pictures = before
            self._inputs.clear()

    def _within(self, block: nn.Module) -> tuple[int, ...]:
        """The sites in a block; none where nothing is added."""
        if block not in self._sites_in:
            inside = set(block.modules())
            self._sites_in[block] = tuple(i for i, attention in enumerate(self._attentions) if attention in inside)
        return self._sites_in[block] if self._additions else ()

    def _look(self, index: int) -> Hook:
        def look(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._additions:
                self._inputs[index] = args[0]  # [batch, positions, hidden]

        return look

    def _add(self, index: int) -> Hook:
        def add(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not self._additions:
                return None
            hidden, *others = args  # [batch, positions, hidden]
            addition, seen = self._additions[index], self._inputs.pop(index)
            if self._pictures is None:
                return addition.added_to(hidden, seen), *others
            first, rest = hidden[: self._pictures], hidden[self._pictures :]
            return torch.cat((addition.added_to(first, seen[: self._pictures]), rest)), *others

        return add
