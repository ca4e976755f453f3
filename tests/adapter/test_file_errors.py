"""Files that are no adapter, or not a whole one: each is refused by name, with what is wrong, and runs no code."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfyui_psa.adapter import AdapterError, PSAAdapter, load_adapter, save_adapter

Content = dict[str, Any]
Tensors = dict[str, Tensor]
NAN, INFINITY = float("nan"), float("inf")


def assert_refused(path: Path, *words: str) -> str:
    """Loading fails with a message that has the file's name and these words, in any case."""
    with pytest.raises(AdapterError) as caught:
        load_adapter(path)
    message = str(caught.value)
    for word in (path.name, *words):
        assert word.lower() in message.lower()
    return message


@pytest.fixture
def ours(random_adapter: Callable[..., PSAAdapter], tmp_path: Path) -> Path:
    """An adapter in our own format."""
    path = tmp_path / "adapter.safetensors"
    save_adapter(random_adapter(), path)
    return path


def rewrite(path: Path, tensors: Tensors | None = None, metadata: dict[str, str | None] | None = None) -> None:
    """Change tensors and metadata of a file in our format; None as metadata removes."""
    with safe_open(path, framework="pt") as file:
        new = file.metadata() | (metadata or {})
    save_file(
        load_file(path) | (tensors or {}), path, {name: value for name, value in new.items() if value is not None}
    )


def redescribe(path: Path, fields: Content, **metadata: str | None) -> None:
    """Change fields of the configuration in a file in our format, and other metadata."""
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"]) | fields
    rewrite(path, metadata={"config": json.dumps(config)} | metadata)


def spoil(release: Path, suffix: str, change: Callable[[Content], Any]) -> Path:
    """Write a changed copy of a release: as pickle, or as its safetensors variant."""
    content = torch.load(release, weights_only=True)
    change(content)
    path = release.with_name(f"spoiled{suffix}")
    if suffix == ".bin":
        torch.save(content, path)
    else:
        save_file({f"{group}.{name}": value for group in content for name, value in content[group].items()}, path)
    return path


def put(group: str, name: str, tensor: object) -> Callable[[Content], None]:
    return lambda content: content[group].update({name: tensor})


def without(group: str, *names: str) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        for name in names:
            del content[group][name]

    return change


# -- No readable file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter.safetensors", "psa_adapter.bin", "adapter.ckpt"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    assert_refused(tmp_path / name, "no adapter file", str(tmp_path))


def test_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    assert_refused(folder, "no adapter file")


@pytest.mark.parametrize("suffix", [".ckpt", ".txt", ".gguf", ""])
def test_unknown_suffix(release: Path, suffix: str) -> None:
    path = release.with_name(f"renamed{suffix}")
    path.write_bytes(release.read_bytes())
    assert_refused(path, ".safetensors", ".bin")


TEXTS = {
    "empty": b"",
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 87696384\n",
    "html": b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n",
    "not-found": b"Entry not found",
    "json": b'{"error": "Repository not found"}',
    "upstream": b"upstream request timeout\n",
    "readme": b"The adapter is in the other folder.\n",
    "rate-limit": b"rate limit exceeded\n",
    "access": b"access to this repository is restricted\n",
}


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_under_the_name_of_an_adapter(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"adapter{suffix}"
    path.write_bytes(TEXTS[text])
    assert_refused(path, "could not be read", "again")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95, 0.999])
def test_truncated_safetensors(ours: Path, share: float) -> None:
    ours.write_bytes(ours.read_bytes()[: int(share * ours.stat().st_size)])
    assert_refused(ours, "could not be read", "not fully downloaded")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95, 0.999])
def test_truncated_pickle(release: Path, share: float) -> None:
    release.write_bytes(release.read_bytes()[: int(share * release.stat().st_size)])
    assert_refused(release, "could not be read", "not fully downloaded")


def test_pickle_of_torchs_older_format_truncated_anywhere(release: Path) -> None:
    older = release.with_name("older.bin")
    torch.save(torch.load(release, weights_only=True), older, _use_new_zipfile_serialization=False)
    whole = older.read_bytes()
    for size in range(1, len(whole), 61):
        older.write_bytes(whole[:size])
        assert_refused(older)


