"""Gradient checkpointing of a batch of which the first pictures need gradients: the policy's, not the reference's.

Each block runs once for all of them and keeps its inputs. The backward pass runs it again, for the policy's alone:
what the reference costs is its share of a larger batch, and no call of its own. What the adapter adds inside a block is
an input of it like all others, so gradients reach the adapter as without checkpointing. The little that is between
blocks (norms, up and down sampling) has a graph for all pictures; the reference's gradients are zero there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attachment import Attachment


class Recomputation:
    """What diffusers calls in place of a block, as ``gradient_checkpointing_func``.

    Blocks take tensors ``[batch, ...]`` and return one; nothing in them is random, since the UNet only predicts.
    """

    def __init__(self, attachment: Attachment) -> None:
        """Keep to the ``attachment`` of the UNet: its users' pictures are those that get gradients."""
        self._attachment = attachment

    def policy_share(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the policy's share of tensors ``[batch, ...]``, as views."""
        return [tensor[: self._attachment.pictures] for tensor in tensors]

    def __call__(self, block: nn.Module, *args: Any) -> Tensor:
        """Run ``block``; the backward pass, which belongs into the attachment's block too, runs it again."""
        inputs = [arg for arg in args if isinstance(arg, Tensor)]
        added = self._attachment.tensors_in(block)
        if not any(tensor.requires_grad for tensor in (*inputs, *added)):
            result: Tensor = block(*args)  # no gradient comes through here
            return result
        others = [None if isinstance(arg, Tensor) else (arg,) for arg in args]

        def run(inputs: Sequence[Tensor], added: Sequence[Tensor] | None = None) -> Tensor:
            rest = iter(inputs)
            with nullcontext() if added is None else self._attachment.replaced_in(block, added):
                output: Tensor = block(*(next(rest) if other is None else other[0] for other in others))
            return output

        output: Tensor = _Recomputed.apply(run, self.policy_share, len(inputs), *inputs, *added)
        return output


class _Recomputed(torch.autograd.Function):
    """A block as a function of its inputs and of what is added in it; the graph is made in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., Tensor],
        policy_share: Callable[[Sequence[Tensor]], list[Tensor]],
        count: int,
        *tensors: Tensor,
    ) -> Tensor:
        inputs, added = tensors[:count], tensors[count:]
        ctx.run, ctx.count, ctx.batch = run, count, len(inputs[0])
        kept = policy_share(inputs)
        # The first is this block's own: a view would keep the reference's pictures too. The others are every block's.
        first = inputs[0] if len(kept[0]) == ctx.batch else kept[0].clone()
        ctx.save_for_backward(first, *kept[1:], *added)
        return run(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept: tuple[Tensor, ...] = ctx.saved_tensors
        needed = ctx.needs_input_grad[-len(kept) :]
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(kept, needed, strict=True)]
        with torch.enable_grad():
            output = ctx.run(leaves[: ctx.count], leaves[ctx.count :])
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, gradients[0][: len(output)]))
        results = [next(found) if need else None for need in needed]
        for i, result in enumerate(results[: ctx.count]):
            if result is not None and len(result) < ctx.batch:  # nothing for the reference's pictures
                results[i] = F.pad(result, (0, 0) * (result.ndim - 1) + (0, ctx.batch - len(result)))
        return (None, None, None, *results)
