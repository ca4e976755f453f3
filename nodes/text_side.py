"""The text side on a ComfyUI model: prompts become the users' own before they enter the diffusion model.

That happens once per prompt and run, where a guider hands its conditionings over, so all that a step does with them
(areas, chunks, a ControlNet) sees the same text. Calls that come another way are served as well, each for itself.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapter import AdapterError, UserText
from .roles import Options, Roles

_MOST_PROMPTS = 256  # nodes that make new conditionings in every step would fill the memory


class Prompt(NamedTuple):
    """A prompt as a model reads it: ``text`` ``[1 or n, tokens, dim]``; ``pooled`` heads ``y`` where there is one."""

    text: Tensor
    y: Tensor | None


class TextSide:
    """Users' versions of the prompts of one run."""

    def __init__(self, text: UserText, strength: float) -> None:
        """Begin a run."""
        self._text = text
        self._strength = strength
        self._lock = threading.Lock()
        self._known: dict[tuple[int, int], tuple[Prompt, Prompt]] = {}
        self._inserted: dict[tuple[Roles, Roles, int], tuple[bool, ...]] = {}

    def conditionings(self, conds: Sequence[Sequence[Options] | None], roles: Roles) -> list[Sequence[Options] | None]:
        """Return a guider's conditionings with the users' prompts; the others are as they were."""
        return [
            [self._conditioning(cond) for cond in entries] if entries and own else entries
            for entries, own in zip(conds, roles, strict=True)
        ]

    def batch(self, text: Tensor, y: Tensor | None, of_user: Roles) -> Prompt:
        """Return the prompts of a whole batch of equal chunks, each the user's or not."""
        chunks = len(of_user)
        ys: Sequence[Tensor | None] = [None] * chunks if y is None else y.chunk(chunks)
        prompts = map(Prompt, text.chunk(chunks), ys)
        parts = [self._changed(prompt) if own else prompt for prompt, own in zip(prompts, of_user, strict=True)]
        joined = [part.y for part in parts if part.y is not None]
        return Prompt(torch.cat([part.text for part in parts]), torch.cat(joined) if joined else None)

    def beside(self, context: Tensor, given: Tensor, own: Roles, of_user: Roles) -> Tensor:
        """Return the text of a batch that another node has changed inside a layer: all that is the user's, changed.

        Args:
            context: of chunks of which ``of_user`` says whether they are the user's.
            given: what the model was given, changed already where ``own`` says that a chunk is the user's.
        """
        known = [chunk for chunk, mine in zip(given.chunk(len(own)), own, strict=True) if mine]
        key = of_user, own, context.shape[0]
        chunks = context.chunk(len(of_user))
        if key not in self._inserted:  # comparing waits for the device, so only once for each make-up of a batch
            self._inserted[key] = tuple(
                mine and not any(_repeats(chunk, other) for other in known)
                for chunk, mine in zip(chunks, of_user, strict=True)
            )
        return torch.cat(
            [
                self._changed(Prompt(chunk, None), pooled=False).text if new else chunk
                for chunk, new in zip(chunks, self._inserted[key], strict=True)
            ]
        )

    def _conditioning(self, cond: Options) -> Options:
        model_conds = cond["model_conds"]
        if "c_crossattn" not in model_conds:
            raise AdapterError(
                "A conditioning reaches the model without text, and this adapter acts on text. Connect a prompt "
                "(CLIP Text Encode), or use an adapter of another kind."
            )
        text, y = model_conds["c_crossattn"], model_conds.get("y")
        prompt = self._once(Prompt(text.cond, None if y is None else y.cond))
        changed = {"c_crossattn": text._copy_with(prompt.text)}
        if y is not None:
            changed["y"] = y._copy_with(prompt.y)
        return {**cond, "model_conds": {**model_conds, **changed}}

    def _once(self, prompt: Prompt) -> Prompt:
        key = id(prompt.text), id(prompt.y)
        with self._lock:
            if key not in self._known:
                if len(self._known) >= _MOST_PROMPTS:
                    self._known.clear()
                # The prompt is kept beside its change, so that its id stays its own.
                self._known[key] = prompt, self._changed(prompt)
            return self._known[key][1]

    @torch.no_grad()
    def _changed(self, prompt: Prompt, pooled: bool = True) -> Prompt:
        text, y = prompt
        width = self._text.adapter.pooled_dim
        if not width or not pooled:
            return Prompt(self._apply(text, None)[0], y)
        if y is None or y.shape[1] < width:
            raise AdapterError(
                "This adapter changes the pooled text that SDXL reads beside the prompt, and the model reads none. "
                "Load a checkpoint of the adapter's family."
            )
        # ComfyUI puts sizes and crop behind the pooled text.
        text, head = self._apply(text, y[:, :width])
        return Prompt(text, torch.cat((head, y[:, width:].expand(len(head), -1)), dim=1))

    def _apply(self, text: Tensor, pooled: Tensor | None) -> tuple[Tensor, Any]:
        """Compute on the adapter's own device, in float32; come back to the text's."""
        home = self._text.embedding.device
        changed, changed_pooled = self._text(text.to(home), None if pooled is None else pooled.to(home), self._strength)
        return changed.to(text.device), None if changed_pooled is None else changed_pooled.to(text.device)


def _repeats(text: Tensor, other: Tensor) -> bool:
    """Return whether ``text`` is ``other``, once or several times: so prompts of unequal length are joined."""
    tokens = other.shape[1]
    return text.shape[1] % tokens == 0 and torch.equal(text, other.repeat(1, text.shape[1] // tokens, 1))
