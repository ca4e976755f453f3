"""Adapter files: our own format goes round unchanged, and both variants of the published release are read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfyui_psa.adapter import AdapterConfig, AdapterError, EncoderSpec, PSAAdapter, load_adapter, save_adapter
from comfyui_psa.training.synthetic import write_release_adapter

MakeAdapter = Callable[..., PSAAdapter]

SD1_SIZES = (320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320, 320, 1280)
SDXL_SIZES = (640,) * 4 + (1280,) * 50 + (640,) * 6 + (1280,) * 10


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal down to the sign of a zero."""
    return first.dtype == second.dtype == torch.float32 and torch.equal(
        first.view(torch.int32), second.view(torch.int32)
    )


def same_adapter(first: PSAAdapter, second: PSAAdapter) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return (
        first.config == second.config
        and ours.keys() == theirs.keys()
        and all(same_bits(ours[name], theirs[name]) for name in ours)
    )


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def as_safetensors(release: Path) -> Path:
    """The variant of a release: the same names behind prefixes."""
    content = torch.load(release, weights_only=True)
    path = release.with_suffix(".safetensors")
    save_file({f"{group}.{name}": tensor for group in content for name, tensor in content[group].items()}, path)
    return path


@pytest.fixture
def rich(random_adapter: MakeAdapter) -> PSAAdapter:
    """An adapter whose every field and tensor differs from the default."""
    adapter = random_adapter(
        seed=3,
        null="none",
        base="toy",
        categories=("Spiders", "Clowns"),
        encoder=EncoderSpec(kind="llm", name="org/model", template="Alter {Age}, für {Gender}\n"),
        training={"steps": 1400, "rate": 2e-3, "losses": [0.693, None], "data": {"name": "drawn", "seeds": [1, 2]}},
    )
    adapter.embedding_mean.copy_(torch.linspace(-1, 1, 10))
    adapter.embedding_std.copy_(torch.linspace(0.1, 3, 10))
    adapter.sites[1].to_v_user.weight[0] = -0.0
    return adapter


@pytest.fixture(scope="module")
def sd1_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd1") / "psa_adapter.bin"
    write_release_adapter(path, SD1_SIZES, 768, 3584)
    return path


