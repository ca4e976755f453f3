"""Compiled profiles in ComfyUI: the same latents, bit for bit, without the adapter; and what they cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sample
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_testing import TINY, TINY_SDXL, comfy_model, conditioning, difference, noise, unet_weights
from kinds_by_hand import GATED, MLP, TEXT, kinds_adapter, users
from torch import Tensor

from comfyui_psa.adapter import (
    AdapterError,
    CompiledProfile,
    PSAAdapter,
    compile_profile,
    find_sites,
    load_compiled,
    save_adapter,
)
from comfyui_psa.nodes.adapter_nodes import PSAApply
from comfyui_psa.nodes.apply import apply_psa
from comfyui_psa.nodes.compiled_nodes import PSACompileProfile, PSALoadCompiledProfile
from comfyui_psa.nodes.encode import encode_profile
from comfyui_psa.nodes.folders import register_folders
from comfyui_psa.nodes.patch import UserPatch
from comfyui_psa.nodes.people import Group, Mixture, People, count
from comfyui_psa.nodes.people_nodes import PSABatchProfiles, PSAMixProfiles, PSARepeatLatent
from comfyui_psa.profiles import (
    EncoderError,
    Profile,
    SafetyEmbedding,
    banned_categories,
    levels,
    load_embedding,
    save_embedding,
)

LATENT = noise(1, 4, 8, 8)
KINDS: dict[str, dict[str, Any]] = {
    "constant": {"constant": True, "null": "zero_embedding"},
    "constant without null": {"constant": True, "null": "none"},
    "gated": {"gated": GATED},
    "text": {"text": TEXT},
    "text mlp": {"text": MLP},
    "constant and gated": {"constant": True, "null": "zero_embedding", "gated": GATED},
    "constant and text": {"constant": True, "null": "none", "text": TEXT},
    "gated and mlp": {"gated": GATED, "text": MLP},
    "all": {"constant": True, "null": "zero_embedding", "gated": GATED, "text": TEXT},
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))


@pytest.fixture(scope="module")
def adapters(model: ModelPatcher) -> dict[str, PSAAdapter]:
    sizes = tuple(site.hidden_size for site in find_sites(model.model.diffusion_model))
    return {kind: kinds_adapter(sizes, TINY.context_dim, **parts) for kind, parts in KINDS.items()}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of compiled profiles of a ComfyUI without any files."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    (tmp_path / "models").mkdir()
    register_folders()
    return tmp_path / "models" / "psa_compiled"


def through_a_file(adapter: PSAAdapter, people: People, name: str = "mine", **options: Any) -> CompiledProfile:
    PSACompileProfile.execute(adapter, people, name, **options)
    (loaded,) = PSALoadCompiledProfile.execute(f"{name}.safetensors").args
    assert isinstance(loaded, CompiledProfile)
    return loaded


def sampled(
    model: ModelPatcher, people: People, adapter: PSAAdapter | None, shape: Any = TINY, **options: Any
) -> Tensor:
    """What Apply PSA and three steps of a sampler make of a latent."""
    inputs = {"strength": 1.3, "start_percent": 0.0, "end_percent": 1.0, **options}
    (patched,) = PSAApply.execute(model=model, embedding=people, adapter=adapter, **inputs).args
    latent = LATENT.repeat(count(people), 1, 1, 1)
    sampler, schedule = "euler", "normal"
    positive, negative = conditioning(shape, 1), conditioning(shape, 2)
    return comfy.sample.sample(
        patched, latent, 3, 4.0, sampler, schedule, positive, negative, torch.zeros_like(latent), disable_pbar=True
    )


# The same pictures.


@each_kind
@pytest.mark.parametrize("unconditional", ["as trained", "none"])
def test_it_is_the_full_path_bit_for_bit(
    model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str, unconditional: str
) -> None:
    adapter = adapters[kind]
    theirs = sampled(model, users(0), adapter, unconditional=unconditional)
    ours = sampled(model, through_a_file(adapter, users(0)), None, unconditional=unconditional)
    assert torch.equal(ours, theirs)
    assert difference(ours, sampled(model, users(1), adapter, unconditional=unconditional)) > 1e-3


def test_it_is_on_sdxl_with_its_pooled_text() -> None:
    model = comfy_model(unet_weights(TINY_SDXL))
    sizes = tuple(site.hidden_size for site in find_sites(model.model.diffusion_model))
    pooled = {"pooled_dim": TINY_SDXL.adm_channels - 6 * 256}
    for text in (TEXT, MLP):
        adapter = kinds_adapter(
            sizes, TINY_SDXL.context_dim, constant=True, text=text.model_copy(update=pooled), null="none"
        )
        ours = sampled(model, through_a_file(adapter, users(0), text.form), None, TINY_SDXL)
        assert torch.equal(ours, sampled(model, users(0), adapter, TINY_SDXL))


@each_kind
def test_in_half_precision_it_is_the_full_path_with_rounded_numbers(
    model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str
) -> None:
    adapter = adapters[kind]
    ours = sampled(model, through_a_file(adapter, users(0), precision="fp16"), None)
    theirs = sampled(model, users(0), adapter)
    assert 0 < difference(ours, theirs) < 2e-2
    assert difference(ours, theirs) < 0.05 * difference(sampled(model, users(1), adapter), theirs)


def test_a_schedule_and_a_range_act_alike(model: ModelPatcher, adapters: dict[str, PSAAdapter]) -> None:
    adapter, options = adapters["all"], {"start_percent": 0.1, "end_percent": 0.9, "schedule": "cosine"}
    ours = sampled(model, through_a_file(adapter, users(0)), None, **options)
    assert torch.equal(ours, sampled(model, users(0), adapter, **options))


def test_its_own_adapter_may_be_connected(model: ModelPatcher, adapters: dict[str, PSAAdapter]) -> None:
    adapter = adapters["all"]
    compiled = through_a_file(adapter, users(0))
    assert torch.equal(sampled(model, compiled, adapter), sampled(model, users(0), adapter))


def test_what_the_save_node_gives_is_what_the_file_holds(
    model: ModelPatcher, adapters: dict[str, PSAAdapter], folder: Path
) -> None:
    (saved,) = PSACompileProfile.execute(adapters["all"], users(0), "mine.safetensors", "fp16").args
    loaded = load_compiled(folder / "mine.safetensors")
    assert torch.equal(sampled(model, saved, None), sampled(model, loaded, None))


# Among others.


@each_kind
def test_it_mixes_as_the_person_does(model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str) -> None:
    adapter = adapters[kind]
    compiled = through_a_file(adapter, users(0))
    (expected,) = PSAMixProfiles.execute(users(0), 0.7, users(1), 0.3).args
    (beside_embedding,) = PSAMixProfiles.execute(compiled, 0.7, users(1), 0.3).args
    (of_two,) = PSAMixProfiles.execute(compiled, 0.7, through_a_file(adapter, users(1), "other"), 0.3).args
    theirs = sampled(model, expected, adapter)
    assert torch.equal(sampled(model, beside_embedding, adapter), theirs)
    assert torch.equal(sampled(model, of_two, None), theirs)
    assert torch.equal(sampled(model, through_a_file(adapter, expected, "both"), None), theirs)


@each_kind
def test_it_has_its_picture_in_a_batch(model: ModelPatcher, adapters: dict[str, PSAAdapter], kind: str) -> None:
    adapter = adapters[kind]
    (expected,) = PSABatchProfiles.execute(users(0), users(1, 2)).args
    (ours,) = PSABatchProfiles.execute(through_a_file(adapter, users(0)), users(1, 2)).args
    assert count(ours) == 3
    assert torch.equal(sampled(model, ours, adapter), sampled(model, expected, adapter))
    (repeated,) = PSARepeatLatent.execute({"samples": LATENT}, ours).args
    assert len(repeated["samples"]) == 3


# What cannot be.


def test_an_embedding_needs_an_adapter(model: ModelPatcher, adapters: dict[str, PSAAdapter]) -> None:
    compiled = through_a_file(adapters["text"], users(0))
    mixture = Mixture((compiled, users(1)), (0.5, 0.5))
    for people in (users(0), mixture, Group((compiled, users(1)))):
        with pytest.raises(AdapterError, match=r"no adapter for this embedding, .* Connect Load PSA Adapter"):
            sampled(model, people, None)


def test_an_adapter_of_another_hash(model: ModelPatcher, adapters: dict[str, PSAAdapter]) -> None:
    compiled = through_a_file(adapters["text"], users(0))
    sizes = adapters["text"].config.hidden_sizes
    other = kinds_adapter(sizes, TINY.context_dim, seed=1, text=TEXT)
    for people in (compiled, Mixture((compiled, users(1)), (0.5, 0.5))):
        with pytest.raises(AdapterError, match=r"mine\.safetensors was compiled with another adapter than the connec"):
            sampled(model, people, other)
    theirs = through_a_file(other, users(1), "theirs")
    for together in (Group((compiled, theirs)), Mixture((compiled, theirs), (0.5, 0.5))):
        with pytest.raises(AdapterError, match=r"theirs\.safetensors was compiled with another .* than mine\.safeten"):
            sampled(model, together, None)
    with pytest.raises(AdapterError, match="compiled with another adapter"):
        PSACompileProfile.execute(other, compiled, "again")


@pytest.mark.parametrize(("kind", "words"), [("constant", "16 cross-attention layers"), ("text", "width 24")])
def test_a_model_of_another_base(adapters: dict[str, PSAAdapter], kind: str, words: str) -> None:
    adapter = adapters[kind]
    if kind == "text":  # the text side alone is for every model that reads such text
        adapter = kinds_adapter((), TINY.context_dim, text=TEXT)
    compiled = through_a_file(adapter, users(0))
    with pytest.raises(
        AdapterError, match=rf"mine\.safetensors was compiled for .*{words}.* but the connected model is"
    ):
        sampled(comfy_model(unet_weights(TINY_SDXL)), compiled, None, TINY_SDXL)


def test_a_null_user_that_the_file_has_not(model: ModelPatcher, adapters: dict[str, PSAAdapter]) -> None:
    compiled = through_a_file(adapters["constant without null"], users(0))
    with pytest.raises(AdapterError, match='unconditional cannot be "zero embedding"'):
        sampled(model, compiled, None, unconditional="zero embedding")
    with_null = through_a_file(adapters["constant"], users(0), "null")
    theirs = sampled(model, users(0), adapters["constant"], unconditional="zero embedding")
    assert torch.equal(sampled(model, with_null, None, unconditional="zero embedding"), theirs)


# Saving.


def miniature_adapter() -> PSAAdapter:
    adapter = kinds_adapter((), TINY.context_dim, text=TEXT)
    spec = adapter.config.encoder.model_copy(update={"name": "attributes-1"})
    other = PSAAdapter(adapter.config.model_copy(update={"encoder": spec, "embedding_dim": 37})).requires_grad_(False)
    for weight in other.zero_at_start():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    return other


def test_categories_only_if_the_owner_agrees(folder: Path) -> None:
    adapter = miniature_adapter()
    embedding = encode_profile(adapter, levels()[2].profile)
    assert through_a_file(adapter, embedding, "silent").spec.categories is None
    banned = through_a_file(adapter, embedding, "open", include_categories=True).spec.categories
    assert banned == ("Violence", "Sexuality", "Shocking", "Propaganda")
    content = (folder / "silent.safetensors").read_bytes()
    assert not any(category.encode() in content for category in banned)


def test_categories_that_nobody_knows(tmp_path: Path) -> None:
    adapter = miniature_adapter()
    embedding = encode_profile(adapter, levels()[2].profile)
    save_embedding(embedding, tmp_path / "embedding.safetensors")
    assert b"Violence" not in (tmp_path / "embedding.safetensors").read_bytes()
    from_file = load_embedding(tmp_path / "embedding.safetensors")
    for people in (from_file, Mixture((embedding, from_file), (0.5, 0.5))):
        for options in ({"include_categories": True}, {"bans_only": True}):
            with pytest.raises(AdapterError, match="not known what is banned"):
                PSACompileProfile.execute(adapter, people, "mine", **options)


def test_from_bans_alone_attributes_change_nothing(folder: Path) -> None:
    adapter, profile = miniature_adapter(), levels()[2].profile
    someone_else = Profile(overrides=dict.fromkeys(banned_categories(profile), "ban"))
    ours = through_a_file(adapter, encode_profile(adapter, profile), bans_only=True)
    theirs = through_a_file(adapter, encode_profile(adapter, someone_else), "theirs")
    itself = through_a_file(adapter, encode_profile(adapter, profile), "itself")
    text = noise(1, 3, TINY.context_dim)
    changed = [found.effect.text.tokens(text) for found in (ours, theirs, itself) if found.effect.text]
    assert torch.equal(changed[0], changed[1])
    assert difference(changed[2], changed[0]) > 1e-3


def test_several_people_and_another_encoder_are_refused(adapters: dict[str, PSAAdapter], folder: Path) -> None:
    with pytest.raises(AdapterError, match="this embedding of 2"):
        PSACompileProfile.execute(adapters["all"], Group((users(0), users(1))), "mine")
    with pytest.raises(EncoderError, match="comes from the encoder llm:Other:0"):
        PSACompileProfile.execute(adapters["all"], SafetyEmbedding(users(1).vectors, "llm:Other:0"), "mine")
    assert not folder.exists()


def test_somebody_elses_file_stays(adapters: dict[str, PSAAdapter], folder: Path) -> None:
    through_a_file(adapters["text"], users(0))
    content = (folder / "mine.safetensors").read_bytes()
    with pytest.raises(AdapterError, match="switch overwrite on"):
        PSACompileProfile.execute(adapters["text"], users(1), "mine")
    assert (folder / "mine.safetensors").read_bytes() == content
    PSACompileProfile.execute(adapters["text"], users(1), "mine", overwrite=True)
    assert (folder / "mine.safetensors").read_bytes() != content


@pytest.mark.parametrize(
    "name", ["", "..", "../mine", "a/b", "a\\b", "/etc/mine", ".mine", "mine.", "mine\n", "x" * 200]
)
def test_names_that_lead_elsewhere(adapters: dict[str, PSAAdapter], folder: Path, name: str) -> None:
    assert "without folders" in str(PSACompileProfile.validate_inputs(file_name=name))
    with pytest.raises(AdapterError, match="without folders"):
        PSACompileProfile.execute(adapters["text"], users(0), name)
    assert not folder.exists()


def test_a_deleted_file_is_written_again_and_nothing_runs_twice(adapters: dict[str, PSAAdapter], folder: Path) -> None:
    others = {given.id: None for given in PSACompileProfile.GET_SCHEMA().inputs if given.id != "file_name"}

    def fingerprint() -> str:
        return PSACompileProfile.fingerprint_inputs(file_name="mine", **others)  # as ComfyUI calls it

    before = fingerprint()
    through_a_file(adapters["text"], users(0))
    written = fingerprint()
    assert fingerprint() == written != before
    through_a_file(adapters["text"], users(0))
    assert fingerprint() == written
    (folder / "mine.safetensors").unlink()
    assert fingerprint() == before


def test_only_names_of_files_reach_a_workflow(adapters: dict[str, PSAAdapter]) -> None:
    inputs = {given.id: given.io_type for given in PSALoadCompiledProfile.GET_SCHEMA().inputs}
    assert inputs == {"compiled_name": "COMBO"}
    through_a_file(adapters["text"], users(0))
    first = PSALoadCompiledProfile.fingerprint_inputs(compiled_name="mine.safetensors")
    PSACompileProfile.execute(adapters["text"], users(1), "mine", overwrite=True)
    assert PSALoadCompiledProfile.fingerprint_inputs(compiled_name="mine.safetensors") != first
    assert PSALoadCompiledProfile.INPUT_TYPES()["required"]["compiled_name"][1]["options"] == ["mine.safetensors"]


def test_a_missing_file_names_the_folder(folder: Path) -> None:
    for name in ("gone.safetensors", "../psa_adapters/mine.safetensors"):
        message = PSALoadCompiledProfile.validate_inputs(compiled_name=name)
        assert "There is no compiled profile" in str(message)
        assert str(folder) in str(message)
        with pytest.raises(AdapterError, match="There is no compiled profile"):
            PSALoadCompiledProfile.execute(name)
    assert PSALoadCompiledProfile.validate_inputs(compiled_name=None) is True


def test_an_adapter_in_its_place_is_named(adapters: dict[str, PSAAdapter], folder: Path) -> None:
    folder.mkdir()
    save_adapter(adapters["text"], folder / "adapter.safetensors")
    with pytest.raises(AdapterError, match="choose it in Load PSA Adapter"):
        PSALoadCompiledProfile.execute("adapter.safetensors")


def test_error_reports_say_nothing_of_it(adapters: dict[str, PSAAdapter]) -> None:
    compiled = through_a_file(adapters["text"], users(0))
    assert repr(Mixture((compiled, compiled), (0.5, 0.5))).count("CompiledProfile(private)") == 2


def test_the_patch_holds_the_numbers_of_the_adapter(model: ModelPatcher, adapters: dict[str, PSAAdapter]) -> None:
    adapter = adapters["all"]
    compiled = compile_profile(adapter, adapter.effect(users(0).vectors))
    with_adapter, without = (
        apply_psa(model, given, people).model_options["transformer_options"]["patches"]["attn2_output_patch"][0]
        for given, people in ((adapter, users(0)), (None, compiled))
    )
    assert isinstance(without, UserPatch)
    assert all(torch.equal(a, b) for a, b in zip(without.rows, with_adapter.rows, strict=True))
