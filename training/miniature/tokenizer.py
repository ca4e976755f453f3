"""A CLIP tokenizer whose vocabulary is that of the drawn world: each of its words is one token.

Any other text is spelled in bytes, as CLIP does.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from .architecture import TOKENS
from .captions import vocabulary as world_vocabulary

_START, _END = "<|startoftext|>", "<|endoftext|>"
_SUFFIX = "</w>"
_LARGEST = 2000


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write the tokenizer's files into ``folder`` and return it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(letters)
    tokens = [*letters, *(f"{letter}{_SUFFIX}" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {token: number for number, token in enumerate((*dict.fromkeys(tokens), _START, _END))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False, indent=0), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _merges(letters: list[str]) -> list[tuple[str, str]]:
    """Learn byte pair merges until every word is one token."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=_SUFFIX))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=_LARGEST, end_of_word_suffix=_SUFFIX, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(world_vocabulary(), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(first, second) for first, second in merges]
