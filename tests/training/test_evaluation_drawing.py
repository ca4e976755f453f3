"""Drawing an evaluation: what is kept, what is drawn again, who shares the work, and what the manifest says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from evaluations import BASE, draw, drawn, evaluation, pictures, write_adapter, write_jsonl
from miniature_testing import copied, edit, replace

from comfyui_psa.profiles import banned_categories, find_level
from comfyui_psa.training.errors import BaseModelError, DataError, TrainingError
from comfyui_psa.training.evaluation import drawing
from comfyui_psa.training.evaluation.engines.local import DiffusersEngine
from comfyui_psa.training.evaluation.manifest import read_manifest

ROUNDING = 1


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The batches that are drawn: method and pictures."""
    found: list[tuple[str, int]] = []
    original = DiffusersEngine.draw

    def watched(self: DiffusersEngine, run: Any, orders: Any) -> Any:
        found.append((run.method, len(orders)))
        return original(self, run, orders)

    monkeypatch.setattr(DiffusersEngine, "draw", watched)
    return found


def files(folder: Path) -> dict[str, int]:
    """The pictures of a folder and when they were written."""
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.glob("pictures/*/*.png")}


def test_the_manifest_names_every_setting(small: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "psa.safetensors", small)
    write_jsonl(
        tmp_path / "prompts.jsonl",
        [{"prompt_id": "x", "prompt": "a war", "category": "Violence", "content": "named", "expected": ["flag"]}],
    )
    methods = [
        BASE,
        {"name": "PSA", "kind": "adapter", "paths": (adapter,), "strengths": (0.5,)},
        {"name": "static", "kind": "adapter", "paths": (adapter,), "everyone": "L3"},
        {"name": "SLD", "kind": "sld", "degrees": ("max",), "concept": "war"},
    ]
    draw(evaluation(small, tmp_path / "run", methods, sampling={"negative_prompt": "blurry", "width": 48}))
    rows = pictures(tmp_path / "run")
    assert len(rows) == 8
    told = {(row.method, row.everyone, row.degree, row.concept) for row in rows.values()}
    assert told == {
        ("base", None, None, ""),
        ("PSA", None, None, ""),
        ("static", "L3", None, ""),
        ("SLD max", None, "max", "war"),
    }
    (row,) = [row for row in rows.values() if (row.method, row.user) == ("PSA", "L5")]
    assert (row.run, row.level, row.seen, row.strength) == (0, "L5", None, 0.5)
    assert row.banned == banned_categories(find_level("L5").profile)
    assert (row.prompt_id, row.prompt, row.category, row.content) == ("x", "a war", "Violence", "named")
    assert (row.expected, row.negative_prompt, row.case) == (("flag",), "blurry", f"L5|x|{row.seed}")
    assert (row.steps, row.guidance_scale, row.width, row.height) == (3, 4.0, 48, 64)
    assert row.engine == "diffusers, DPMSolverMultistepScheduler, fp32"
    assert row.base.startswith(f"{small.name} ")
    assert row.adapter is not None
    assert row.adapter.startswith("psa.safetensors ")
    assert all(len(name.split()[-1]) == 12 for name in (row.base, row.adapter))  # hashes
    assert drawn(tmp_path / "run")["PSA", 0, 0.5, row.case].shape == (64, 48, 3)
    (plain,) = {row.image for row in rows.values() if row.method == "base"}  # the same for both people
    assert plain.startswith("pictures/base/x-")


