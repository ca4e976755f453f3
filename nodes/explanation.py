"""Why a picture is different for somebody: how much words change, and where the model sees another picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import comfy.samplers
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from torch import Tensor

from ..adapter import AdapterError
from .patch import UserPatch, without

END_OF_PROMPT = "(end of prompt)"
WHOLE_PROMPT = "(the prompt as a whole)"
_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
_LEVELS = (0.2, 0.5, 0.8)  # of the sampling run
_HEAT = (0.94, 0.45, 0.05)


class Word(NamedTuple):
    """A word and how much of what it says is changed: 0 is nothing, 1 a change as large as the word itself."""

    text: str
    change: float


def changes_of_words(clip: CLIP, text: str, patches: Sequence[UserPatch]) -> list[list[Word]]:
    """Return for each person the words of a prompt; one list for all if nobody acts on text.

    Text tokens change one by one, each by ``|c' - c| / |c|``; a word counts as its most changed token. Where the prompt
    is over, padding still carries it: that is the entry behind the words. Where an adapter changes the pooled text as
    well (SDXL), how much is the last one.

    Raises:
        AdapterError: the text encoder is not of the adapter's family.
    """
    tokens = clip.tokenize(text)
    before: Tensor
    pooled: Tensor | None
    before, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    after, after_pooled = before.float(), None if pooled is None else pooled.float()
    whole = False
    for user, strength in ((p.text, p.strength * p.curve.peak) for p in patches if p.text is not None):
        _check_width(before, user.text_dim)
        after = _changed(user.tokens, after, strength, user.device)
        if user.pooled_dim is not None:
            _check_width(pooled, user.pooled_dim)
            after_pooled, whole = _changed(user.pooled, after_pooled, strength, user.device), True
    chunks = tokens.get("l") or next(iter(tokens.values()))
    pieces = [piece for chunk in chunks for piece in _pieces(clip, chunk)]
    people = [list(_words(pieces, row.tolist())) for row in _change(before, after)]
    if whole:
        changes = _change(pooled, after_pooled).tolist()
        for number, words in enumerate(people):
            words.append(Word(WHOLE_PROMPT, changes[number % len(changes)]))
    return people


def in_words(people: Sequence[Sequence[Word]]) -> str:
    """Return the same as text, the most changed words first; for several people, a line each."""
    lines = []
    for words in people:
        changed = sorted((word for word in words if word.change >= 0.005), key=lambda word: -word.change)
        lines.append(", ".join(f"{word.text} {word.change:.0%}" for word in changed) or "No word is changed.")
    return "\n".join(lines)


def changes_in_picture(
    model: ModelPatcher, patches: Sequence[UserPatch], positive: list[list[Any]], samples: Tensor
) -> Tensor:
    """Return where the model sees another picture with PSA than without, ``[images, height, width]``, up to 1.

    The picture ``samples`` ``[images, channels, height, width]`` gets noise of three levels, and the model removes it
    again in one step; what differs is averaged over channels and levels. 1 is the largest change in the batch.
    """
    base = without(model, patches)
    sampling = model.get_model_object("model_sampling")
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(0))
    found = torch.zeros(samples.shape[0], *samples.shape[2:])
    for level in _LEVELS:
        sigma = float(sampling.percent_to_sigma(level))
        ours, theirs = (_look(patcher, positive, samples, noise, sigma) for patcher in (model, base))
        found += (ours - theirs).abs().mean(dim=1).cpu()
    return found / found.max().clamp(min=torch.finfo(found.dtype).tiny)


def overlay(images: Tensor, changes: Tensor) -> Tensor:
    """Return images ``[n, height, width, 3]``, dimmed, with the changes ``[n, h, w]`` glowing in them."""
    heat = F.interpolate(changes[:, None], images.shape[1:3], mode="bicubic").clamp(0, 1)[:, 0, :, :, None]
    grey = images.mean(dim=-1, keepdim=True) * 0.6
    lit = images * heat + grey * (1 - heat)
    return (lit * (1 - 0.5 * heat) + torch.tensor(_HEAT) * 0.5 * heat).clamp(0, 1)


def _check_width(text: Tensor | None, width: int) -> None:
    if text is None or text.shape[-1] != width:
        found = "no pooled text" if text is None else f"text of width {text.shape[-1]}"
        raise AdapterError(
            f"The text encoder (CLIP) gives {found}, and the adapter changes text of width {width}. Connect the one of "
            "the adapter's family."
        )


@torch.no_grad()
def _changed(change: Callable[[Tensor, float], Tensor], text: Any, strength: float, device: torch.device) -> Tensor:
    return change(text.to(device), strength).to(text.device)


def _change(before: Any, after: Any) -> Tensor:
    """Return by how much of itself each vector of a text is changed."""
    return (after - before.float()).norm(dim=-1) / before.float().norm(dim=-1)


def _pieces(clip: CLIP, chunk: Sequence[tuple[Any, ...]]) -> Iterator[str]:
    """Yield the tokens of a chunk as text; everything from its end token on is the end."""
    ended = False
    for pair in chunk:
        piece = clip.tokenizer.untokenize([pair])[0][1] if isinstance(pair[0], int) else f"(embedding){_WORD_END}"
        ended = ended or piece == _END
        yield _END if ended else piece


def _words(pieces: Sequence[str], changes: Sequence[float]) -> Iterator[Word]:
    text, change, end = "", 0.0, 0.0
    for piece, value in zip(pieces, changes, strict=True):
        if piece == _END:
            end = max(end, value)
        elif piece != _START:
            text, change = text + piece.removesuffix(_WORD_END), max(change, value)
            if piece.endswith(_WORD_END):
                yield Word(text, change)
                text, change = "", 0.0
    yield Word(END_OF_PROMPT, end)


@torch.no_grad()
def _look(model: ModelPatcher, positive: list[list[Any]], samples: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Return the picture that the model sees in the noisy one."""

    def once(wrapped: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, **_: Any) -> Tensor:
        return wrapped(x, sigmas[0] * x.new_ones(x.shape[0]), **(extra_args or {}))

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, positive)
    guider.set_cfg(1.0)  # the conditional half alone
    sampler = comfy.samplers.KSAMPLER(once)
    return guider.sample(noise, samples, sampler, torch.tensor([sigma, 0.0]), disable_pbar=True, seed=0)
