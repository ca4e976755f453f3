"""The engine comfyui, against a real ComfyUI: the same pictures as diffusers, and nothing left behind."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluations import BASE, draw, drawn, evaluation, pictures, write_jsonl
from prompts import CHECKPOINT
from safetensors.torch import save_file
from studio import Studio
from typer.testing import CliRunner

from comfyui_psa.training.base import open_base
from comfyui_psa.training.cli import app
from comfyui_psa.training.errors import ComfyUIError, TrainingError
from comfyui_psa.training.evaluation.engines.comfyui import ComfyUIEngine
from comfyui_psa.training.evaluation.manifest import read_manifest
from comfyui_psa.training.miniature import MINIATURE

ADAPTER = MINIATURE / "adapters" / "psa_miniature.safetensors"
PSA = {"name": "PSA", "kind": "adapter", "paths": (ADAPTER,)}
METHODS = (
    BASE,
    {"name": "words", "kind": "negative_prompt", "words": "miniature"},
    PSA,
    {"name": "static", "kind": "adapter", "paths": (ADAPTER,), "everyone": "L5"},
)
# ComfyUI cuts what it decodes to whole numbers, diffusers rounds it: half a step on average.
CUT, ROUNDING = 0.5, 0.15


def world(studio: Studio, output: Path, methods: Any = METHODS, **changes: Any) -> Any:
    """An evaluation of the miniature in ComfyUI, for a level and for somebody who has to be put into its store."""
    people = write_jsonl(
        output.with_name("people.jsonl"), [{"user": "a", "profile": {"age": 40, "overrides": {"Shocking": "ban"}}}]
    )
    sections: dict[str, Any] = {
        "engine": {"kind": "comfyui", "address": studio.server.url},
        "prompts": {"file": None, "miniature": 2},
        "users": {"levels": ("L4",), "file": people},
        "sampling": {"steps": 4, "guidance_scale": 3.0},
        **changes,
    }
    return evaluation(MINIATURE, output, methods, **sections)


def test_both_engines_draw_the_same_pictures(studio: Studio, tmp_path: Path) -> None:
    before = {entry.id for entry in studio.store.entries()}
    files = sorted(studio.output.rglob("*"))
    draw(world(studio, tmp_path / "comfyui"))
    draw(world(studio, tmp_path / "diffusers", engine={}))
    ours, theirs = drawn(tmp_path / "comfyui"), drawn(tmp_path / "diffusers")
    assert ours.keys() == theirs.keys()
    assert len(ours) == len(METHODS) * 2 * 2
    for key, picture in ours.items():
        assert abs(np.abs(picture - theirs[key]).mean() - CUT) < ROUNDING, key
        others = [found for other, found in ours.items() if other[3] != key[3] and other[0] == key[0] == "PSA"]
        assert all((picture != other).any() for other in others)
    assert {entry.id for entry in studio.store.entries()} == before  # whoever was put there is gone again
    assert sorted(studio.output.rglob("*")) == files  # pictures went through temporary files
    (row,) = [
        row
        for row in pictures(tmp_path / "comfyui").values()
        if (row.method, row.user, row.prompt_id) == ("PSA", "a", "world-0000")
    ]
    assert row.engine == "comfyui, dpmpp_2m, sgm_uniform"
    assert row.base == "miniature in ComfyUI"
    assert row.adapter == "psa_miniature.safetensors in ComfyUI"
    assert (row.width, row.height) == (96, 96)


def test_sigterm_takes_people_out_of_the_store_again(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {entry.id for entry in studio.store.entries()}
    during: set[str] = set()

    def terminated(*_: Any) -> None:
        during.update(entry.id for entry in studio.store.entries())
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ComfyUIEngine, "draw", terminated)
    (tmp_path / "people.jsonl").write_text('{"user": "a", "profile": {"age": 40}}', encoding="utf-8")
    config = tmp_path / "config.toml"
    config.write_text(
        f'''
model.base = "miniature"
engine = {{ kind = "comfyui", address = "{studio.server.url}" }}
prompts.miniature = 1
users.file = "{tmp_path / "people.jsonl"}"
methods = [{{ name = "PSA", kind = "adapter", paths = ["{ADAPTER}"] }}]
run.output = "{tmp_path / "run"}"
''',
        encoding="utf-8",
    )
    result = CliRunner().invoke(app, ["evaluate", str(config), "--only-draw"])
    assert result.exit_code == 128 + signal.SIGTERM, result.exception
    assert len(during - before) == 1
    assert {entry.id for entry in studio.store.entries()} == before


def test_a_lora_is_drawn_by_both_engines(studio: Studio, tmp_path: Path) -> None:
    """In kohya's names, on how the miniature's layers read text."""
    generator = torch.Generator().manual_seed(0)
    path = studio.server.base / "models" / "loras" / "world.safetensors"
    path.parent.mkdir(exist_ok=True)
    tensors = {}
    for name, layer in open_base(MINIATURE).empty_unet().named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            key = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = torch.randn(2, layer.in_features, generator=generator)
            tensors[f"{key}.lora_up.weight"] = 0.3 * torch.randn(layer.out_features, 2, generator=generator)
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    methods = (BASE, {"name": "LoRA", "kind": "lora", "paths": (path,), "strengths": (0.5, 1.0)})
    draw(world(studio, tmp_path / "comfyui", methods))
    draw(world(studio, tmp_path / "diffusers", methods, engine={}))
    ours, theirs = drawn(tmp_path / "comfyui"), drawn(tmp_path / "diffusers")
    assert ours.keys() == theirs.keys()
    for (method, run, strength, case), picture in ours.items():
        assert abs(np.abs(picture - theirs[method, run, strength, case]).mean() - CUT) < ROUNDING, method
        if method == "LoRA":
            assert np.abs(picture - ours["base", 0, 1.0, case]).mean() > 1


def test_checkpoints_are_named_as_comfyui_lists_them(studio: Studio, tmp_path: Path) -> None:
    settings = {"sampling": {"width": 64, "height": 64, "steps": 2}, "model": {"base": Path("models") / CHECKPOINT}}
    methods = (BASE, {"name": "other", "kind": "pipeline", "paths": (CHECKPOINT,)})
    draw(world(studio, tmp_path / "run", methods, **settings))
    found = drawn(tmp_path / "run")
    assert {row.base for row in read_manifest(tmp_path / "run")} == {f"{CHECKPOINT} in ComfyUI"}
    for (_, run, strength, case), picture in found.items():
        assert np.array_equal(picture, found["base", run, strength, case])
        assert picture.shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("changes", "method", "message"),
    [
        ({"engine": {"sampler": "magic"}}, BASE, 'lists no sampler_name "magic"'),
        ({"model": {"base": Path("gone.safetensors")}}, BASE, r'lists no ckpt_name "gone\.safetensors"; it has small'),
        ({}, {"name": "x", "kind": "adapter", "paths": ("gone.bin",)}, r'lists no adapter_name "gone\.bin"'),
        ({}, {"name": "x", "kind": "lora", "paths": ("gone.safetensors",)}, r"lists no lora_name"),
        ({}, {"name": "x", "kind": "adapter", "paths": ("psa_adapter.bin",)}, "PSA|adapter|template"),
    ],
)
def test_what_comfyui_does_not_have_or_cannot_use_is_found_before_anything_is_drawn(
    studio: Studio, tmp_path: Path, changes: dict[str, Any], method: dict[str, Any], message: str
) -> None:
    engine = {"kind": "comfyui", "address": studio.server.url, **changes.get("engine", {})}
    sampling = {"steps": 2, "guidance_scale": 3.0, "width": 64, "height": 64}
    methods = (BASE,) if method is BASE else (BASE, method)
    config = world(studio, tmp_path / "run", methods, **{**changes, "engine": engine, "sampling": sampling})
    with pytest.raises(ComfyUIError, match=message):
        draw(config)
    assert not (tmp_path / "run" / "manifest.parquet").exists()


def test_a_size_has_to_be_stated_for_a_checkpoint(studio: Studio, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"set sampling\.width and sampling\.height"):
        draw(world(studio, tmp_path / "run", (BASE,), model={"base": Path(CHECKPOINT)}))


def test_an_engine_that_does_not_answer_is_named(tmp_path: Path) -> None:
    engine = {"kind": "comfyui", "address": "http://127.0.0.1:9"}
    with pytest.raises(ComfyUIError, match=r"No ComfyUI answers at engine\.address = http://127\.0\.0\.1:9"):
        draw(evaluation(MINIATURE, tmp_path / "run", (BASE,), engine=engine))
    assert not (tmp_path / "run").exists()