def test_what_is_there_is_not_drawn_again(small: Path, tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    adapter = write_adapter(tmp_path / "psa.safetensors", small)
    methods = [{"name": "PSA", "kind": "adapter", "paths": (adapter,)}, BASE]
    config = evaluation(small, tmp_path / "run", methods)
    assert "6 pictures, 0 are there already, 6 to draw." in draw(config)
    assert asked == [("PSA", 4), ("base", 2)]
    before, manifest = files(tmp_path / "run"), read_manifest(tmp_path / "run")
    asked.clear()
    assert "6 pictures, 6 are there already, 0 to draw." in draw(config)
    assert asked == []
    assert files(tmp_path / "run") == before
    assert read_manifest(tmp_path / "run") == manifest

    # A method and a person more: only theirs.
    more = evaluation(
        small,
        tmp_path / "run",
        [*methods, {"name": "words", "kind": "negative_prompt"}],
        users={"levels": ("L0", "L3", "L5")},
    )
    draw(more)
    assert asked == [("PSA", 2), ("words", 4), ("words", 2)]
    assert {name: files(tmp_path / "run")[name] for name in before} == before
    assert len(read_manifest(tmp_path / "run")) == 3 * 3 * 2


def test_an_interrupted_evaluation_goes_on(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = evaluation(small, tmp_path / "run", [BASE], sampling={"batch_size": 1, "pictures": 2})
    whole = evaluation(small, tmp_path / "whole", [BASE], sampling={"batch_size": 1, "pictures": 2})
    draw(whole)
    original, count = DiffusersEngine.draw, 0

    def interrupted(self: DiffusersEngine, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > 3:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(DiffusersEngine, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            draw(config)
    assert len(files(tmp_path / "run")) == 3
    assert len(read_manifest(tmp_path / "run")) == 3 * 2  # of two people, who share them
    said = draw(config)
    assert "4 pictures, 3 are there already, 1 to draw." in said
    ours, theirs = drawn(tmp_path / "run"), drawn(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", ["manifest", "picture", "both", "people"])
def test_a_failure_while_writing_leaves_nothing_half(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = evaluation(small, tmp_path / "run", [BASE])

    def full(*_arguments: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if name in ("picture", "both"):
            patch.setattr("PIL.Image.Image.save", full)
        if name in ("manifest", "both"):
            patch.setattr(pyarrow.parquet, "write_table", full)
        if name == "people":
            patch.setattr(drawing, "write_people", full)
        with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)\. Make room"):
            draw(config)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.endswith(".tmp")]
    draw(config)
    assert len(read_manifest(tmp_path / "run")) == 4


def test_a_changed_adapter_or_person_never_meets_old_pictures(small: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "psa.safetensors", small, seed=1)
    people = write_jsonl(tmp_path / "people.jsonl", [{"user": "a", "profile": {"age": 9}}])
    methods = [{"name": "PSA", "kind": "adapter", "paths": (adapter,)}]

    def images() -> set[str]:
        draw(evaluation(small, tmp_path / "run", methods, users={"levels": (), "file": people}))
        return {row.image for row in read_manifest(tmp_path / "run")}

    first = images()
    content = adapter.read_bytes()
    write_adapter(adapter, small, seed=2)
    second = images()
    write_jsonl(people, [{"user": "a", "profile": {"age": 40}}])
    third = images()
    assert len(first | second | third) == 6
    adapter.write_bytes(content)
    write_jsonl(people, [{"user": "a", "profile": {"age": 9}}])
    assert images() == first


def test_another_noise_schedule_is_another_base(small: Path, tmp_path: Path) -> None:
    base = copied(small, tmp_path / small.name)
    names = {}
    for value in (0.012, 0.014):
        edit(base, "scheduler/scheduler_config.json", beta_end=value)
        draw(evaluation(base, tmp_path / f"run{value}", [BASE], prompts={"limit": 1}, users={"levels": ("L0",)}))
        (names[value],) = {(row.base, row.image) for row in read_manifest(tmp_path / f"run{value}")}
    assert names[0.012][0] != names[0.014][0]
    assert names[0.012][1] != names[0.014][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": {"steps": 5}}, "steps: 3 there, 5 here"),
        ({"sampling": {"guidance_scale": 7.0}}, "guidance_scale: 4.0 there, 7.0 here"),
        ({"sampling": {"negative_prompt": "blurry"}}, "negative_prompt: "),
        ({"sampling": {"width": 72}}, "width: 64 there, 72 here"),
        ({"model": {"precision": "bf16"}}, "engine: "),
    ],
)
def test_the_folder_of_another_evaluation_is_refused(
    small: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    draw(evaluation(small, tmp_path / "run", [BASE], prompts={"limit": 1}))
    before = files(tmp_path / "run")
    with pytest.raises(DataError, match="belongs to another evaluation") as error:
        draw(evaluation(small, tmp_path / "run", [BASE], **changes))
    assert message in str(error.value)
    assert files(tmp_path / "run") == before


def _occupied(folder: Path) -> None:
    folder.mkdir()
    (folder / "holiday.png").write_bytes(b"")


def _damaged(folder: Path) -> None:
    folder.mkdir()
    (folder / "evaluation.json").write_text("{", encoding="utf-8")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_occupied, "holds something else than an evaluation"),
        (lambda folder: folder.write_text(""), "holds something else than an evaluation"),
        (_damaged, r"evaluation\.json is damaged"),
    ],
)
def test_a_folder_of_something_else_is_left_alone(
    small: Path, tmp_path: Path, prepare: Callable[[Path], None], message: str
) -> None:
    prepare(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    config = evaluation(small, tmp_path / "run", [BASE])
    with pytest.raises(DataError, match=message):
        draw(config)
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "prompts.jsonl"] == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": {"base": Path("gone")}}, DataError, r"model\.base: There is no file gone"),
        ({"prompts": {"file": Path("gone.csv")}}, DataError, r"prompts\.file: There is no file gone\.csv"),
        ({"users": {"file": Path("gone.csv")}}, DataError, r"users\.file: There is no file"),
        ({"pairs": {"sage": Path("gone")}}, DataError, r"pairs\.sage: There is no file"),
        ({"embeddings": {"given": Path("gone")}}, DataError, r"embeddings\.given: There is no file"),
        ({"model": {"base": Path(__file__)}}, BaseModelError, "is no base model"),
        ({"model": {"device": "tpu9"}}, TrainingError, 'model.device = "tpu9" cannot be used'),
    ],
)
def test_what_is_missing_is_named_before_anything_is_drawn(
    small: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        draw(evaluation(small, tmp_path / "run", [BASE], **changes))
    assert not (tmp_path / "run").exists()


def test_a_folder_in_which_people_were_being_embedded_goes_on(small: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "embeddings" / "0123").mkdir(parents=True)
    draw(evaluation(small, tmp_path / "run", [BASE]))
    assert drawn(tmp_path / "run")


@pytest.mark.parametrize("kind", ["adapter", "lora", "pipeline"])
def test_a_missing_file_of_a_method_names_the_method(small: Path, tmp_path: Path, kind: str) -> None:
    method = {"name": "mine", "kind": kind, "paths": (tmp_path / "gone.safetensors",)}
    with pytest.raises(DataError, match=r"paths of the method mine: There is no file .*gone"):
        draw(evaluation(small, tmp_path / "run", [BASE, method]))


@pytest.fixture(scope="module")
def shared(small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An evaluation that two processes drew, and what they said."""
    folder = tmp_path_factory.mktemp("shared")
    adapter = write_adapter(folder / "psa.safetensors", small)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "a harbour at dawn"}, {"prompt": "a crowd"}])
    (folder / "config.toml").write_text(
        f'''
model.base = "{small}"
model.precision = "fp32"
prompts.file = "prompts.jsonl"
users.levels = ["L0", "L5"]
sampling = {{ steps = 3, guidance_scale = 4.0, batch_size = 2 }}
methods = [{{ name = "base", kind = "base" }}, {{ name = "PSA", kind = "adapter", paths = ["{adapter}"] }}]
run.output = "run"
''',
        encoding="utf-8",
    )
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "comfyui_psa.training")
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "huggingface")}
    command = (sys.executable, *launcher, "evaluate", "config.toml", "--only-draw")
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


def test_two_processes_share_the_pictures(small: Path, shared: tuple[Path, str], tmp_path: Path) -> None:
    folder, said = shared
    assert said.count("6 pictures, 0 are there already, 6 to draw, 4 by this process of 2.") == 1
    assert said.count("Pictures: run") == 1
    methods = [BASE, {"name": "PSA", "kind": "adapter", "paths": (folder / "psa.safetensors",)}]
    changes = {"prompts": {"file": folder / "prompts.jsonl"}, "sampling": {"batch_size": 4}}
    draw(evaluation(small, tmp_path / "run", methods, **changes))
    ours, theirs = drawn(folder / "run"), drawn(tmp_path / "run")
    assert ours.keys() == theirs.keys()
    assert all(np.abs(ours[key] - theirs[key]).max() <= ROUNDING for key in ours)
    assert pictures(folder / "run") == pictures(tmp_path / "run")


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(TrainingError, match=r"started 3 processes, but they do not find each other"):
        drawing.processes()


def test_a_damaged_manifest_is_written_anew(small: Path, tmp_path: Path) -> None:
    config = evaluation(small, tmp_path / "run", [BASE])
    draw(config)
    replace(tmp_path / "run" / "manifest.parquet", b"nothing")
    draw(config)
    assert len(read_manifest(tmp_path / "run")) == 4
