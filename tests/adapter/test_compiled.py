"""Compiled profiles as files: every kind comes back bit for bit, nothing private is in them, and bad ones are named."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds_by_hand import GATED, MLP, TEXT, kinds_adapter, users
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfyui_psa.adapter import (
    FAMILIES,
    AdapterConfig,
    AdapterError,
    CompiledProfile,
    EncoderSpec,
    GatedSpec,
    PSAAdapter,
    Site,
    TextSpec,
    UserEffect,
    adapter_hash,
    compile_profile,
    load_adapter,
    load_compiled,
    mixed,
    save_adapter,
    save_compiled,
)
from comfyui_psa.adapter.sites import BlockKey

SIZES, WIDTH, POOLED = (8, 16, 24), 12, 6
KINDS: dict[str, dict[str, Any]] = {
    "constant": {"constant": True, "null": "zero_embedding"},
    "constant without null": {"constant": True, "null": "none"},
    "gated": {"gated": GATED},
    "text": {"text": TEXT.model_copy(update={"pooled_dim": POOLED})},
    "text mlp": {"text": MLP.model_copy(update={"pooled_dim": POOLED})},
    "text without pooled": {"text": TEXT, "hidden_sizes": ()},
    "all": {"constant": True, "null": "zero_embedding", "gated": GATED, "text": TEXT},
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))


def adapter_of(kind: str, seed: int = 0) -> PSAAdapter:
    return kinds_adapter(**{"hidden_sizes": SIZES, "context_dim": WIDTH, "seed": seed, **KINDS[kind]})


def compiled(kind: str, categories: tuple[str, ...] | None = None, user: int = 0) -> CompiledProfile:
    adapter = adapter_of(kind)
    return compile_profile(adapter, adapter.effect(users(user).vectors), categories)


def tensors_of(part: Any) -> list[Tensor]:
    """All tensors of an effect, in order; what is missing counts as an empty one."""
    if part is None:
        return [torch.empty(0)]
    return [part] if isinstance(part, Tensor) else [tensor for inner in part for tensor in tensors_of(inner)]


def largest_difference(ours: UserEffect, theirs: UserEffect) -> float:
    """As a share of each tensor's largest value."""
    pairs = list(zip(tensors_of(ours), tensors_of(theirs), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs if a.numel())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mine.safetensors"


@each_kind
def test_what_comes_back_is_what_the_adapter_does_bit_for_bit(path: Path, kind: str) -> None:
    profile = compiled(kind)
    save_compiled(profile, path)
    loaded = load_compiled(path)
    assert loaded.spec == profile.spec
    theirs = adapter_of(kind).effect(users(0).vectors)
    assert largest_difference(loaded.effect, theirs) == 0
    assert [tensor.stride() for tensor in tensors_of(loaded.effect)] == [
        tensor.stride() for tensor in tensors_of(theirs)
    ], "numbers that lie otherwise in memory are multiplied in another order"
    assert largest_difference(loaded.effect, adapter_of(kind).effect(users(1).vectors)) > 0.01


@each_kind
def test_in_half_precision_every_number_is_rounded_once(path: Path, kind: str) -> None:
    profile = compiled(kind)
    save_compiled(profile, path, "fp16")
    pairs = zip(tensors_of(load_compiled(path).effect), tensors_of(profile.effect), strict=True)
    assert all(torch.equal(ours, theirs.half().float()) for ours, theirs in pairs)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}


@pytest.mark.parametrize("kind", ["all", "text mlp"])
def test_a_mixture_is_somebody_too(path: Path, kind: str) -> None:
    adapter = adapter_of(kind)
    mixture = mixed([adapter.effect(users(number).vectors) for number in (0, 1)], [0.7, 0.3])
    save_compiled(compile_profile(adapter, mixture), path)
    assert largest_difference(load_compiled(path).effect, mixture) == 0


def test_several_people_are_not_one() -> None:
    adapter = adapter_of("all")
    with pytest.raises(AdapterError, match=r"is of one person, and this embedding of 2\. Connect one, or mix them"):
        compile_profile(adapter, adapter.effect(users(0, 1).vectors))


def test_the_null_user_is_served_as_the_file_can() -> None:
    with_null, without = compiled("constant"), compiled("constant without null")
    assert with_null.with_null().constant == with_null.with_null("zero_embedding").constant
    vectors = with_null.with_null("none").constant
    assert vectors is not None
    assert vectors.null is None
    assert without.with_null("none").constant == without.with_null().constant
    with pytest.raises(AdapterError, match='unconditional cannot be "zero embedding"'):
        without.with_null("zero_embedding")
    assert compiled("gated").with_null("zero_embedding").constant is None  # as the adapter itself has it


# What is in a file.


