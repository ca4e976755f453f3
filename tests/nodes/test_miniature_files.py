"""Load PSA Miniature with files that are missing, damaged or of another kind: an error that names the file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from miniature_testing import copied, edit, replace, write_miniature
from safetensors.torch import load_file, save_file

from comfyui_psa.nodes import miniature
from comfyui_psa.nodes.miniature_files import FILES, MiniatureError
from comfyui_psa.nodes.miniature_model import load_miniature


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_miniature(tmp_path_factory.mktemp("miniature"))


@pytest.fixture
def pack(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the node, with a random miniature that a test may change."""
    monkeypatch.setattr(miniature, "MINIATURE", copied(folder, tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(pack: Path, name: str) -> None:
    (pack / name).unlink()
    with pytest.raises(MiniatureError) as error:
        miniature.PSALoadMiniature.execute()
    assert f"{name} should be in {pack}." in str(error.value)
    assert "install ComfyUI-PSA again" in str(error.value)


def test_a_pack_without_the_folder(pack: Path) -> None:
    shutil.rmtree(pack)
    with pytest.raises(MiniatureError, match=r"not complete: unet/config\.json, .*scheduler_config\.json should be in"):
        miniature.PSALoadMiniature.execute()
    assert miniature.PSALoadMiniature.fingerprint_inputs()


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_off_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    path = copied(folder, tmp_path) / name
    replace(path, path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MiniatureError) as error:
        load_miniature(tmp_path)
    place = path.parent if name.startswith("tokenizer") else path
    assert f"{place} cannot be read" in str(error.value)


Change = Callable[[Path], None]


def changed_config(name: str, **changes: Any) -> Change:
    return lambda folder: edit(folder, name, **changes)


def without_a_weight(name: str) -> Change:
    def change(folder: Path) -> None:
        weights = load_file(folder / name)
        weights.pop(sorted(weights)[0])
        (folder / name).unlink()
        save_file(weights, folder / name)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_config(FILES[0], _class_name="UNet2DModel"), "_class_name: Input should be 'UNet2DConditionModel'"),
        (changed_config(FILES[0], act_fn="gelu"), "act_fn: Input should be 'silu'"),
        (changed_config(FILES[0], block_out_channels=[32, 64]), "the lists of blocks do not all have 2 entries"),
        (changed_config(FILES[0], block_out_channels=[32, 64, 128]), "does not fit the config.json beside it"),
        (changed_config(FILES[2], latent_channels=-8), "latent_channels: Input should be greater than 0"),
        (changed_config(FILES[2], num_decoder_blocks=[2, 2, 2, 2]), "weights differ; the first, "),
        (changed_config(FILES[4], num_hidden_layers=1), "should be no part of it"),
        (changed_config(FILES[4], vocab_size=10), "does not belong to the text encoder, which knows 10 tokens"),
        (changed_config(FILES[-1], beta_schedule="linear"), "beta_schedule: Input should be 'scaled_linear'"),
        (without_a_weight(FILES[1]), "is missing and should be"),
        (without_a_weight(FILES[3]), "is missing and should be"),
        (without_a_weight(FILES[5]), "is missing and should be"),
    ],
)
def test_another_kind_of_model_is_refused(folder: Path, tmp_path: Path, change: Change, message: str) -> None:
    change(copied(folder, tmp_path))
    with pytest.raises(MiniatureError) as error:
        load_miniature(tmp_path)
    assert message in str(error.value)
    assert "install ComfyUI-PSA again" in str(error.value)
