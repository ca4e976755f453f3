"""The nodes as ComfyUI calls them, in a ComfyUI whose folders are the test's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_testing import TINY, conditioning, denoise, noise
from schemas import NODES

from comfyui_psa.adapter import AdapterConfig, AdapterError, EncoderSpec, PSAAdapter, save_adapter
from comfyui_psa.nodes import folders
from comfyui_psa.nodes.folders import profile_store
from comfyui_psa.profiles import EncoderError, Profile, ProfileError, SafetyEmbedding, levels
from comfyui_psa.profiles.encoders import AttributesEncoder

POSITIVE = conditioning(TINY, 1)


@pytest.fixture(autouse=True)
def comfyui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ComfyUI without any files."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folders, "MINIATURE", tmp_path / "miniature")
    for name in ("psa_adapters", "psa_embeddings", "LLM"):
        (tmp_path / "models" / name).mkdir(parents=True)
    return tmp_path


@pytest.fixture
def nodes(comfyui: Path) -> dict[str, Any]:
    folders.register_folders()
    return {node.GET_SCHEMA().node_id: node for node in NODES.values()}


def options(node: Any, name: str) -> list[str]:
    offered: list[str] = node.INPUT_TYPES()["required"][name][1]["options"]
    return offered


def attributes_adapter(sizes: tuple[int, ...]) -> PSAAdapter:
    config = AdapterConfig(
        hidden_sizes=sizes,
        cross_attention_dim=TINY.context_dim,
        embedding_dim=37,
        encoder=EncoderSpec(kind="attributes", name="attributes-1"),
    )
    adapter = PSAAdapter(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return adapter


def test_a_profile_steers_the_model_through_the_nodes(
    nodes: dict[str, Any], comfyui: Path, model: ModelPatcher, adapter: PSAAdapter
) -> None:
    save_adapter(
        attributes_adapter(adapter.config.hidden_sizes), comfyui / "models" / "psa_adapters" / "mine.safetensors"
    )
    assert options(nodes["PSALoadAdapter"], "adapter_name") == ["mine.safetensors"]
    (loaded,) = nodes["PSALoadAdapter"].execute(adapter_name="mine.safetensors").args

    pictures = []
    for level in options(nodes["PSASafetyLevel"], "level"):
        (profile,) = nodes["PSASafetyLevel"].execute(level=level).args
        (embedding,) = nodes["PSAEncodeProfile"].execute(adapter=loaded, profile=profile).args
        (patched,) = (
            nodes["PSAApply"]
            .execute(model=model, adapter=loaded, embedding=embedding, strength=1.0, start_percent=0.0, end_percent=1.0)
            .args
        )
        pictures.append(denoise(patched, POSITIVE, POSITIVE, noise(1, 4, 8, 8)))
    assert len(pictures) == 6
    assert len({picture.numpy().tobytes() for picture in pictures}) == 6


def test_levels_are_found_by_id_whatever_their_label_says(nodes: dict[str, Any]) -> None:
    node = nodes["PSASafetyLevel"]
    assert node.validate_inputs(level="L5") is True
    assert node.execute(level="L5 - an older label").args == (levels()[5].profile,)
    assert "L0, L1, L2, L3, L4, L5" in node.validate_inputs(level="L6")


def test_a_profile_becomes_words_behind_ones_own_and_leaves_as_conditioning_alone(nodes: dict[str, Any]) -> None:
    class Clip:
        def tokenize(self, text: str) -> str:
            return text

        def encode_from_tokens_scheduled(self, tokens: str) -> list[str]:
            return [tokens]

    def negative(profile: Profile, text: str) -> str:
        (conditioning,) = nodes["PSAProfileToPrompt"].execute(Clip(), profile, text).args
        return conditioning[0]

    profile = Profile(overrides={"Propaganda": "ban"})
    assert negative(profile, "blurry, ") == "blurry, propaganda, political slogans, extremist symbols"
    assert negative(profile, "") == "propaganda, political slogans, extremist symbols"
    assert negative(Profile(), " my own ") == "my own"
    assert {output.io_type for output in nodes["PSAProfileToPrompt"].GET_SCHEMA().outputs} == {"CONDITIONING"}


def test_the_profile_node_offers_references_alone(nodes: dict[str, Any]) -> None:
    stored = profile_store().create(Profile(name="Somebody", religion="Somefaith"))
    assert options(nodes["PSAUserProfile"], "profile_id") == ["active", stored.id, *(level.id for level in levels())]


def test_active_means_whoever_is_active_here(nodes: dict[str, Any]) -> None:
    node, store = nodes["PSAUserProfile"], profile_store()
    assert "No safety profile is active" in node.validate_inputs(profile_id="active")
    with pytest.raises(ProfileError, match="No safety profile is active"):
        node.execute(profile_id="active")
    first, second = store.create(Profile(age=20)), store.create(Profile(age=60))
    store.activate(first.id)
    assert node.execute(profile_id="active").args == (first.profile,)
    before = node.fingerprint_inputs(profile_id="active")
    store.activate(second.id)
    assert node.execute(profile_id="active").args == (second.profile,)
    assert node.fingerprint_inputs(profile_id="active") != before


def test_an_unreadable_profile_stops_the_prompt(nodes: dict[str, Any]) -> None:
    node, store = nodes["PSAUserProfile"], profile_store()
    stored = store.create(Profile())
    path = store.root / f"{stored.id}.json"
    content = json.loads(path.read_text())
    content["profile"]["age"] = "secretly 40"
    path.write_text(json.dumps(content))
    message = node.validate_inputs(profile_id=stored.id)
    assert "age should be a whole number from 0 to 130" in message
    assert "secretly" not in message
    with pytest.raises(ProfileError):
        node.execute(profile_id=stored.id)


def test_a_replaced_file_runs_again_and_nothing_else_does(
    nodes: dict[str, Any], comfyui: Path, adapter: PSAAdapter
) -> None:
    path = comfyui / "models" / "psa_adapters" / "mine.safetensors"
    save_adapter(adapter, path)
    fingerprint = nodes["PSALoadAdapter"].fingerprint_inputs
    before = fingerprint(adapter_name=path.name)
    assert fingerprint(adapter_name=path.name) == before
    save_adapter(attributes_adapter(adapter.config.hidden_sizes), path)
    after = fingerprint(adapter_name=path.name)
    assert after != before
    path.with_name("get_embeds.txt").write_text("<<AGE>>")
    assert fingerprint(adapter_name=path.name) != after


@pytest.mark.parametrize("name", ["gone.bin", "../../user/__psa/profiles/active", "/etc/hostname"])
def test_a_missing_adapter_names_the_folder(nodes: dict[str, Any], comfyui: Path, name: str) -> None:
    message = nodes["PSALoadAdapter"].validate_inputs(adapter_name=name)
    assert "There is no adapter" in message
    assert str(comfyui / "models" / "psa_adapters") in message


def test_a_file_of_the_same_name_elsewhere_is_another_file(nodes: dict[str, Any], comfyui: Path) -> None:
    folder = comfyui / "models" / "psa_embeddings"
    np.save(folder / "0000001.npy", np.ones(3, dtype=np.float32))
    node = nodes["PSALoadEmbedding"]
    assert str(folder / "alice" / "0000001.npy") in node.validate_inputs(embedding_name="alice/0000001.npy")
    with pytest.raises(EncoderError, match="There is no embedding"):
        node.execute(embedding_name="alice/0000001.npy")
    with pytest.raises(AdapterError, match="There is no adapter"):
        nodes["PSALoadAdapter"].execute(adapter_name="sdxl/psa_adapter.bin")


@pytest.mark.parametrize(
    ("node", "name"),
    [
        ("PSALoadAdapter", "adapter_name"),
        ("PSASafetyLevel", "level"),
        ("PSAUserProfile", "profile_id"),
        ("PSALoadEmbedding", "embedding_name"),
        ("PSALoadCompiledProfile", "compiled_name"),
    ],
)
def test_a_choice_that_another_node_makes_is_checked_when_it_is_known(
    nodes: dict[str, Any], node: str, name: str
) -> None:
    """ComfyUI validates linked inputs as None, before their value exists."""
    assert nodes[node].validate_inputs(**{name: None}) is True
    if node != "PSASafetyLevel":
        nodes[node].fingerprint_inputs(**{name: None})
    with pytest.raises(ValueError, match="There is no"):
        nodes[node].execute(**{name: "ffffffffffffffff"})


def test_only_files_of_the_right_kind_are_offered(nodes: dict[str, Any], comfyui: Path) -> None:
    for name in ("a.safetensors", "b.bin", "get_embeds.txt", "notes.md"):
        (comfyui / "models" / "psa_adapters" / name).touch()
    for name in ("a.npy", "b.safetensors", "c.txt"):
        (comfyui / "models" / "psa_embeddings" / name).touch()
    assert options(nodes["PSALoadAdapter"], "adapter_name") == ["a.safetensors", "b.bin"]
    assert options(nodes["PSALoadEmbedding"], "embedding_name") == ["a.npy", "b.safetensors"]


def test_embeddings_for_a_whole_batch(nodes: dict[str, Any], comfyui: Path) -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(comfyui / "models" / "psa_embeddings" / "two.npy", rows)
    (embedding,) = nodes["PSALoadEmbedding"].execute(embedding_name="two.npy").args
    assert np.array_equal(embedding.vectors.numpy(), rows)


def encode(nodes: dict[str, Any], adapter: PSAAdapter, **changes: Any) -> SafetyEmbedding:
    spec = adapter.config.encoder.model_copy(update=changes)
    changed = PSAAdapter(adapter.config.model_copy(update={"encoder": spec}))
    (embedding,) = nodes["PSAEncodeProfile"].execute(adapter=changed, profile=levels()[1].profile).args
    return embedding  # type: ignore[no-any-return]


def test_no_language_model_on_disk(nodes: dict[str, Any], adapter: PSAAdapter, comfyui: Path) -> None:
    with pytest.raises(EncoderError) as error:
        encode(nodes, adapter, template="<<AGE>>")
    assert str(comfyui / "models" / "LLM" / "Qwen2.5-7B-Instruct") in str(error.value)
    assert "hf download Qwen/Qwen2.5-7B-Instruct" in str(error.value)


def test_an_adapter_without_template(nodes: dict[str, Any], adapter: PSAAdapter) -> None:
    with pytest.raises(EncoderError, match=r"get_embeds\.txt"):
        encode(nodes, adapter)


def test_an_attributes_encoder_of_another_version(nodes: dict[str, Any], adapter: PSAAdapter) -> None:
    with pytest.raises(EncoderError, match="attributes-2"):
        encode(nodes, adapter, kind="attributes", name="attributes-2")


def test_a_language_model_of_another_width(
    nodes: dict[str, Any], adapter: PSAAdapter, comfyui: Path, smollm2_folder: Path
) -> None:
    (comfyui / "models" / "LLM" / smollm2_folder.name).symlink_to(smollm2_folder)
    with pytest.raises(EncoderError, match=r"576 numbers, but the adapter expects 12"):
        encode(nodes, adapter, name="HuggingFaceTB/SmolLM2-135M-Instruct", template="<<AGE>>")


@pytest.fixture
def apply(nodes: dict[str, Any], model: ModelPatcher) -> Callable[..., Any]:
    def call(adapter: PSAAdapter, embedding: SafetyEmbedding, model: ModelPatcher = model, **inputs: Any) -> Any:
        inputs = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0} | inputs
        return nodes["PSAApply"].execute(model=model, adapter=adapter, embedding=embedding, **inputs).args[0]

    return call


def test_an_embedding_from_another_encoder(apply: Callable[..., Any], adapter: PSAAdapter) -> None:
    ours = attributes_adapter(adapter.config.hidden_sizes)
    vectors = AttributesEncoder().encode([levels()[2].profile])
    apply(ours, SafetyEmbedding(vectors, "attributes-1"))
    apply(ours, SafetyEmbedding(vectors))  # a .npy file does not say where it comes from
    with pytest.raises(EncoderError, match=r"llm:Other:0, .* attributes-1"):
        apply(ours, SafetyEmbedding(vectors, "llm:Other:0"))
    newer = EncoderSpec(kind="attributes", name="attributes-2")
    ours.config = ours.config.model_copy(update={"encoder": newer})
    with pytest.raises(EncoderError, match=r"attributes-1, .* attributes-2"):
        apply(ours, SafetyEmbedding(vectors, "attributes-1"))


def test_every_unconditional_choice_runs(
    nodes: dict[str, Any], apply: Callable[..., Any], adapter: PSAAdapter, users: Callable[..., SafetyEmbedding]
) -> None:
    offered = nodes["PSAApply"].INPUT_TYPES()["optional"]["unconditional"][1]
    assert offered["options"] == ["as trained", "zero embedding", "none"]
    assert offered["default"] == "as trained"
    results = [
        denoise(apply(adapter, users(0), unconditional=choice), POSITIVE, POSITIVE, noise(1, 4, 8, 8), 0.0)
        for choice in offered["options"]
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


def test_profiles_embeddings_and_adapters_print_nothing_private(adapter: PSAAdapter) -> None:
    profile = Profile(name="Somebody", age=87, religion="Somefaith")
    embedding = SafetyEmbedding(torch.full((1, 3), 0.125))
    printed = f"{profile} {profile!r} {[profile]} {embedding} {embedding!r} {[embedding]}"
    assert all(word not in printed for word in ("Some", "87", "0.125", "1250"))


def test_the_private_folder_is_the_one_that_comfyui_keeps_to_itself() -> None:
    assert profile_store().root.parent == Path(folder_paths.get_system_user_directory("psa"))


def test_a_language_model_goes_when_it_has_encoded(
    nodes: dict[str, Any], adapter: PSAAdapter, comfyui: Path, smollm2_gguf: Path
) -> None:
    import gc
    import weakref

    import comfy.model_management
    from transformers import PreTrainedModel

    def models() -> int:
        return sum(isinstance(thing, PreTrainedModel) for thing in gc.get_objects())

    before = models()  # of other tests
    (comfyui / "models" / "LLM" / smollm2_gguf.name).symlink_to(smollm2_gguf)
    seen: list[weakref.ref[Any]] = []

    from comfyui_psa.nodes import model_host

    hold = model_host.ComfyHost.hold

    def watch(self: Any, language_model: Any) -> Any:
        seen.append(weakref.ref(language_model))
        return hold(self, language_model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_host.ComfyHost, "hold", watch)
        spec = EncoderSpec(kind="llm", name="SmolLM2-135M-Instruct", template="<<AGE>> <<BANNED>>")
        config = adapter.config.model_copy(update={"encoder": spec, "embedding_dim": 576})
        wide = PSAAdapter(config)
        for _ in range(2):
            (embedding,) = nodes["PSAEncodeProfile"].execute(adapter=wide, profile=levels()[1].profile).args
    gc.collect()
    assert len(seen) == 1  # the second time it came from the cache
    assert seen[0]() is None
    assert models() <= before
    held = [loaded.model.model for loaded in comfy.model_management.current_loaded_models if loaded.model]
    assert not any("ModuleList" in type(loaded).__name__ for loaded in held)
    assert embedding.vectors.shape == (1, 576)
    cached = list((comfyui / "user" / "__psa" / "embeddings").iterdir())
    assert len(cached) == 1
