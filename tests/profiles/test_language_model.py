"""The language-model encoder on a real model (SmolLM2) and on a tiny one that can be broken, split and moved."""

from __future__ import annotations

import gc
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from comfyui_psa.profiles import EncoderError, Profile
from comfyui_psa.profiles.encoders import CPUHost, LanguageModelEncoder, LanguageModelFiles, find_language_model

TEMPLATE = "A person of <<AGE>> years (<<AGE_GROUP>>), religion <<RELIGION>>. Never show <<BANNED>>."
# Profiles, and by hand what the language model reads about them. The prompts differ in length.
PROMPTS = {
    "adult": (
        Profile(age=35, religion="None"),
        "A person of 35 years (middle-aged), religion None. Never show [].",
    ),
    "child": (
        Profile(age=9),
        "A person of 9 years (children), religion not specified. Never show ['Self-Harm', 'Sexuality', 'Violence'].",
    ),
    "free text": (
        Profile(age=80, religion="a quiet faith of my own that takes a few more words to name", notes="unread"),
        "A person of 80 years (elderly), religion a quiet faith of my own that takes a few more words to name. "
        "Never show [].",
    ),
}
PROFILES = [profile for profile, _ in PROMPTS.values()]


@dataclass(frozen=True)
class Reference:
    """SmolLM2 as transformers loads it: the tokenizer, and embeddings computed without the encoder."""

    tokenizer: Any
    embeddings: Tensor


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> Reference:
    kwargs = {"pretrained_model_name_or_path": str(smollm2_gguf.parent), "gguf_file": smollm2_gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**kwargs)
    model = AutoModelForCausalLM.from_pretrained(**kwargs, dtype=torch.float32).eval()
    return Reference(tokenizer, torch.stack([_embed(model, tokenizer, prompt) for _, prompt in PROMPTS.values()]))


@torch.inference_mode()
def _embed(model: Any, tokenizer: Any, prompt: str) -> Tensor:
    """One prompt alone, so without padding: the mean of the last hidden state over its tokens."""
    messages = [{"role": "user", "content": prompt}]
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    hidden = model(**tokens, output_hidden_states=True).hidden_states[-1]
    return hidden[0].mean(dim=0)


@pytest.fixture(scope="module")
def smollm2_embeddings(smollm2_gguf: Path) -> Tensor:
    files = LanguageModelFiles(smollm2_gguf.parent, smollm2_gguf.name)
    return LanguageModelEncoder("HuggingFaceTB/SmolLM2-135M-Instruct", TEMPLATE, files).encode(PROFILES)