class Trap:
    """Makes a folder when something unpickles it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "alone"])
def test_code_in_a_pickle_is_not_run(release: Path, zipped: bool, inside: bool) -> None:
    trap = Trap(release.with_name("marker"))
    content = torch.load(release, weights_only=True)
    content["psa_adapter"]["0.to_v_user.0.weight"] = trap
    path = release.with_name("trap.bin")
    torch.save(content if inside else trap, path, _use_new_zipfile_serialization=zipped)
    assert_refused(path, "code")
    assert not trap.marker.exists()
    torch.load(path, weights_only=False)
    assert trap.marker.exists()


def test_code_in_a_bare_pickle_is_not_run(tmp_path: Path) -> None:
    path, marker = tmp_path / "trap.bin", tmp_path / "marker"
    path.write_bytes(pickle.dumps(Trap(marker), protocol=2))
    assert_refused(path, "code")
    assert not marker.exists()


# -- Something else -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_lora(tmp_path: Path, suffix: str) -> None:
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v"
    tensors = {f"{block}.lora_down.weight": torch.ones(4, 768), f"{block}.lora_up.weight": torch.ones(320, 4)}
    path = tmp_path / f"lora{suffix}"
    torch.save(tensors, path) if suffix == ".bin" else save_file(tensors, path, {"format": "pt"})
    assert_refused(path, "not a PSA adapter", "LoRA")


@pytest.mark.parametrize(
    "content",
    [
        {},
        [torch.ones(2)],
        torch.ones(2),
        {"psa_adapter": torch.ones(2), "user_proj": torch.ones(2)},
        {"psa_adapter": [torch.ones(2)], "user_proj": {}},
        {"psa_adapter": {"0": {"to_v_user": torch.ones(2, 2)}}, "user_proj": {"proj": {}}},
        {1: {2: torch.ones(2)}},
        {"step": 1000},
    ],
    ids=["empty", "list", "tensor", "flat", "list-inside", "nested-deeper", "numbers-as-names", "number"],
)
def test_pickle_of_something_else(tmp_path: Path, content: object) -> None:
    path = tmp_path / "other.bin"
    torch.save(content, path)
    assert_refused(path, "not a PSA adapter")


@pytest.mark.parametrize("value", ["text", 7, None, [1.0, 2.0]], ids=str)
def test_release_with_something_else_than_tensors(release: Path, value: object) -> None:
    path = spoil(release, ".bin", put("psa_adapter", "1.to_v_user.0.weight", value))
    assert_refused(path, "not a PSA adapter")


# -- A release that is not whole ----------------------------------------------------------------------------------

V0, V1, V2 = (f"{i}.to_v_user.0.weight" for i in range(3))
K1 = "1.to_k_user.0.weight"
RELEASE_FAULTS: dict[str, tuple[Callable[[Content], Any], tuple[str, ...]]] = {
    "a layer in the middle": (without("psa_adapter", V1, K1), ("missing", f"psa_adapter.{V1}")),
    "the values of a layer": (without("psa_adapter", V1), ("missing", f"psa_adapter.{V1}")),
    "the values of the last": (without("psa_adapter", V2), ("missing", f"psa_adapter.{V2}")),
    "no projection": (lambda content: content.update(user_proj={}), ("user projection",)),
    "no layers": (lambda content: content.update(psa_adapter={}), ("user cross-attention",)),
    "no norm": (without("user_proj", "norm.weight", "norm.bias"), ("missing", "user_proj.norm.bias")),
    "an unknown layer": (put("psa_adapter", "0.to_q_user.0.weight", torch.ones(8, 12)), ("belong", "to_q_user")),
    "an unknown group": (lambda content: content.update(ema={"decay": torch.ones(1)}), ("belong", "ema.decay")),
    "two tokens in a layer": (put("psa_adapter", "0.to_v_user.1.weight", torch.ones(8, 12)), ("more than one",)),
    "two tokens projected": (put("user_proj", "proj.weight", torch.ones(24, 10)), ("more than one user token",)),
    "a narrow layer": (put("psa_adapter", V1, torch.ones(16, 11)), ("[16, 11]", "[16, 12]")),
    "a layer of one dimension": (put("psa_adapter", V1, torch.ones(16)), (V1, "[16]")),
    "an empty layer": (put("psa_adapter", V1, torch.ones(0, 12)), (V1, "[0, 12]")),
    "a projection of one dimension": (put("user_proj", "proj.weight", torch.ones(12)), ("proj.weight", "[12]")),
    "an empty projection": (put("user_proj", "proj.weight", torch.ones(12, 0)), ("proj.weight", "[12, 0]")),
    "a short bias": (put("user_proj", "proj.bias", torch.ones(5)), ("proj.bias", "[5]", "[12]")),
    "a short norm": (put("user_proj", "norm.weight", torch.ones(5)), ("norm.weight", "[5]", "[12]")),
    "NaN in a layer": (put("psa_adapter", V1, torch.full((16, 12), NAN)), ("NaN", "sites.1")),
    "infinity in a layer": (put("psa_adapter", V1, torch.full((16, 12), -INFINITY)), ("infinity", "sites.1")),
    "NaN in the projection": (
        put("user_proj", "proj.bias", torch.full((12,), NAN, dtype=torch.bfloat16)),
        ("NaN", "user_proj.proj.bias"),
    ),
    "integers": (put("psa_adapter", V1, torch.ones(16, 12, dtype=torch.int32)), ("sites.1",)),
}


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("fault", RELEASE_FAULTS)
def test_release_that_is_not_whole(release: Path, fault: str, suffix: str) -> None:
    change, words = RELEASE_FAULTS[fault]
    assert_refused(spoil(release, suffix, change), *words)


def test_template_beside_the_release_that_is_not_text(release: Path) -> None:
    release.with_name("get_embeds.txt").write_bytes(b"\xff\xfe{\x00A\x00g\x00e\x00}\x00")
    with pytest.raises(AdapterError, match=r"get_embeds\.txt"):
        load_adapter(release)


# -- Our own format, not whole ------------------------------------------------------------------------------------

OUR_TENSOR_FAULTS: dict[str, tuple[Tensors, tuple[str, ...]]] = {
    "an extra layer": ({"sites.3.to_v_user.weight": torch.ones(8, 12)}, ("too many", "sites.3")),
    "keys": ({"sites.0.to_k_user.weight": torch.ones(8, 12)}, ("too many", "to_k_user")),
    "a wrong shape": ({"sites.1.to_v_user.weight": torch.ones(12, 16)}, ("[12, 16]", "[16, 12]", "sites.1")),
    "NaN": ({"sites.1.to_v_user.weight": torch.full((16, 12), NAN)}, ("NaN", "sites.1")),
    "infinity": ({"embedding_mean": torch.full((10,), INFINITY)}, ("infinity", "embedding_mean")),
    "NaN deviation": ({"embedding_std": torch.full((10,), NAN)}, ("NaN", "embedding_std")),
    "zero deviation": ({"embedding_std": torch.cat([torch.ones(9), torch.zeros(1)])}, ("deviation", "positive")),
    "negative deviation": ({"embedding_std": -torch.ones(10)}, ("deviation", "positive")),
    "integers": ({"embedding_mean": torch.zeros(10, dtype=torch.int64)}, ("embedding_mean",)),
    "infinity once it is float32": (
        {"sites.1.to_v_user.weight": torch.full((16, 12), 1e300, dtype=torch.float64)},
        ("infinity", "sites.1"),
    ),
    "zero deviation once it is float32": (
        {"embedding_std": torch.full((10,), 1e-300, dtype=torch.float64)},
        ("deviation", "positive"),
    ),
}


@pytest.mark.parametrize("fault", OUR_TENSOR_FAULTS)
def test_our_file_with_other_tensors(ours: Path, fault: str) -> None:
    tensors, words = OUR_TENSOR_FAULTS[fault]
    rewrite(ours, tensors)
    assert_refused(ours, *words)


@pytest.mark.parametrize("name", ["sites.1.to_v_user.weight", "user_proj.proj.weight", "embedding_std"])
def test_our_file_without_a_tensor(ours: Path, name: str) -> None:
    with safe_open(ours, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(ours)
    del tensors[name]
    save_file(tensors, ours, metadata)
    assert_refused(ours, "1", name, "missing")


DESCRIPTION_FAULTS: dict[str, tuple[Content, tuple[str, ...]]] = {
    "unknown kind": ({"kind": "text"}, ("kind",)),
    "two tokens": ({"num_tokens": 2}, ("2 user tokens", "one")),
    "unknown field": ({"colour": "blue"}, ("colour",)),
    "unknown null": ({"null": "empty"}, ("null",)),
    "unknown encoder": ({"encoder": {"kind": "oracle", "name": "1"}}, ("encoder.kind",)),
    "no layers": ({"hidden_sizes": []}, ("hidden_sizes",)),
    "no list of layers": ({"hidden_sizes": "wide"}, ("hidden_sizes",)),
    "fewer layers": ({"hidden_sizes": [8, 16]}, ("too many", "sites.2")),
    "more layers": ({"hidden_sizes": [8, 16, 24, 32]}, ("missing", "sites.3")),
    "another embedding": ({"embedding_dim": 11}, ("shape", "11")),
    "an embedding beyond memory": ({"embedding_dim": 10**15}, ("shape",)),
    "a layer beyond memory": ({"hidden_sizes": [8, 16, 10**15]}, ("shape", "sites.2")),
}


@pytest.mark.parametrize("fault", DESCRIPTION_FAULTS)
def test_our_file_with_another_description(ours: Path, fault: str) -> None:
    config, words = DESCRIPTION_FAULTS[fault]
    redescribe(ours, config)
    assert_refused(ours, *words)


METADATA_FAULTS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "later version": ("format_version", "3", ("version 3", "up to 2", "update")),
    "no version": ("format_version", None, ("version unknown",)),
    "broken JSON": ("config", '{"constant": true', ("JSON",)),
    "JSON of something else": ("config", "[]", ("config",)),
    "no description": ("config", None, ("config",)),
    "no format": ("format", None, ("not a PSA adapter",)),
    "another format": ("format", "pt", ("not a PSA adapter",)),
}


@pytest.mark.parametrize("fault", METADATA_FAULTS)
def test_our_file_with_other_metadata(ours: Path, fault: str) -> None:
    name, value, words = METADATA_FAULTS[fault]
    rewrite(ours, metadata={name: value})
    assert_refused(ours, *words)


def test_future_version_is_told_before_its_description_is_read(ours: Path) -> None:
    redescribe(ours, {"colour": "blue"}, format_version="3")
    assert "colour" not in assert_refused(ours, "version 3")
