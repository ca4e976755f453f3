"""The text side on a ComfyUI model: prompts become the users' own before they enter the diffusion model.

That happens once per prompt and run, where a guider hands its conditionings over, so all that a step does with them
(areas, chunks, a ControlNet) sees the same text. Every call of the model then looks whether the user's part of its
text is that: what is not, because another node has put in text of its own or has called the model itself, is changed
there. So is what another node puts in inside of a layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..adapter import AdapterError, UserText
from .roles import Options, Roles

_MOST_PROMPTS = 256  # nodes that make new conditionings in every step would fill the memory
_TEXTS = ("c_crossattn", "crossattn_controlnet")

# A text, and how much of the strength or which strength, to the users' version of it.
_Change: TypeAlias = Callable[[Tensor, float], Tensor]


class Changed(NamedTuple):
    """A text, or ``y``, in a call's conditionings, and the patches by which it has been changed."""

    tensor: Tensor
    by: frozenset[str]


class TextSide:
    """Users' versions of the prompts of one run."""

    def __init__(self, key: str, text: UserText, strength: float) -> None:
        """Begin a run of the patch with this key."""
        self._key = key
        self._text = text
        self._strength = strength
        self._lock = threading.Lock()
        self._known: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}
        self._near = text  # on the model's device, for what is changed in every layer of every step

    def conditionings(
        self,
        conds: Sequence[Sequence[Options] | None],
        roles: Roles,
        before: Sequence[Changed],
        factor: float,
        split: Callable[[Options, Options], list[Options]] = lambda cond, own: [own],
    ) -> tuple[list[Sequence[Options] | None], tuple[Changed, ...]]:
        """Return a guider's conditionings with the users' prompts, and what patches have changed in them.

        Args:
            conds: the conditionings; those that are not the user's are given back as they are.
            roles: which of them are the user's.
            before: what other patches have changed in them.
            factor: how much of the strength counts now.
            split: makes of a conditioning and the same with the users' prompt those that take its place.

        Raises:
            AdapterError: a conditioning has no text, or another one that the adapter cannot change.
        """
        changed: list[Changed] = []

        def once(tensor: Tensor, change: _Change) -> Tensor:
            result = self._once(tensor, change, factor)
            by = next((known.by for known in before if known.tensor is tensor), frozenset())
            changed.append(Changed(result, by | {self._key}))
            return result

        def of_user(cond: Options) -> Options:
            if "gligen" in cond:
                raise AdapterError(
                    "A conditioning has GLIGEN boxes. Their text enters the model on a way of its own, and an adapter "
                    "that acts on text cannot change it there. Remove them, or use an adapter of another kind."
                )
            model_conds = dict(cond["model_conds"])
            if "c_crossattn" not in model_conds:
                raise _no_text()
            for name in _TEXTS:
                # A ControlNet may read text of another width, from a text encoder of its own.
                if name in model_conds and (name == _TEXTS[0] or self._fits(model_conds[name].cond)):
                    part = model_conds[name]
                    model_conds[name] = part._copy_with(once(part.cond, self._tokens))
            if self._text.pooled_dim:
                y = model_conds.get("y")
                if y is None:
                    raise self._no_pooled()
                model_conds["y"] = y._copy_with(once(y.cond, self._pooled))
            return {**cond, "model_conds": model_conds}

        ours = [
            [part for cond in entries for part in split(cond, of_user(cond))] if entries and own else entries
            for entries, own in zip(conds, roles, strict=True)
        ]
        return ours, (*before, *changed)  # with a mask, some stay as they were

    def batch(
        self, text: Tensor | None, y: Tensor | None, of_user: Roles, changed: Sequence[Changed], factor: float
    ) -> tuple[Tensor, Tensor | None]:
        """Return the text and ``y`` of a call, of equal chunks of which some are the user's.

        Args:
            text: ``[batch, tokens, dim]``.
            y: ``[batch, dim]``, headed by the pooled text; None for models without.
            of_user: for each chunk whether it is the user's.
            changed: what conditionings have been changed; other text of the user is changed here.
            factor: how much of the strength counts now.

        Raises:
            AdapterError: the call has no text.
        """
        if text is None:
            raise _no_text()
        self._near = self._near.to(text.device)
        known = [part.tensor for part in changed if self._key in part.by]
        text = _mapped(text, of_user, known, lambda part: self._tokens(part, factor))
        if self._text.pooled_dim:
            if y is None:
                raise self._no_pooled()
            y = _mapped(y, of_user, known, lambda part: self._pooled(part, factor))
        return text, y

    def put_in(self, context: Tensor, which: Roles, factor: float) -> Tensor:
        """Return the text of a batch inside a layer, ``[batch, tokens, dim]``, with these of its chunks changed."""
        return _mapped(context, which, (), lambda part: self._tokens(part, factor, self._near))

    def _fits(self, text: Tensor) -> bool:
        return text.shape[-1] == self._text.text_dim

    def _once(self, tensor: Tensor, change: _Change, factor: float) -> Tensor:
        key = id(tensor), factor
        with self._lock:
            if key not in self._known:
                self._known = {other: found for other, found in self._known.items() if other[1] == factor}  # a new step
                if len(self._known) >= _MOST_PROMPTS:
                    self._known.clear()
                # The prompt is kept beside its change, so that its id stays its own.
                self._known[key] = tensor, change(tensor, factor)
            return self._known[key][1]

    def _tokens(self, text: Tensor, factor: float, user: UserText | None = None) -> Tensor:
        user = user or self._text
        if not self._fits(text):
            raise AdapterError(
                f"The prompt is text of width {text.shape[-1]}, and this adapter changes text of width "
                f"{self._text.text_dim}. Connect the text encoder (CLIP) of the adapter's family."
            )
        return self._at(user.device, user.tokens, text, factor)

    def _pooled(self, y: Tensor, factor: float) -> Tensor:
        width = self._text.pooled_dim
        if width is None or y.shape[1] < width:
            raise self._no_pooled()
        head = self._at(self._text.device, self._text.pooled, y[:, :width], factor)
        # ComfyUI puts sizes and crop behind the pooled text.
        return torch.cat((head, y[:, width:].expand(len(head), -1)), dim=1)

    @torch.no_grad()
    def _at(self, device: torch.device, change: _Change, text: Tensor, factor: float) -> Tensor:
        """Compute on a device, and come back to the text's."""
        return change(text.to(device), factor * self._strength).to(text.device)

    def _no_pooled(self) -> AdapterError:
        return AdapterError(
            f"This adapter changes the pooled text of width {self._text.pooled_dim} that SDXL reads beside the "
            "prompt, and the model reads none. Load a checkpoint of the adapter's family."
        )


