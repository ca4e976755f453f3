"""Image-side tokens that look first: user attention with several tokens and a sink, folded for a fixed user.

Per head h the query of a position is ``q_h = W_q,h n``; the user's tokens give keys ``k_t,h = W_k,h u_t`` and values
``v_t,h = W_v,h u_t``; a sink, whose value is zero, stands beside them in the softmax. For one user everything but the
layer's input ``n`` is constant, so a layer needs two skinny matrices:

    scores = n A,    A[hidden, heads * T] = concat( W_q,h^T k_t,h ) / sqrt(d)
    added  = softmax over the T tokens and the sink, per head, of scores,  times  V[heads * T, hidden]

``V`` holds the values of each head in that head's columns, in front of ``to_out``; behind it, the layer's own
``to_out`` has been applied to its rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import GatedSpec


class SiteGate(NamedTuple):
    """What users add at one site, as a function of the layer's input: the contract with both runtimes.

    ``scores`` is ``[users, hidden, heads * T]``, ``values`` ``[users, heads * T, hidden]``, ``sink`` ``[heads]``.
    Without the first dimension they are one user's, for any number of pictures.
    """

    scores: Tensor
    values: Tensor
    sink: Tensor

    def __call__(self, n: Tensor) -> Tensor:
        """Return what is added for inputs ``n`` ``[users, positions, hidden]``: of the same shape."""
        heads = self.sink.shape[0]
        scores = (n @ self.scores).reshape(*n.shape[:-1], heads, -1).transpose(1, 2)  # [users, heads, positions, T]
        weights = weights_beside_sink(scores, self.sink).to(n.dtype)
        return weights.transpose(1, 2).flatten(2) @ self.values

    def to(self, dtype: torch.dtype) -> SiteGate:
        """Return it in another precision; the sink stays as it is, as the softmax does."""
        return SiteGate(self.scores.to(dtype), self.values.to(dtype), self.sink)

    def repeated(self, times: int) -> SiteGate:
        """Return it for the same users several times."""
        return SiteGate(self.scores.repeat(times, 1, 1), self.values.repeat(times, 1, 1), self.sink)


class GatedUserAttention(nn.Module):
    """User attention at one cross-attention layer; values are zero at the start."""

    def __init__(self, hidden_size: int, spec: GatedSpec) -> None:
        """Make the user attention of a layer of width ``hidden_size``, a multiple of the number of heads."""
        super().__init__()
        self.heads = spec.heads
        inner = spec.heads * spec.head_dim
        self.to_q_user = nn.Linear(hidden_size, inner, bias=False)
        self.to_k_user = nn.Linear(spec.token_dim, inner, bias=False)
        self.to_v_user = nn.Linear(spec.token_dim, hidden_size, bias=False)
        self.sink = nn.Parameter(torch.zeros(spec.heads))
        nn.init.zeros_(self.to_v_user.weight)

    def forward(self, user: Tensor) -> SiteGate:
        """Fold user tokens ``[users, T, token_dim]`` into the two matrices of this layer."""
        weight = self.to_q_user.weight
        queries = weight.reshape(self.heads, -1, weight.shape[1])  # [heads, d, hidden]
        keys = self.to_k_user(user).unflatten(-1, (self.heads, -1))  # [users, T, heads, d]
        scores = torch.einsum("hdn,uthd->unht", queries, keys) * queries.shape[1] ** -0.5
        values = self.to_v_user(user).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [users, heads, T, width]
        own = torch.eye(self.heads, device=user.device, dtype=user.dtype)[:, None, :, None]
        spread = values[:, :, :, None] * own  # each head's values in its own columns
        # A copy: what shards parameters (FSDP) frees them when this is done.
        return SiteGate(scores.flatten(2).contiguous(), spread.flatten(3).flatten(1, 2), self.sink.clone())


def weights_beside_sink(scores: Tensor, sink: Tensor) -> Tensor:
    """Return the softmax weights of keys beside a sink.

    Args:
        scores: of the keys, ``[..., heads, queries, keys]``; so are the weights. They add up to less than one: the
            sink's own weight is left out, as its value is zero.
        sink: its score, ``[heads]``.
    """
    beside = sink[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, beside), dim=-1).softmax(dim=-1)[..., :-1]