def test_round_trip_keeps_every_bit_and_field(rich: PSAAdapter, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(rich, path)
    assert same_adapter(load_adapter(path), rich)


def test_file_written_again_from_what_was_read_is_the_same(rich: PSAAdapter, tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save_adapter(rich, first)
    save_adapter(load_adapter(first), second)
    assert metadata_of(first) == metadata_of(second)
    before, after = load_file(first), load_file(second)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounded_weights_take_half_the_room_and_are_the_rounded_ones(
    rich: PSAAdapter, dtype: torch.dtype, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in rich.state_dict().items()}
    save_adapter(rich, tmp_path / "whole.safetensors")
    path = tmp_path / "adapter.safetensors"
    save_adapter(rich, path, dtype)
    statistics = {"embedding_mean", "embedding_std"}
    assert {tensor.dtype.itemsize for name, tensor in load_file(path).items() if name not in statistics} == {2}
    assert all(
        same_bits(tensor, before[name] if name in statistics else before[name].to(dtype).float())
        for name, tensor in load_adapter(path).state_dict().items()
    )
    assert all(same_bits(tensor, before[name]) for name, tensor in rich.state_dict().items())


def test_weights_too_large_for_a_precision_are_refused_and_nothing_is_written(rich: PSAAdapter, tmp_path: Path) -> None:
    with torch.no_grad():
        rich.user_proj.proj.weight[0, 0] = 1e6
    path = tmp_path / "adapter.safetensors"
    with pytest.raises(AdapterError, match=r"user_proj\.proj\.weight .*float16.* bfloat16"):
        save_adapter(rich, path, torch.float16)
    assert not path.exists()


def test_file_describes_itself(rich: PSAAdapter, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(rich, path)
    metadata = metadata_of(path)
    assert metadata["format"] == "psa_adapter"
    assert metadata["format_version"] == "2"
    assert json.loads(metadata["config"]) == {
        "constant": True,
        "gated": None,
        "text": None,
        "base": "toy",
        "hidden_sizes": [8, 16, 24],
        "cross_attention_dim": 12,
        "embedding_dim": 10,
        "num_tokens": 1,
        "null": "none",
        "encoder": {"kind": "llm", "name": "org/model", "template": "Alter {Age}, für {Gender}\n"},
        "categories": ["Spiders", "Clowns"],
        "training": {
            "steps": 1400,
            "rate": 2e-3,
            "losses": [0.693, None],
            "data": {"name": "drawn", "seeds": [1, 2]},
        },
    }


def test_file_holds_the_documented_tensors_and_no_keys(release: Path) -> None:
    path = release.with_name("converted.safetensors")
    save_adapter(load_adapter(release), path)
    assert {name: list(tensor.shape) for name, tensor in load_file(path).items()} == {
        "user_proj.proj.weight": [12, 10],
        "user_proj.proj.bias": [12],
        "user_proj.norm.weight": [12],
        "user_proj.norm.bias": [12],
        "sites.0.to_v_user.weight": [8, 12],
        "sites.1.to_v_user.weight": [16, 12],
        "sites.2.to_v_user.weight": [24, 12],
        "embedding_mean": [10],
        "embedding_std": [10],
    }


def test_sd1_file_is_half_of_the_release(sd1_release: Path) -> None:
    path = sd1_release.with_name("converted.safetensors")
    save_adapter(load_adapter(sd1_release), path)
    values, projection = 9_584_640, 2_754_816
    assert path.stat().st_size == pytest.approx(4 * values + 2 * projection, rel=0.002)
    assert path.stat().st_size < 0.55 * sd1_release.stat().st_size


@pytest.mark.parametrize("convert", [Path, as_safetensors], ids=["bin", "safetensors"])
def test_loaded_adapter_is_float32_and_at_rest(release: Path, convert: Callable[[Path], Path]) -> None:
    adapter = load_adapter(convert(release))
    assert {tensor.dtype for tensor in adapter.state_dict().values()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in adapter.parameters())
    assert not adapter.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("convert", [Path, as_safetensors], ids=["bin", "safetensors"])
def test_weights_of_any_precision_become_float32(
    release: Path, convert: Callable[[Path], Path], dtype: torch.dtype
) -> None:
    content = torch.load(release, weights_only=True)
    stored = content["psa_adapter"]["1.to_v_user.0.weight"].to(dtype)
    content["psa_adapter"]["1.to_v_user.0.weight"] = stored
    torch.save(content, release)
    assert same_bits(load_adapter(convert(release)).sites[1].to_v_user.weight, stored.float())


def test_release_is_read_as_it_was_written(release: Path) -> None:
    content = torch.load(release, weights_only=True)
    adapter = load_adapter(release)
    tensors = adapter.state_dict()
    for i in range(3):
        assert torch.equal(tensors[f"sites.{i}.to_v_user.weight"], content["psa_adapter"][f"{i}.to_v_user.0.weight"])
    for name, tensor in content["user_proj"].items():
        assert torch.equal(tensors[f"user_proj.{name}"], tensor.float())
    assert not tensors["embedding_mean"].any()
    assert (tensors["embedding_std"] == 1).all()


def test_release_is_described_as_the_papers(release: Path) -> None:
    config = load_adapter(release).config
    assert config.hidden_sizes == (8, 16, 24)
    assert (config.cross_attention_dim, config.embedding_dim, config.num_tokens) == (12, 10, 1)
    assert (config.kinds, config.null) == (("constant",), "zero_embedding")
    assert config.encoder == EncoderSpec(kind="llm", name="Qwen/Qwen2.5-7B-Instruct", template=None)
    assert "published" in config.training["source"]


def test_both_variants_of_the_release_are_the_same_adapter(release: Path) -> None:
    assert same_adapter(load_adapter(release), load_adapter(as_safetensors(release)))


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_pickle_may_have_any_torch_suffix(release: Path, suffix: str) -> None:
    renamed = release.with_suffix(suffix)
    renamed.write_bytes(release.read_bytes())
    assert same_adapter(load_adapter(renamed), load_adapter(release))


def test_pickle_in_torchs_older_format_is_read(release: Path) -> None:
    older = release.with_name("older.bin")
    torch.save(torch.load(release, weights_only=True), older, _use_new_zipfile_serialization=False)
    assert same_adapter(load_adapter(older), load_adapter(release))


def test_release_with_more_than_ten_layers_keeps_their_order(tmp_path: Path) -> None:
    path = tmp_path / "psa_adapter.bin"
    sizes = tuple(range(8, 8 + 13))
    write_release_adapter(path, sizes, 12, 10)
    assert load_adapter(path).config.hidden_sizes == sizes
    assert load_adapter(as_safetensors(path)).config.hidden_sizes == sizes


@pytest.mark.parametrize("convert", [Path, as_safetensors], ids=["bin", "safetensors"])
def test_keys_of_the_release_have_no_effect(release: Path, convert: Callable[[Path], Path]) -> None:
    content = torch.load(release, weights_only=True)
    with_keys = load_adapter(convert(release))
    assert not any("to_k" in name for name in with_keys.state_dict())
    bare = release.with_name("bare.bin")
    values = {name: tensor for name, tensor in content["psa_adapter"].items() if "to_v" in name}
    torch.save(content | {"psa_adapter": values}, bare)
    assert same_adapter(load_adapter(convert(bare)), with_keys)


def test_sd1_release_is_recognised(sd1_release: Path) -> None:
    adapter = load_adapter(sd1_release)
    assert adapter.config.base == "sd1"
    assert adapter.config.hidden_sizes == SD1_SIZES
    assert (adapter.config.cross_attention_dim, adapter.config.embedding_dim) == (768, 3584)


def test_sdxl_release_is_recognised(tmp_path: Path) -> None:
    """Of full size in memory; in the file every matrix is one number, repeated."""
    path = tmp_path / "psa_adapter.bin"
    number = torch.tensor(0.5)
    layers = {f"{i}.to_v_user.0.weight": number.expand(hidden, 2048) for i, hidden in enumerate(SDXL_SIZES)}
    projection = {"proj.weight": number.expand(2048, 3584)}
    projection |= {name: number.expand(2048) for name in ("proj.bias", "norm.weight", "norm.bias")}
    torch.save({"psa_adapter": layers, "user_proj": projection}, path)
    config = load_adapter(path).config
    assert config.base == "sdxl"
    assert config.hidden_sizes == SDXL_SIZES
    assert (config.cross_attention_dim, config.embedding_dim) == (2048, 3584)


@pytest.mark.parametrize("convert", [Path, as_safetensors], ids=["bin", "safetensors"])
def test_template_beside_the_release_is_kept(release: Path, convert: Callable[[Path], Path]) -> None:
    template = "Alter: {Age}\nDescribe für {Gender} “safety”.\n"
    release.with_name("get_embeds.txt").write_text(template, encoding="utf-8")
    loaded = load_adapter(convert(release))
    assert loaded.config.encoder.template == template
    saved = release.with_name("saved") / "adapter.safetensors"
    saved.parent.mkdir()
    save_adapter(loaded, saved)
    assert load_adapter(saved).config.encoder.template == template


def test_template_does_not_change_our_own_files(rich: PSAAdapter, tmp_path: Path) -> None:
    save_adapter(rich, tmp_path / "adapter.safetensors")
    (tmp_path / "get_embeds.txt").write_text("another", encoding="utf-8")
    assert load_adapter(tmp_path / "adapter.safetensors").config == rich.config


def test_saving_replaces_an_older_file_and_leaves_nothing_else(
    rich: PSAAdapter, random_adapter: MakeAdapter, tmp_path: Path
) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(random_adapter(), path)
    save_adapter(rich, path)
    assert same_adapter(load_adapter(path), rich)
    assert list(tmp_path.iterdir()) == [path]


def test_saving_leaves_the_adapter_as_it_was(rich: PSAAdapter, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in rich.state_dict().items()}
    save_adapter(rich, tmp_path / "adapter.safetensors")
    assert all(same_bits(tensor, before[name]) for name, tensor in rich.state_dict().items())


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_everyone_may_read_the_file_and_only_the_owner_write(rich: PSAAdapter, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    path.touch(0o600)
    save_adapter(rich, path)
    assert path.stat().st_mode & 0o777 == 0o644


def tie_weights(adapter: PSAAdapter) -> PSAAdapter:
    """Two layers with the same memory, which safetensors refuses to write."""
    config = AdapterConfig(**adapter.config.model_dump() | {"hidden_sizes": (8, 8), "base": ""})
    tied = PSAAdapter(config)
    torch.nn.init.normal_(tied.sites[0].to_v_user.weight)
    tied.sites[1].to_v_user.weight = tied.sites[0].to_v_user.weight
    return tied


def add_unwritable_note(adapter: PSAAdapter) -> PSAAdapter:
    """Training notes that JSON cannot hold."""
    return PSAAdapter(adapter.config.model_copy(update={"training": {"object": object()}}))


@pytest.mark.parametrize("spoil", [tie_weights, add_unwritable_note])
def test_failed_save_leaves_the_file_and_no_litter(
    rich: PSAAdapter, tmp_path: Path, spoil: Callable[[PSAAdapter], PSAAdapter]
) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(rich, path)
    before = path.read_bytes()
    with pytest.raises((RuntimeError, ValueError)):
        save_adapter(spoil(rich), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_leaves_the_file_and_no_litter(
    rich: PSAAdapter, random_adapter: MakeAdapter, tmp_path: Path, full_disk: Callable[[], Any]
) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(rich, path)
    other = random_adapter(seed=9)
    with full_disk(), pytest.raises(Exception, match="too large"):
        save_adapter(other, path)
    assert same_adapter(load_adapter(path), rich)
    assert list(tmp_path.iterdir()) == [path]


def test_save_into_a_folder_that_is_gone_makes_nothing(rich: PSAAdapter, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="gone"):
        save_adapter(rich, tmp_path / "gone" / "adapter.safetensors")
    assert list(tmp_path.iterdir()) == []