def _mapped(tensor: Tensor, chosen: Roles, known: Sequence[Tensor], change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change the chosen ones of a tensor's equal chunks, unless they are known."""
    chunks = tensor.chunk(len(chosen))
    if len(chunks) != len(chosen):
        raise AdapterError(
            f"Another node gives the model {len(tensor)} texts for {len(chosen)} parts of a batch, and PSA cannot tell "
            "whose they are. Remove that node."
        )
    wanted = [
        take and not any(_repeats(chunk, other) for other in known) for chunk, take in zip(chunks, chosen, strict=True)
    ]
    if not any(wanted):
        return tensor
    return torch.cat([change(chunk) if take else chunk for chunk, take in zip(chunks, wanted, strict=True)])


def _repeats(tensor: Tensor, other: Tensor) -> bool:
    """Return whether ``tensor`` is ``other`` as ComfyUI puts it into a batch.

    Rows are repeated up to the number of pictures, tokens up to the length of the longest prompt beside it.
    """
    if tensor.ndim != other.ndim or tensor.shape[-1] != other.shape[-1] or tensor.shape[1] % other.shape[1]:
        return False
    rows = other[torch.arange(len(tensor), device=other.device) % len(other)]
    if tensor.ndim > 2:
        rows = rows.repeat(1, tensor.shape[1] // other.shape[1], 1)
    return torch.equal(tensor, rows.to(tensor))


def _no_text() -> AdapterError:
    return AdapterError(
        "A conditioning reaches the model without text, and this adapter acts on text. Connect a prompt (CLIP Text "
        "Encode), or use an adapter of another kind."
    )
