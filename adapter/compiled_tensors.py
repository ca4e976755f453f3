"""What a compiled profile says about itself, and its tensors by name: from an effect of one person, and back.

    constant    ``constant.user`` and, if the adapter has a null user, ``constant.null``: ``[sum of hidden sizes]``
    gated       ``gated.scores`` ``[sum of hidden sizes, columns]``, ``gated.values`` ``[columns, sum of hidden
                sizes]``, ``gated.sinks`` ``[sites, heads]``
    text        of ``text.tokens.`` and ``text.pooled.``: ``norm``, ``norm_bias``, then ``scores`` ``[dim, columns]``,
                ``values`` ``[columns, dim]``, ``sink`` (form "attention"), or ``to_hidden`` ``[inner, dim]``,
                ``biases`` ``[parts, inner]``, ``shares`` ``[parts]``, ``to_out`` ``[dim, inner]`` (form "mlp")

At layers all is in front of ``to_out``, so that a LoRA on the base acts as it does beside the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field, PositiveInt, StringConstraints, model_validator
from torch import Tensor

from .adapter import UserEffect
from .config import AdapterConfig, Base, NullMode, Spec
from .constant import SiteVectors
from .gated import SiteGate
from .text import TextGate, TextResidual, TextShift, UserText

_Category = Annotated[str, StringConstraints(min_length=1, max_length=100)]


class GateSize(Spec):
    """Heads of a gate, and their tokens: ``columns`` is heads times tokens."""

    heads: PositiveInt
    columns: PositiveInt

    @model_validator(mode="after")
    def _divides(self) -> GateSize:
        if self.columns % self.heads:
            raise ValueError(f"{self.heads} heads do not divide {self.columns} columns")
        return self


class ShiftSize(Spec):
    """The inner width of a text side of the form "mlp", and how many people were mixed."""

    inner_dim: PositiveInt
    parts: PositiveInt


class CompiledSpec(Base):
    """What a compiled profile says about itself: nothing about the person, unless they agree.

    ``adapter`` is the hash of the adapter, ``null`` what its unconditional half gets. ``categories`` are the banned
    ones; None if the owner keeps them.
    """

    constant: bool
    null: NullMode
    gated: GateSize | None = None
    text: GateSize | ShiftSize | None = None
    pooled_dim: PositiveInt | None = None
    adapter: str = Field(pattern=r"^[0-9a-f]{64}$")
    categories: tuple[_Category, ...] | None = None

    @model_validator(mode="after")
    def _acts(self) -> CompiledSpec:
        self.check_acts(self.constant, self.gated, self.text, self.null)
        if self.pooled_dim and not self.text:
            raise ValueError("it changes pooled text, and no text")
        return self


def described(
    config: AdapterConfig, effect: UserEffect, adapter: str, categories: tuple[str, ...] | None
) -> CompiledSpec:
    """Return the description of an effect of one person; ``adapter`` is the hash of the one with this ``config``."""
    return CompiledSpec(
        base=config.base,
        hidden_sizes=config.hidden_sizes,
        cross_attention_dim=config.cross_attention_dim,
        constant=effect.constant is not None,
        null="none" if effect.constant is None or effect.constant.null is None else "zero_embedding",
        gated=_gate_size(effect.gated[0]) if effect.gated else None,
        text=_text_size(effect.text.on_tokens) if effect.text else None,
        pooled_dim=effect.text.pooled_dim if effect.text else None,
        adapter=adapter,
        categories=categories,
    )


def shapes(spec: CompiledSpec) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors that belong to a description."""
    width = sum(spec.hidden_sizes)
    found: dict[str, tuple[int, ...]] = {}
    if spec.constant:
        found["constant.user"] = (width,)
        if spec.null == "zero_embedding":
            found["constant.null"] = (width,)
    if spec.gated:
        found["gated.scores"] = (width, spec.gated.columns)
        found["gated.values"] = (spec.gated.columns, width)
        found["gated.sinks"] = (spec.num_sites, spec.gated.heads)
    if spec.text:
        found |= _text_shapes(spec.text, "text.tokens.", spec.cross_attention_dim)
        if spec.pooled_dim:
            found |= _text_shapes(spec.text, "text.pooled.", spec.pooled_dim)
    return found


