"""Judges on this machine: a vision-language model through transformers, and what happens when it cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from evaluation_testing import PROGRAMMATIC, assessed, reasons, small_evaluation
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from comfyui_psa.training.evaluation.judges import local


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision-language model of LLaVA's architecture with random weights."""
    folder = tmp_path_factory.mktemp("llava")
    words = ["<unk>", "<pad>", "<s>", "</s>", "<image>", "PASS", "FAIL", "FIRST", "SECOND", "SAME", "house", "burst"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        images, tokenizer, patch_size=16, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=32, patch_size=16, projection_dim=16),
        text_config=LlamaConfig(**small, vocab_size=len(tokenizer), num_key_value_heads=2),
        image_token_index=4,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_local_model_answers_about_pictures(tmp_path: Path, llava: Path, dtype: str) -> None:
    folder = small_evaluation(tmp_path, prompts=1, methods=("base", "PSA"))
    judge = {"kind": "local", "name": "L", "model": str(llava), "dtype": dtype, "max_new_tokens": 4}
    results = assessed(folder, judges=[judge], pairs=50)
    assert "L" not in reasons(results)
    (found,) = results["judges"]
    assert (found["asked"], found["asked_pairs"]) == (12, 4)
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines() if line]
    assert {len(one["images"]) for one in rows} == {1, 2}
    # Without sampling the same is said again.
    (folder / "answers.jsonl").rename(folder / "before.jsonl")
    assessed(folder, judges=[judge], pairs=50)
    assert (folder / "answers.jsonl").read_bytes() == (folder / "before.jsonl").read_bytes()


def test_a_folder_without_a_model_is_a_reason(tmp_path: Path) -> None:
    folder = small_evaluation(tmp_path / "run", prompts=1, methods=("base",))
    (tmp_path / "empty").mkdir()
    judges = [
        {"kind": "local", "name": "nowhere", "model": str(tmp_path / "nowhere")},
        {"kind": "local", "name": "empty", "model": str(tmp_path / "empty")},
        {"kind": "programmatic", "detector": str(tmp_path / "none.safetensors")},
    ]
    found = reasons(assessed(folder, judges=judges))
    assert "there is no folder" in found["nowhere"]
    assert "holds no model" in found["empty"]
    assert "none.safetensors" in found["detector"]
    assert "none.safetensors" in found["the detector's counts"]


@pytest.mark.parametrize("where", ["opened", "asked"])
def test_a_package_that_a_model_needs_is_named(
    tmp_path: Path, llava: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    folder = small_evaluation(tmp_path, prompts=1, methods=("base",))

    def lacking(*_: object, **__: object) -> None:
        raise ImportError("\nThe processor requires the num2words library but it was not found.\n")

    if where == "opened":
        monkeypatch.setattr(local.AutoProcessor, "from_pretrained", lacking)
    else:
        monkeypatch.setattr(LlavaProcessor, "apply_chat_template", lacking)
    judge = {"kind": "local", "name": "L", "model": str(llava), "dtype": "fp32"}
    results = assessed(folder, judges=[judge, PROGRAMMATIC])
    assert "a Python package that is not installed (The processor requires the num2words" in reasons(results)["L"]
    assert [one["judge"] for one in results["judges"]] == ["detector"]