def family_adapter(name: str, **kinds: Any) -> PSAAdapter:
    family = next(family for family in FAMILIES if family.name == name)
    config = AdapterConfig(
        hidden_sizes=family.hidden_sizes,
        cross_attention_dim=family.cross_attention_dim,
        embedding_dim=37,
        encoder=EncoderSpec(kind="attributes", name="attributes-1"),
        **{"constant": False, "null": "none", **kinds},
    )
    return PSAAdapter(config).requires_grad_(False)


SD1, SDXL = {"text": TextSpec()}, {"text": TextSpec(pooled_dim=1280)}
ZERO = {"constant": True, "null": "zero_embedding"}


@pytest.mark.parametrize(
    ("base", "kinds", "precision", "kilobytes"),
    [
        ("sd1", {"constant": True}, "fp16", 25),
        ("sd1", {"constant": True}, "fp32", 50),
        ("sdxl", {"constant": True}, "fp32", 333),
        ("sd1", ZERO, "fp16", 50),
        ("sdxl", ZERO, "fp32", 666),
        ("sd1", {"gated": GatedSpec()}, "fp16", 1_600),
        ("sd1", SD1, "fp16", 101),
        ("sd1", SD1, "fp32", 203),
        ("sdxl", SDXL, "fp16", 439),
        ("sdxl", SDXL, "fp32", 879),
        ("sd1", {"text": TextSpec(form="mlp")}, "fp16", 790),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_sizes_of_real_models(path: Path, base: str, kinds: dict[str, Any], precision: Any, kilobytes: int) -> None:
    adapter = family_adapter(base, **kinds)
    save_compiled(compile_profile(adapter, adapter.effect(torch.ones(1, 37))), path, precision)
    assert path.stat().st_size == pytest.approx(1000 * kilobytes, rel=0.06)


def test_the_file_names_base_and_adapter_and_nothing_of_the_person(path: Path) -> None:
    save_compiled(compiled("all"), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert set(metadata) == {"format", "format_version", "config"}
    assert json.loads(metadata["config"]) == {
        "base": "other",
        "hidden_sizes": list(SIZES),
        "cross_attention_dim": WIDTH,
        "constant": True,
        "null": "zero_embedding",
        "gated": {"heads": 4, "columns": 12},
        "text": {"heads": 2, "columns": 6},
        "pooled_dim": None,
        "adapter": adapter_hash(adapter_of("all")),
        "categories": None,
    }
    assert {name: list(tensor.shape) for name, tensor in load_file(path).items()} == {
        "constant.user": [48],
        "constant.null": [48],
        "gated.scores": [48, 12],
        "gated.values": [12, 48],
        "gated.sinks": [3, 4],
        "text.tokens.norm": [WIDTH],
        "text.tokens.norm_bias": [WIDTH],
        "text.tokens.scores": [WIDTH, 6],
        "text.tokens.values": [6, WIDTH],
        "text.tokens.sink": [2],
    }
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert repr(load_compiled(path)) == "CompiledProfile(private)"


def test_categories_are_there_if_their_owner_agrees(path: Path) -> None:
    save_compiled(compiled("constant", ("Hate", "Violence")), path)
    assert load_compiled(path).spec.categories == ("Hate", "Violence")


def test_the_hash_is_of_what_an_adapter_does(release: Path, tmp_path: Path) -> None:
    published = load_adapter(release)
    converted = tmp_path / "converted.safetensors"
    save_adapter(published, converted)
    assert adapter_hash(load_adapter(converted)) == adapter_hash(published)
    others = [adapter_of("all"), adapter_of("all", seed=1), adapter_of("constant"), adapter_of("constant without null")]
    assert len({adapter_hash(adapter) for adapter in others}) == len(others)


# Files that are there already.


def test_the_same_again_leaves_the_file_alone(path: Path) -> None:
    save_compiled(compiled("all"), path, "fp16")
    before = path.stat().st_mtime_ns, path.stat().st_ino
    save_compiled(compiled("all"), path, "fp16")
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


def test_somebody_elses_is_replaced_only_if_asked(path: Path) -> None:
    save_compiled(compiled("text"), path)
    content = path.read_bytes()
    other = compiled("text", user=1)
    with pytest.raises(AdapterError, match=r"already a compiled profile mine\.safetensors.*switch overwrite on"):
        save_compiled(other, path)
    assert path.read_bytes() == content
    save_compiled(other, path, overwrite=True)
    assert largest_difference(load_compiled(path).effect, other.effect) == 0


def test_another_kind_of_file_is_never_replaced(path: Path) -> None:
    save_adapter(adapter_of("all"), path)
    content = path.read_bytes()
    with pytest.raises(AdapterError, match="it is no compiled profile"):
        save_compiled(compiled("all"), path, overwrite=True)
    assert path.read_bytes() == content


def test_a_full_disk_leaves_what_was_there(path: Path, full_disk: Callable[[], AbstractContextManager[None]]) -> None:
    save_compiled(compiled("text"), path)
    content = path.read_bytes()
    with full_disk(), pytest.raises(AdapterError, match="cannot be written"):
        save_compiled(compiled("text", user=1), path, overwrite=True)
    assert path.read_bytes() == content
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_what_half_precision_cannot_hold_is_refused(path: Path) -> None:
    adapter = adapter_of("constant")
    adapter.get_parameter("sites.1.to_v_user.weight").mul_(1e6)
    profile = compile_profile(adapter, adapter.effect(users(0).vectors))
    with pytest.raises(AdapterError, match=r"constant\.user has numbers up to .* Save the compiled profile as fp32"):
        save_compiled(profile, path, "fp16")
    assert not path.exists()
    save_compiled(profile, path, "fp32")


# Files that are something else.


def rewrite(path: Path, tensors: dict[str, Tensor] | None = None, **fields: Any) -> None:
    """Change tensors of a compiled profile, and its description or (``format_version``) other metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    version = fields.pop("format_version", metadata["format_version"])
    metadata |= {"config": json.dumps(json.loads(metadata["config"]) | fields), "format_version": version}
    save_file({**load_file(path), **(tensors or {})}, path, metadata)


def assert_refused(path: Path, *words: str) -> None:
    with pytest.raises(AdapterError) as caught:
        load_compiled(path)
    for word in (path.name, *words):
        assert word in str(caught.value)


def test_a_missing_file(path: Path) -> None:
    assert_refused(path, "There is no compiled profile", "Put the file there")


def test_cut_off_at_any_place(path: Path) -> None:
    save_compiled(compiled("all"), path)
    content = path.read_bytes()
    for length in (0, 5, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert_refused(path, "could not be read as safetensors", "get it again")


def test_an_adapter_is_told_where_it_belongs(path: Path) -> None:
    save_adapter(adapter_of("all"), path)
    assert_refused(path, "a PSA adapter: choose it in Load PSA Adapter")


def test_a_lora_is_another_kind_of_file(path: Path) -> None:
    save_file({"lora_unet_down.lora_up.weight": torch.ones(2, 2)}, path)
    assert_refused(path, "is not a compiled profile, but another kind of file")


def test_another_version(path: Path) -> None:
    save_compiled(compiled("text"), path)
    rewrite(path, format_version="9")
    assert_refused(path, "format version 9", "reads version 1", "Update ComfyUI-PSA")


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter": "none"},
        {"gated": {"heads": 5, "columns": 12}},
        {"name": "Anna"},
        {"hidden_sizes": []},
        {"null": "maybe"},
        {"base": "sdxl"},
        {"cross_attention_dim": 0},
        {"constant": False},
        {"text": None, "pooled_dim": 4},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_description_that_makes_no_sense(path: Path, fields: dict[str, Any]) -> None:
    save_compiled(compiled("all"), path)
    rewrite(path, **fields)
    assert_refused(path, "description inside", "Compile the profile again")


def test_tensors_that_do_not_fit_the_description(path: Path) -> None:
    save_compiled(compiled("all"), path)
    content = path.read_bytes()
    whole = load_file(path)
    for change, words in [
        ({"extra": torch.ones(1)}, "extra does not belong there"),
        ({"constant.user": whole["constant.user"][:-1]}, "constant.user has shape [47]"),
        ({"gated.scores": whole["gated.scores"].T.contiguous()}, "gated.scores has shape [12, 48]"),
        ({"text.tokens.norm": whole["text.tokens.norm"].double()}, "torch.float64"),
        ({"constant.null": torch.full((48,), float("nan"))}, "not numbers (NaN or infinity)"),
    ]:
        path.write_bytes(content)
        rewrite(path, change)
        assert_refused(path, words, "Compile the profile again")
    path.write_bytes(content)
    rewrite(path, hidden_sizes=[8, 16, 25])
    assert_refused(path, "has shape [48]", "expected [49]")
    path.write_bytes(content)
    rewrite(path, pooled_dim=POOLED)
    assert_refused(path, "text.pooled.norm", "is missing")


def test_a_model_of_another_base_is_named() -> None:
    profile = compiled("constant")
    own = tuple(Site(BlockKey("input", i, 0), f"{i}", size, WIDTH) for i, size in enumerate(SIZES))
    profile.check_sites(own)
    for sites in (own[:2], tuple(Site(site.key, site.path, site.hidden_size, 768) for site in own)):
        with pytest.raises(AdapterError, match=r"was compiled for an unnamed UNet \(3 cross-attention layers, text"):
            profile.check_sites(sites)