def pack(effect: UserEffect) -> dict[str, Tensor]:
    """Return the tensors of an effect of one person."""
    found: dict[str, Tensor] = {}
    if effect.constant:
        found["constant.user"] = torch.cat([user[0] for user in effect.constant.user])
        if effect.constant.null is not None:
            found["constant.null"] = torch.cat(effect.constant.null)
    if effect.gated:
        found["gated.scores"] = torch.cat([gate.scores[0] for gate in effect.gated])
        found["gated.values"] = torch.cat([gate.values[0] for gate in effect.gated], dim=1)
        found["gated.sinks"] = torch.stack([gate.sink for gate in effect.gated])
    if effect.text:
        found |= _pack_text(effect.text.on_tokens, "text.tokens.")
        if effect.text.on_pooled:
            found |= _pack_text(effect.text.on_pooled, "text.pooled.")
    return found


def unpack(tensors: Mapping[str, Tensor], spec: CompiledSpec) -> UserEffect:
    """Return the effect of one person whose tensors have the ``shapes`` of ``spec``."""
    sizes = list(spec.hidden_sizes)
    constant, gated, text = None, None, None
    if spec.constant:
        null = torch.split(tensors["constant.null"], sizes) if "constant.null" in tensors else None
        constant = SiteVectors(tuple(user[None] for user in torch.split(tensors["constant.user"], sizes)), null)
    if spec.gated:
        parts = zip(
            torch.split(tensors["gated.scores"], sizes),
            torch.split(tensors["gated.values"], sizes, dim=1),
            tensors["gated.sinks"],
            strict=True,
        )
        gated = tuple(SiteGate(scores[None].clone(), values[None].contiguous(), sink) for scores, values, sink in parts)
    if spec.text:
        pooled = _unpack_text(tensors, "text.pooled.", spec.text) if spec.pooled_dim else None
        text = UserText(_unpack_text(tensors, "text.tokens.", spec.text), pooled)
    return UserEffect(constant, gated, text)


def _gate_size(gate: SiteGate) -> GateSize:
    return GateSize(heads=len(gate.sink), columns=gate.scores.shape[-1])


def _text_size(residual: TextResidual) -> GateSize | ShiftSize:
    if isinstance(residual, TextGate):
        return _gate_size(residual.gate)
    return ShiftSize(inner_dim=residual.biases.shape[2], parts=residual.biases.shape[1])


def _text_shapes(size: GateSize | ShiftSize, prefix: str, dim: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"norm": (dim,), "norm_bias": (dim,)}
    if isinstance(size, GateSize):
        found |= {"scores": (dim, size.columns), "values": (size.columns, dim), "sink": (size.heads,)}
    else:
        inner, parts = size.inner_dim, size.parts
        found |= {"to_hidden": (inner, dim), "biases": (parts, inner), "shares": (parts,), "to_out": (dim, inner)}
    return {prefix + name: shape for name, shape in found.items()}


def _pack_text(residual: TextResidual, prefix: str) -> dict[str, Tensor]:
    found = {"norm": residual.norm, "norm_bias": residual.norm_bias}
    if isinstance(residual, TextGate):
        gate = residual.gate
        found |= {"scores": gate.scores[0], "values": gate.values[0], "sink": gate.sink}
    else:
        found |= {"to_hidden": residual.to_hidden, "biases": residual.biases[0], "shares": residual.shares[0]}
        found["to_out"] = residual.to_out
    return {prefix + name: value for name, value in found.items()}


def _unpack_text(tensors: Mapping[str, Tensor], prefix: str, size: GateSize | ShiftSize) -> TextResidual:
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if isinstance(size, GateSize):
        gate = SiteGate(own["scores"][None], own["values"][None], own["sink"])
        return TextGate(own["norm"], own["norm_bias"], gate)
    own |= {"biases": own["biases"][None], "shares": own["shares"][None]}
    return TextShift(**own)
