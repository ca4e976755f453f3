"""Text embeddings: the same numbers as ComfyUI, open_clip and diffusers make of the same weights."""

from __future__ import annotations

import sys
from pathlib import Path

import comfy.sd
import comfy.sd1_clip
import open_clip
import pytest
import torch
from checkpoints import clip_l, open_clip_tower, sd1_weights, sd2_weights, sdxl_weights
from comfy_testing import CPU, ROUNDING, difference
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from comfyui_psa.training.base import TextEmbedding, open_base
from comfyui_psa.training.base.tokenizer import clip_tokenizer
from comfyui_psa.training.errors import BaseModelError
from comfyui_psa.training.synthetic import write_checkpoint

CAPTIONS = ("a cat's portrait, 35mm!", "", "Zürich at dawn!! 日本 & more", "a harbour")
LONG = "a very long caption " * 40


def encode(path: Path, captions: tuple[str, ...] = CAPTIONS) -> list[TextEmbedding]:
    return open_base(path).text_encoder(CPU).encode(captions)


def comfy_tokens(caption: str, pad_with_end: bool) -> list[list[tuple[int, float]]]:
    return comfy.sd1_clip.SDTokenizer(pad_with_end=pad_with_end).tokenize_with_weights(caption)


def open_clip_layers(caption: str) -> tuple[Tensor, Tensor]:
    """The last layer but one, and the pooled text, of the tower in the checkpoints."""
    tower, seen = open_clip_tower(), []
    tower.transformer.resblocks[-2].register_forward_hook(lambda module, inputs, output: seen.append(output))
    pooled = tower(open_clip.tokenize([caption]))
    return seen[0][0], pooled[0]


def test_clip_of_the_synthetic_checkpoint_is_comfyui_s(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    write_checkpoint(path)
    _, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_model=False)
    for caption, embedding in zip(CAPTIONS, encode(path), strict=True):
        expected = clip.encode_from_tokens(clip.tokenize(caption))
        assert difference(embedding.hidden, expected[0]) < ROUNDING
        assert embedding.pooled is None


def test_sd1_text_is_comfyui_s(tmp_path: Path) -> None:
    save_file(sd1_weights(), tmp_path / "sd1.safetensors")
    reference = clip_l()
    for caption, embedding in zip(CAPTIONS, encode(tmp_path / "sd1.safetensors"), strict=True):
        expected, _ = reference.encode_token_weights(comfy_tokens(caption, pad_with_end=True))
        assert embedding.hidden.shape == (77, 64)
        assert difference(embedding.hidden, expected[0]) < ROUNDING


def test_sd2_text_is_open_clip_s_last_layer_but_one_normalised(tmp_path: Path) -> None:
    save_file(sd2_weights(), tmp_path / "sd2.safetensors")
    for caption, embedding in zip(CAPTIONS, encode(tmp_path / "sd2.safetensors"), strict=True):
        hidden, _ = open_clip_layers(caption)
        assert difference(embedding.hidden, open_clip_tower().ln_final(hidden)) < ROUNDING
        assert embedding.pooled is None


def test_sdxl_text_is_both_towers_and_the_pooled_text_of_the_second(tmp_path: Path) -> None:
    save_file(sdxl_weights(), tmp_path / "sdxl.safetensors")
    first = clip_l(penultimate=True)
    for caption, embedding in zip(CAPTIONS, encode(tmp_path / "sdxl.safetensors"), strict=True):
        hidden, pooled = open_clip_layers(caption)
        expected, _ = first.encode_token_weights(comfy_tokens(caption, pad_with_end=True))
        assert difference(embedding.hidden, torch.cat([expected[0], hidden], dim=-1)) < ROUNDING
        assert embedding.pooled is not None
        assert difference(embedding.pooled, pooled) < ROUNDING


def test_text_weights_without_the_prefix_text_model_are_the_same(tmp_path: Path) -> None:
    weights = sd1_weights()
    save_file(weights, tmp_path / "new.safetensors")
    older = {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in weights.items()}
    assert older.keys() != weights.keys()
    save_file(older, tmp_path / "old.safetensors")
    for a, b in zip(encode(tmp_path / "old.safetensors"), encode(tmp_path / "new.safetensors"), strict=True):
        assert torch.equal(a.hidden, b.hidden)


def test_many_captions_are_the_same_as_one_by_one(tmp_path: Path) -> None:
    save_file(sdxl_weights(), tmp_path / "sdxl.safetensors")
    captions = tuple(f"picture number {number}" for number in range(70))
    together = encode(tmp_path / "sdxl.safetensors", captions)
    assert len(together) == 70
    for i in (0, 31, 32, 69):
        (alone,) = encode(tmp_path / "sdxl.safetensors", captions[i : i + 1])
        assert difference(together[i].hidden, alone.hidden) < ROUNDING
        assert together[i].hidden.untyped_storage().nbytes() == 77 * 192 * 4  # it does not keep the batch alive


def test_a_long_caption_is_cut_to_the_context(tmp_path: Path) -> None:
    save_file(sd1_weights(), tmp_path / "sd1.safetensors")
    longer, cut = encode(tmp_path / "sd1.safetensors", (LONG, LONG + "and more"))
    assert longer.hidden.shape == (77, 64)
    assert torch.equal(longer.hidden, cut.hidden)


def test_without_the_vocabulary_the_package_to_install_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(sd1_weights(), tmp_path / "sd1.safetensors")
    base = open_base(tmp_path / "sd1.safetensors")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(BaseModelError, match=r"open_clip_torch, which is not installed\. Install it"):
        base.text_encoder(CPU)


@pytest.mark.parametrize(
    "caption", [*CAPTIONS, "x" * 300, "bread &amp; butter", "naïve café 12345 — 'tis", "tabs\tand\nlines"]
)
def test_the_tokenizer_is_the_one_that_comfyui_brings(caption: str) -> None:
    folder = Path(comfy.sd1_clip.__file__).with_name("sd1_tokenizer")
    expected = CLIPTokenizer.from_pretrained(folder)(caption).input_ids
    assert clip_tokenizer()(caption).input_ids == expected
