"""The text side: every token of a prompt attends to the user, once per prompt and person.

    c'_j = c_j + s W_o Attn(W_q LN(c_j), W_k U, W_v U)                      ("attention")
    c'_j = c_j + s W_3 gelu(W_1 LN(c_j) + W_2 e)                            ("mlp")

``U`` are the user's tokens and a sink: one more entry of the softmax, whose value is zero, so that a token which has
nothing to do with the user's boundaries can look there and stay as it is. ``s`` is the strength. A pooled text vector
(SDXL) is a text of one token with weights of its own.

Nothing here knows of attention layers or of a UNet: any model that reads text can follow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import TextSpec
from .errors import AdapterError
from .user import UserProjection


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

    def forward(self, text: Tensor, user: Tensor) -> Tensor:
        """Return what is added to ``text`` ``[users, tokens, text_dim]`` for user tokens ``[users, T, token_dim]``."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [users, heads, tokens, inner / heads]
            for part in (self.to_q(self.norm(text)), self.to_k_user(user), self.to_v_user(user))
        )
        scores = query @ key.transpose(-1, -2) * key.shape[-1] ** -0.5
        return self.to_out((weights_beside_sink(scores, self.sink) @ value).transpose(1, 2).flatten(2))


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

    def forward(self, text: Tensor, user: Tensor) -> Tensor:
        """Return what is added to ``text`` ``[users, tokens, text_dim]`` for user tokens ``[users, 1, token_dim]``."""
        return self.to_out(F.gelu(self.to_hidden(self.norm(text)) + self.to_hidden_user(user)))


_FORMS = {"attention": UserTextAttention, "mlp": UserTextMLP}


class TextAdapter(nn.Module):
    """The text side of an adapter: the user's tokens, and a residual for text tokens and for the pooled vector."""

    def __init__(self, spec: TextSpec, text_dim: int, embedding_dim: int) -> None:
        """Make one for text of width ``text_dim``, and for pooled vectors if ``spec`` has their width."""
        super().__init__()
        self.text_dim = text_dim
        self.pooled_dim = spec.pooled_dim
        self.user_proj = UserProjection(embedding_dim, spec.token_dim, spec.num_tokens)
        self.tokens = _FORMS[spec.form](text_dim, spec)
        self.pooled = _FORMS[spec.form](spec.pooled_dim, spec) if spec.pooled_dim else None

    def forward(self, embedding: Tensor) -> UserText:
        """Return what users, ``[users, embedding_dim]`` and standardised, make of prompts."""
        user = self.user_proj(embedding)[:, None]
        return UserText(self, user, user.new_ones(user.shape[:2]))


class UserText(NamedTuple):
    """What users make of prompts: functions of their text, the same for both runtimes.

    Both take one prompt for all users, one user for all prompts, or one each; of whom there are fewer takes turns. They
    take any precision, and compute in float32. ``strength`` 0 gives the text as it is. ``user`` are the users' tokens,
    ``[users, parts, T, token_dim]``, and ``shares`` says how much each part of a user counts, ``[users, parts]``: one
    part, unless people are mixed.
    """

    adapter: TextAdapter
    user: Tensor
    shares: Tensor

    @property
    def text_dim(self) -> int:
        """The width of the text that the adapter changes."""
        return self.adapter.text_dim

    @property
    def pooled_dim(self) -> int | None:
        """The width of the pooled text vector that the adapter changes; None if it changes none."""
        return self.adapter.pooled_dim

    def tokens(self, text: Tensor, strength: float = 1.0) -> Tensor:
        """Return the users' versions of prompts ``[prompts, tokens, text_dim]``.

        Raises:
            AdapterError: neither users nor prompts are a multiple of the others.
        """
        return self._changed(self.adapter.tokens, text, strength)

    def pooled(self, pooled: Tensor, strength: float = 1.0) -> Tensor:
        """Return the users' versions of pooled vectors ``[prompts, pooled_dim]``; an adapter without a part for them
        gives them back.

        Raises:
            AdapterError: as ``tokens`` does.
        """
        if self.adapter.pooled is None:
            return pooled
        return self._changed(self.adapter.pooled, pooled[:, None], strength)[:, 0]

    def _changed(self, residual: nn.Module, text: Tensor, strength: float) -> Tensor:
        prompts, users = text.shape[0], self.user.shape[0]
        rows = max(prompts, users)
        if rows % prompts or rows % users:
            raise AdapterError(
                f"Apply PSA got {users} user embeddings for {prompts} prompts in one conditioning. Use one embedding, "
                "one prompt, as many of both, or a multiple."
            )
        given = text.repeat(rows // prompts, 1, 1).float()
        changed = given
        for user, share in zip(self.user.unbind(dim=1), self.shares.unbind(dim=1), strict=True):
            share, user = share.repeat(rows // users)[:, None, None], user.repeat(rows // users, 1, 1)
            changed = changed + strength * share * residual(given, user)
        return changed.to(text.dtype)


def weights_beside_sink(scores: Tensor, sink: Tensor) -> Tensor:
    """Return the softmax weights of keys beside a sink.

    Args:
        scores: of the keys, ``[..., heads, queries, keys]``; so are the weights. They add up to less than one: the
            sink's own weight is left out, as its value is zero.
        sink: its score, ``[heads]``.
    """
    beside = sink[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, beside), dim=-1).softmax(dim=-1)[..., :-1]
