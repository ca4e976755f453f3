"""The text side: every token of a prompt attends to the user, once per prompt and person.

    c'_j = c_j + s W_o Attn(W_q LN(c_j), W_k U, W_v U)                      ("attention")
    c'_j = c_j + s W_3 gelu(W_1 LN(c_j) + W_2 e)                            ("mlp")

``U`` are the user's tokens and a sink: one more entry of the softmax, whose value is zero, so that a token which has
nothing to do with the user's boundaries can look there and stay as it is. ``s`` is the strength. A pooled text vector
(SDXL) is a text of one token with weights of its own.

Nothing here knows of attention layers or of a UNet: any model that reads text can follow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import TextSpec
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
        self.pooled_dim = spec.pooled_dim
        self.user_proj = UserProjection(embedding_dim, spec.token_dim, spec.num_tokens)
        self.tokens = _FORMS[spec.form](text_dim, spec)
        self.pooled = _FORMS[spec.form](spec.pooled_dim, spec) if spec.pooled_dim else None

    def forward(self, text: Tensor, pooled: Tensor | None, embedding: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the residuals of a prompt for each user.

        Args:
            text: ``[users, tokens, text_dim]``, float32.
            pooled: ``[users, pooled_dim]``; None, or an adapter without a part for it, gives None.
            embedding: standardised user embeddings, ``[users, embedding_dim]``.
        """
        user = self.user_proj(embedding)
        if self.pooled is None or pooled is None:
            return self.tokens(text, user), None
        return self.tokens(text, user), self.pooled(pooled[:, None], user)[:, 0]


def weights_beside_sink(scores: Tensor, sink: Tensor) -> Tensor:
    """Return the softmax weights of keys beside a sink.

    Args:
        scores: of the keys, ``[..., heads, queries, keys]``; so are the weights. They add up to less than one: the
            sink's own weight is left out, as its value is zero.
        sink: its score, ``[heads]``.
    """
    beside = sink[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, beside), dim=-1).softmax(dim=-1)[..., :-1]
