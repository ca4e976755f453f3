"""`psa compile`: from an adapter and a profile to a file, from a level, the store, or an exported profile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from comfyui_psa.adapter import compile_profile, load_adapter, load_compiled
from comfyui_psa.profiles import (
    Profile,
    ProfileStore,
    banned_categories,
    find_level,
    profiles_folder,
)
from comfyui_psa.profiles.encoders import AttributesEncoder, LanguageModelEncoder, find_language_model
from comfyui_psa.profiles.files import format_file
from comfyui_psa.training.cli import app
from comfyui_psa.training.miniature import MINIATURE

ADAPTER = MINIATURE / "adapters" / "psa_miniature.safetensors"
CONSTANT = MINIATURE / "adapters" / "psa_miniature_constant.safetensors"
LEVEL = find_level("L2").profile


def psa(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["compile", *map(str, arguments)])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def assert_compiled(out: Path, adapter: Path, profile: Profile) -> None:
    """The file holds exactly what the adapter does for this profile on the attributes encoder."""
    loaded = load_adapter(adapter)
    expected = compile_profile(loaded, loaded.effect(AttributesEncoder().encode([profile])))
    found = load_compiled(out)
    assert found.spec == expected.spec
    if expected.effect.constant is not None:
        assert found.effect.constant is not None
        assert all(map(torch.equal, found.effect.constant.user, expected.effect.constant.user))
    if expected.effect.text is not None:
        assert found.effect.text is not None
        text = torch.randn(1, 5, 128)
        assert torch.equal(found.effect.text.tokens(text), expected.effect.text.tokens(text))


@pytest.mark.parametrize("adapter", [ADAPTER, CONSTANT], ids=["text", "constant"])
def test_a_level(out: Path, adapter: Path) -> None:
    result = psa(adapter, "L2", out)
    assert result.exit_code == 0, result.output
    assert "names no categories" in result.output
    assert "models/psa_compiled" in result.output
    assert_compiled(out, adapter, LEVEL)


def test_a_profile_of_the_store_by_id_and_the_active_one(tmp_path: Path, out: Path) -> None:
    user_directory = tmp_path / "user"
    store = ProfileStore(profiles_folder(user_directory))
    stored = store.create(Profile(age=41, religion="Islam"))
    store.activate(stored.id)
    for reference in (stored.id, "active"):
        assert psa(CONSTANT, reference, out, "--user-directory", user_directory).exit_code == 0
        assert_compiled(out, CONSTANT, stored.profile)
        out.unlink()


def test_an_exported_profile(tmp_path: Path, out: Path) -> None:
    exported = tmp_path / "me.json"
    exported.write_text(format_file("1", LEVEL), encoding="utf-8")
    assert psa(CONSTANT, exported, out).exit_code == 0
    assert_compiled(out, CONSTANT, LEVEL)
    exported.write_text("{}", encoding="utf-8")
    assert "me.json is damaged" in str(psa(CONSTANT, exported, out).exception)
    assert "cannot be read" in str(psa(CONSTANT, tmp_path / "gone.json", out).exception)


def test_from_the_bans_alone_two_people_with_the_same_bans_are_one(out: Path, tmp_path: Path) -> None:
    """As a profile that says nothing but these bans; attributes change nothing."""
    same_bans = Profile(overrides=dict.fromkeys(banned_categories(LEVEL), "ban"))
    assert psa(CONSTANT, "L2", out, "--bans-only").exit_code == 0
    assert_compiled(out, CONSTANT, same_bans)
    exported = tmp_path / "other.json"
    other = Profile(age=12, overrides={**dict.fromkeys(("Self-Harm",), "allow"), **same_bans.overrides})
    assert banned_categories(other) == banned_categories(LEVEL)
    exported.write_text(format_file("1", other), encoding="utf-8")
    assert psa(CONSTANT, exported, tmp_path / "other.safetensors", "--bans-only").exit_code == 0
    assert_compiled(tmp_path / "other.safetensors", CONSTANT, same_bans)


def test_precision_and_categories(out: Path) -> None:
    assert psa(CONSTANT, "L2", out).exit_code == 0
    large = out.stat().st_size
    result = psa(CONSTANT, "L2", out, "--precision", "fp16", "--include-categories", "--overwrite")
    assert result.exit_code == 0, result.output
    assert out.stat().st_size < 0.8 * large
    assert load_compiled(out).spec.categories == banned_categories(LEVEL)
    assert "names the banned categories" in result.output


def test_a_language_model_from_a_folder(out: Path, smollm2_folder: Path) -> None:
    models = smollm2_folder.parent
    adapter = MINIATURE / "adapters" / "psa_miniature_smollm2.safetensors"
    result = psa(adapter, "L2", out, "--models", models)
    assert result.exit_code == 0, result.output
    loaded = load_adapter(adapter)
    spec = loaded.config.encoder
    assert spec.template is not None
    encoder = LanguageModelEncoder(spec.name, spec.template, find_language_model(spec.name, [models]))
    expected = loaded.effect(encoder.encode([LEVEL])).text
    found = load_compiled(out).effect.text
    assert expected is not None
    assert found is not None
    text = torch.randn(1, 7, loaded.config.cross_attention_dim, generator=torch.Generator().manual_seed(0))
    changed = expected.tokens(text)
    assert not torch.allclose(changed, text, atol=0.01)
    torch.testing.assert_close(found.tokens(text), changed, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_compiled_is_one_sentence(out: Path, tmp_path: Path) -> None:
    llm = MINIATURE / "adapters" / "psa_miniature_smollm2.safetensors"
    for arguments, words in [
        ((CONSTANT, "L2", tmp_path / "out.bin"), "should end in .safetensors"),
        ((CONSTANT, "L2", tmp_path / "gone" / out.name), "does not exist"),
        ((tmp_path / "gone.safetensors", "L2", out), "There is no adapter file"),
        ((CONSTANT, "L9", out, "--user-directory", tmp_path), "L9"),
        ((CONSTANT, "L2", out, "--precision", "fp8"), "expected fp32 or fp16"),
        ((llm, "L2", out, "--models", tmp_path), "SmolLM2-135M-Instruct, which is not on this machine"),
        ((llm, "L2", out), "SmolLM2-135M-Instruct, which is not on this machine"),
    ]:
        result = psa(*arguments)
        assert result.exit_code == 1
        assert words in str(result.exception), result.output
    assert not out.exists()


def test_another_persons_file_stays(out: Path) -> None:
    assert psa(CONSTANT, "L2", out).exit_code == 0
    content = out.read_bytes()
    assert psa(CONSTANT, "L2", out).exit_code == 0
    assert "switch overwrite on" in str(psa(CONSTANT, "L3", out).exception)
    assert out.read_bytes() == content
