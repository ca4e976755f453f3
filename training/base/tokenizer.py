"""CLIP's tokenizer for checkpoints that come without one, from the vocabulary inside the package open_clip."""

from __future__ import annotations

import gzip
import importlib.util
import json
import tempfile
from pathlib import Path

from transformers import CLIPTokenizer

from ...safe_files import DAMAGE
from ..errors import BaseModelError

MAX_TOKENS = 77
_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 49152 - 256 - 2
_START, _END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer() -> CLIPTokenizer:
    """Make the tokenizer that all CLIP text encoders of Stable Diffusion share; it pads as OpenAI's CLIP does.

    Raises:
        BaseModelError: the package open_clip is not installed, or its vocabulary is damaged.
    """
    vocabulary, merges = _read_vocabulary()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=MAX_TOKENS)


def _read_vocabulary() -> tuple[dict[str, int], list[str]]:
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise BaseModelError(
            "A single-file checkpoint has no tokenizer; CLIP's vocabulary comes from the package open_clip_torch, "
            "which is not installed. Install it with `pip install -e '.[train]'`."
        )
    path = Path(package.origin).with_name(_VOCABULARY)
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except DAMAGE as error:
        raise BaseModelError(
            f"CLIP's vocabulary {path} cannot be read ({error}). Install open_clip_torch again."
        ) from None
    merges = lines[1 : 1 + _MERGES]
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    tokens += [_START, _END]
    return {token: number for number, token in enumerate(tokens)}, merges


def _byte_letters() -> list[str]:
    """GPT-2's letters for the 256 bytes: printable ones stand for themselves, and come first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
