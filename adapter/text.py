"""The text side: every token of a prompt attends to the user, once per prompt and person.

    c'_j = c_j + s W_o Attn(W_q LN(c_j), W_k U, W_v U)                      ("attention")
    c'_j = c_j + s W_3 gelu(W_1 LN(c_j) + W_2 e)                            ("mlp")

``U`` are the user's tokens and a sink: one more entry of the softmax, whose value is zero, so that a token which has
nothing to do with the user's boundaries can look there and stay as it is. ``s`` is the strength. A pooled text vector
(SDXL) is a text of one token with weights of its own.

For one user, all that does not meet the token is constant. So both are folded (``TextGate``, ``TextShift``): attention
is two matrices, as at a layer (``gated.py``); in the other form a user is one more bias. What is left needs neither the
user's tokens nor the adapter.

Nothing here knows of attention layers or of a UNet: any model that reads text can follow.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import TextSpec
from .errors import AdapterError
from .gated import SiteGate
from .user import UserProjection


class TextGate(NamedTuple):
    """What users add to tokens, in the form "attention": the norm of the text, and a gate on what it gives."""

    norm: Tensor
    norm_bias: Tensor
    gate: SiteGate

    def __call__(self, text: Tensor) -> Tensor:
        """Return what is added to ``text`` ``[users, tokens, text_dim]``."""
        return self.gate(F.layer_norm(text, self.norm.shape, self.norm, self.norm_bias))

    @property
    def users(self) -> int:
        """How many users it is of."""
        return self.gate.values.shape[0]

    def repeated(self, times: int) -> TextGate:
        """Return it for the same users several times."""
        return self._replace(gate=self.gate.repeated(times))


class TextShift(NamedTuple):
    """What users add to tokens, in the form "mlp".

    ``to_hidden`` is ``[inner, text_dim]``, ``to_out`` ``[text_dim, inner]``. ``biases`` are the users',
    ``[users, parts, inner]``, and ``shares`` says how much each part of a user counts, ``[users, parts]``: one part,
    unless people are mixed.
    """

    norm: Tensor
    norm_bias: Tensor
    to_hidden: Tensor
    biases: Tensor
    shares: Tensor
    to_out: Tensor

    def __call__(self, text: Tensor) -> Tensor:
        """Return what is added to ``text`` ``[users, tokens, text_dim]``."""
        normed = F.layer_norm(text, self.norm.shape, self.norm, self.norm_bias)
        hidden = F.linear(normed, self.to_hidden)[:, None] + self.biases[:, :, None]  # [users, parts, tokens, inner]
        return F.linear((self.shares[:, :, None, None] * F.gelu(hidden)).sum(dim=1), self.to_out)

    @property
    def users(self) -> int:
        """How many users it is of."""
        return self.biases.shape[0]

    def repeated(self, times: int) -> TextShift:
        """Return it for the same users several times."""
        return self._replace(biases=self.biases.repeat(times, 1, 1), shares=self.shares.repeat(times, 1))


TextResidual: TypeAlias = TextGate | TextShift


class UserTextAttention(nn.Module):
    """The residual of one kind of text; zero at the start, so that training begins at the base."""

    def __init__(self, text_dim: int, spec: TextSpec) -> None:
        """Make one for text of width ``text_dim``."""
        super().__init__()
        self.heads = spec.heads
        self.norm = nn.LayerNorm(text_dim)
        self.to_q = nn.Linear(text_dim, spec.inner_dim, bias=False)
        self.to_k_user = nn.Linear(spec.token_dim, spec.inner_dim, bias=False)
        self.to_v_user = nn.Linear(spec.token_dim, spec.inner_dim, bias=False)
        self.sink = nn.Parameter(torch.zeros(spec.heads))
        self.to_out = nn.Linear(spec.inner_dim, text_dim, bias=False)
        nn.init.zeros_(self.to_out.weight)

    def forward(self, user: Tensor) -> TextGate:
        """Fold user tokens ``[users, T, token_dim]`` into the two matrices of a gate."""
        queries = self.to_q.weight.reshape(self.heads, -1, self.to_q.in_features)  # [heads, d, text_dim]
        keys, values = (
            part.unflatten(-1, (self.heads, -1)) for part in (self.to_k_user(user), self.to_v_user(user))
        )  # [users, T, heads, d]
        scores = torch.einsum("hdn,uthd->unht", queries, keys) * queries.shape[1] ** -0.5
        out = torch.einsum("nhd,uthd->uhtn", self.to_out.weight.reshape(-1, self.heads, queries.shape[1]), values)
        gate = SiteGate(scores.flatten(2).contiguous(), out.flatten(1, 2).contiguous(), self.sink.clone())
        # Copies: what shards parameters (FSDP) frees them when this is done.
        return TextGate(self.norm.weight.clone(), self.norm.bias.clone(), gate)


class UserTextMLP(nn.Module):
    """The simpler residual: the user shifts what a token is asked, and does not look at it."""

    def __init__(self, text_dim: int, spec: TextSpec) -> None:
        """Make one for text of width ``text_dim``; the user is one token."""
        super().__init__()
        self.norm = nn.LayerNorm(text_dim)
        self.to_hidden = nn.Linear(text_dim, spec.inner_dim)
        self.to_hidden_user = nn.Linear(spec.token_dim, spec.inner_dim, bias=False)
        self.to_out = nn.Linear(spec.inner_dim, text_dim, bias=False)
        nn.init.zeros_(self.to_out.weight)

    def forward(self, user: Tensor) -> TextShift:
        """Fold user tokens ``[users, 1, token_dim]`` into a bias."""
        biases = self.to_hidden.bias + self.to_hidden_user(user)
        shares = biases.new_ones(biases.shape[:2])
        # Copies, as above.
        shared = (self.norm.weight, self.norm.bias, self.to_hidden.weight, self.to_out.weight)
        norm, norm_bias, to_hidden, to_out = (weight.clone() for weight in shared)
        return TextShift(norm, norm_bias, to_hidden, biases, shares, to_out)


_FORMS = {"attention": UserTextAttention, "mlp": UserTextMLP}


class TextAdapter(nn.Module):
    """The text side of an adapter: the user's tokens, and a residual for text tokens and for the pooled vector."""

    def __init__(self, spec: TextSpec, text_dim: int, embedding_dim: int) -> None:
        """Make one for text of width ``text_dim``, and for pooled vectors if ``spec`` has their width."""
        super().__init__()
        self.user_proj = UserProjection(embedding_dim, spec.token_dim, spec.num_tokens)
        self.tokens = _FORMS[spec.form](text_dim, spec)
        self.pooled = _FORMS[spec.form](spec.pooled_dim, spec) if spec.pooled_dim else None

    def forward(self, embedding: Tensor) -> UserText:
        """Return what users, ``[users, embedding_dim]`` and standardised, make of prompts."""
        user = self.user_proj(embedding)
        return UserText(self.tokens(user), None if self.pooled is None else self.pooled(user))