@pytest.fixture(scope="module")
def tiny(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in Hugging Face's format: four random layers with SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(reference.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    reference.tokenizer.save_pretrained(folder)
    return folder


def _encoder(folder: Path, host: CPUHost | None = None, template: str = TEMPLATE) -> LanguageModelEncoder:
    return LanguageModelEncoder("someone/tiny", template, LanguageModelFiles(folder), host)


def test_embeddings_have_the_width_of_the_model(smollm2_embeddings: Tensor) -> None:
    assert smollm2_embeddings.shape == (len(PROFILES), 576)
    assert smollm2_embeddings.dtype == torch.float32
    assert bool(torch.isfinite(smollm2_embeddings).all())


@pytest.mark.parametrize("row", range(len(PROMPTS)), ids=list(PROMPTS))
def test_an_embedding_is_the_mean_hidden_state_of_the_prompt(
    smollm2_embeddings: Tensor, reference: Reference, row: int
) -> None:
    torch.testing.assert_close(smollm2_embeddings[row], reference.embeddings[row], atol=1e-4, rtol=0)


def test_a_hugging_face_folder_works_too(tiny: Path, reference: Reference) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    expected = torch.stack([_embed(model, reference.tokenizer, prompt) for _, prompt in PROMPTS.values()])
    torch.testing.assert_close(_encoder(tiny).encode(PROFILES), expected, atol=1e-5, rtol=0)


def test_a_large_batch_of_different_lengths_equals_single_profiles(tiny: Path) -> None:
    profiles = [Profile(age=age, religion="word " * (age % 7)) for age in range(20)]
    encoder = _encoder(tiny)
    together = encoder.encode(profiles)
    for i in (0, 6, 8, 19):
        torch.testing.assert_close(together[i], encoder.encode([profiles[i]])[0], atol=1e-5, rtol=0)


def test_embeddings_of_different_profiles_differ(tiny: Path) -> None:
    vectors = _encoder(tiny).encode(PROFILES)
    assert min((a - b).abs().max().item() for i, a in enumerate(vectors) for b in vectors[:i]) > 1e-3


class WatchedHost(CPUHost):
    """Remembers which models were held whole in memory, as opposed to split by accelerate."""

    def __init__(self, max_memory: int | None = None) -> None:
        super().__init__(max_memory)
        self.held: list[nn.Module] = []

    def hold(self, model: nn.Module) -> AbstractContextManager[None]:
        self.held.append(model)
        return super().hold(model)


def test_batches_come_from_a_model_that_is_loaded_once_and_gone_afterwards(tiny: Path) -> None:
    host = WatchedHost(10**9)
    batches = _encoder(tiny, host).encode_batches(PROFILES, batch_size=2)
    first = next(batches)
    assert len(host.held) == 1
    # Training may go on between two batches.
    assert not torch.is_inference_mode_enabled()
    assert not first.is_inference()
    rest = list(batches)
    assert [len(batch) for batch in (first, *rest)] == [2, 1]
    model = weakref.ref(host.held.pop())
    assert host.held == []
    gc.collect()
    assert model() is None
    torch.testing.assert_close(torch.cat([first, *rest]), _encoder(tiny).encode(PROFILES), atol=1e-5, rtol=0)


def test_closing_the_batches_early_lets_the_model_go(tiny: Path) -> None:
    host = WatchedHost(10**9)
    batches = _encoder(tiny, host).encode_batches(PROFILES, batch_size=1)
    next(batches)
    model = weakref.ref(host.held.pop())
    batches.close()
    gc.collect()
    assert model() is None


def test_no_model_is_read_for_nobody(tmp_path: Path) -> None:
    assert list(_encoder(tmp_path / "nowhere").encode_batches([])) == []


@pytest.mark.parametrize("share", [0.9, 0.5, 0.001])
def test_a_model_larger_than_memory_gives_the_same_embeddings(
    tiny: Path, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    size = sum(parameter.numel() * 4 for parameter in AutoModel.from_pretrained(tiny).parameters())
    host = WatchedHost(int(size * share))
    offloaded = _encoder(tiny, host).encode(PROFILES)
    assert host.held == []
    torch.testing.assert_close(offloaded, _encoder(tiny).encode(PROFILES), atol=1e-5, rtol=0)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_fits_is_held_whole(tiny: Path) -> None:
    host = WatchedHost(10**9)
    _encoder(tiny, host).encode(PROFILES[:1])
    assert len(host.held) == 1


def _edit_weights(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return change


LAYER = "model.layers.2.self_attn.q_proj.weight"
BREAK: dict[str, Callable[[Path], object]] = {
    "weights cut off": lambda folder: os.truncate(folder / "model.safetensors", 1_000_000),
    "weights are nonsense": lambda folder: (folder / "model.safetensors").write_bytes(b"nonsense" * 100),
    "weights are empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "a layer is missing": _edit_weights(lambda weights: weights.pop(LAYER)),
    "a layer of another shape": _edit_weights(lambda weights: weights.update({LAYER: torch.ones(3, 3)})),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "tokenizer cut off": lambda folder: os.truncate(folder / "tokenizer.json", 100_000),
    "config cut off": lambda folder: os.truncate(folder / "config.json", 100),
    "config of an unknown kind": lambda folder: (folder / "config.json").write_text('{"model_type": "zorblax"}'),
}


@pytest.mark.parametrize("damage", BREAK)
def test_a_damaged_model_is_an_error_that_names_the_folder(tiny: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny, folder)
    BREAK[damage](folder)
    with pytest.raises(EncoderError) as refused:
        _encoder(folder).encode(PROFILES[:1])
    assert str(folder) in str(refused.value)
    assert "fetch it again" in str(refused.value)


@pytest.mark.parametrize("kept", [0, 3, 1000])
def test_a_cut_off_gguf_file_is_an_error_that_names_it(smollm2_gguf: Path, tmp_path: Path, kept: int) -> None:
    with smollm2_gguf.open("rb") as file:
        (tmp_path / "broken.gguf").write_bytes(file.read(kept))
    with pytest.raises(EncoderError, match=r"broken\.gguf could not be read"):
        LanguageModelEncoder("a/b", TEMPLATE, LanguageModelFiles(tmp_path, "broken.gguf")).encode(PROFILES[:1])


def test_a_base_model_without_chat_template_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(EncoderError, match=r"base has no chat template.*instruction-tuned"):
        _encoder(folder).encode(PROFILES[:1])


def test_a_template_that_cannot_be_filled_is_refused_before_any_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="<<ZORK>>"):
        _encoder(tmp_path / "nowhere", template="<<ZORK>>").encode(PROFILES[:1])


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "model" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    return path


def test_the_cache_key_follows_what_the_embedding_depends_on(model_file: Path) -> None:
    def key(profile: Profile = PROFILES[0], template: str = TEMPLATE, name: str = "a/b") -> str:
        return LanguageModelEncoder(name, template, LanguageModelFiles(model_file.parent)).cache_key(profile)

    keys = [key(), key(PROFILES[1]), key(template=TEMPLATE + " "), key(name="a/c")]
    model_file.write_bytes(b"more weights")
    keys.append(key())
    os.utime(model_file, (1, 1))
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == keys[-1]


def test_the_cache_key_follows_the_precision(model_file: Path) -> None:
    class HalfHost(CPUHost):
        dtype = torch.bfloat16

    assert _encoder(model_file.parent, HalfHost()).cache_key(Profile()) != _encoder(model_file.parent).cache_key(
        Profile()
    )


def test_the_cache_key_of_a_gguf_file_ignores_its_neighbours(model_file: Path) -> None:
    encoder = LanguageModelEncoder("a/b", TEMPLATE, LanguageModelFiles(model_file.parent, model_file.name))
    before = encoder.cache_key(Profile())
    (model_file.parent / "another.gguf").write_bytes(b"x")
    assert encoder.cache_key(Profile()) == before


def test_name_and_notes_change_neither_cache_key_nor_identity(model_file: Path) -> None:
    encoder = _encoder(model_file.parent)
    named = Profile(age=9, name="Zorblax", notes="Zorblax")
    assert encoder.cache_key(named) == encoder.cache_key(Profile(age=9))
    assert encoder.identity.startswith("llm:tiny:")


def test_the_identity_follows_model_and_template_but_not_the_place(tmp_path: Path) -> None:
    def identity(name: str, template: str, folder: str) -> str:
        return LanguageModelEncoder(name, template, LanguageModelFiles(tmp_path / folder)).identity

    here = identity("Qwen/Qwen2.5-7B-Instruct", TEMPLATE, "a")
    assert identity("Qwen/Qwen2.5-7B-Instruct", TEMPLATE, "b") == here
    assert identity("Qwen2.5-7B-Instruct", TEMPLATE, "a") == here
    assert identity("Qwen/Qwen2.5-3B-Instruct", TEMPLATE, "a") != here
    assert identity("Qwen/Qwen2.5-7B-Instruct", TEMPLATE + ".", "a") != here


@pytest.mark.parametrize(
    ("stored", "name", "folder", "gguf_file"),
    [
        ("owner/model/config.json", "owner/model", "owner/model", None),
        ("model/config.json", "owner/model", "model", None),
        ("model/config.json", "model", "model", None),
        ("model.gguf", "owner/model", "", "model.gguf"),
        ("model.Q4_1.gguf", "owner/model", "", "model.Q4_1.gguf"),
        ("model-q4_k_m.gguf", "model", "", "model-q4_k_m.gguf"),
        ("model/anything.gguf", "owner/model", "model", "anything.gguf"),
        ("owner/model/anything.gguf", "owner/model", "owner/model", "anything.gguf"),
    ],
)
def test_a_model_is_found_in_any_of_the_folders(
    tmp_path: Path, stored: str, name: str, folder: str, gguf_file: str | None
) -> None:
    path = tmp_path / "second" / stored
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    found = find_language_model(name, [tmp_path / "missing", tmp_path / "second"])
    assert found == LanguageModelFiles(tmp_path / "second" / folder, gguf_file)


@pytest.mark.parametrize("stored", ["models.gguf", "another/config.json", "model/readme.md", "model.txt"])
def test_a_missing_model_is_named_with_its_folder_and_the_command_that_fetches_it(tmp_path: Path, stored: str) -> None:
    (tmp_path / stored).parent.mkdir(exist_ok=True)
    (tmp_path / stored).write_bytes(b"")
    with pytest.raises(EncoderError) as refused:
        find_language_model("owner/model", [tmp_path, tmp_path / "second"])
    message = str(refused.value)
    assert f"the folder {tmp_path / 'model'}" in message
    assert f'hf download owner/model --local-dir "{tmp_path / "model"}"' in message


def test_a_missing_model_without_any_folder_still_says_where_it_belongs() -> None:
    with pytest.raises(EncoderError, match="hf download owner/model"):
        find_language_model("owner/model", [])