class UserText(NamedTuple):
    """What users make of prompts: functions of their text, the same for both runtimes.

    Both take one prompt for all users, one user for all prompts, or one each; of whom there are fewer takes turns. They
    take any precision, and compute in float32. ``strength`` 0 gives the text as it is.
    """

    on_tokens: TextResidual
    on_pooled: TextResidual | None

    @property
    def users(self) -> int:
        """How many users it is of."""
        return self.on_tokens.users

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self.on_tokens.norm.device

    def to(self, device: torch.device) -> UserText:
        """Return the same, computed on another device; itself if it is there."""
        return self if self.device == device else _moved(self, device)

    @property
    def text_dim(self) -> int:
        """The width of the text that is changed."""
        return self.on_tokens.norm.shape[0]

    @property
    def pooled_dim(self) -> int | None:
        """The width of the pooled text vector that is changed; None if none is."""
        return None if self.on_pooled is None else self.on_pooled.norm.shape[0]

    def tokens(self, text: Tensor, strength: float = 1.0) -> Tensor:
        """Return the users' versions of prompts ``[prompts, tokens, text_dim]``.

        Raises:
            AdapterError: neither users nor prompts are a multiple of the others.
        """
        return _changed(self.on_tokens, text, strength)

    def pooled(self, pooled: Tensor, strength: float = 1.0) -> Tensor:
        """Return the users' versions of pooled vectors ``[prompts, pooled_dim]``; an adapter without a part for them
        gives them back.

        Raises:
            AdapterError: as ``tokens`` does.
        """
        if self.on_pooled is None:
            return pooled
        return _changed(self.on_pooled, pooled[:, None], strength)[:, 0]


def _moved(parts: Any, device: torch.device) -> Any:
    """Return tensors, in named tuples of named tuples, on another device."""
    if isinstance(parts, Tensor):
        return parts.to(device)
    return parts if parts is None else type(parts)(*(_moved(part, device) for part in parts))


def _changed(residual: TextResidual, text: Tensor, strength: float) -> Tensor:
    prompts, users = text.shape[0], residual.users
    rows = max(prompts, users)
    if rows % prompts or rows % users:
        raise AdapterError(
            f"Apply PSA got {users} user embeddings for {prompts} prompts in one conditioning. Use one embedding, "
            "one prompt, as many of both, or a multiple."
        )
    given = text.repeat(rows // prompts, 1, 1).float()
    return (given + strength * residual.repeated(rows // users)(given)).to(text.dtype)
