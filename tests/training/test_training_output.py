"""What `psa train` writes, what it says, and what it refuses."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import wandb
from observed_runs import MARKERS, ROWS, STEPS, USERS, Base, Run, embedding, marked_split, train_tiny
from pairs import read_metadata
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import adapter_file, checkpoint, metrics, tiny_config

from comfyui_psa.adapter import load_adapter
from comfyui_psa.training import train as recipe
from comfyui_psa.training.data.users import read_profile
from comfyui_psa.training.errors import DataError, TrainingError

LN_2 = math.log(2)


def test_the_curves_of_a_run(runs: dict[str, Run]) -> None:
    config = runs["sd"].config
    by_step = {line["step"]: line for line in metrics(config)}
    assert list(by_step) == [1, 2, 3]
    plain = {"loss", "implicit_accuracy", "margin", "gradient_norm", "learning_rate", "pairs_per_second"}
    plain |= {"chosen_error", "rejected_error", "adapter/projection_norm", "adapter/values_norm"}
    for line in by_step.values():
        assert plain <= line.keys()
    quarters = {f"{side}_error/quarter{i}" for side in ("chosen", "rejected") for i in (1, 2, 3, 4)}
    assert quarters <= {name for line in by_step.values() for name in line}
    assert by_step[1]["margin"] == 0
    assert by_step[1]["implicit_accuracy"] == 0.5
    assert by_step[3]["learning_rate"] == 1e-2

    events = EventAccumulator(str(config.run.output / "logs" / "psa"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert plain | quarters <= tags
    for name in plain:
        assert [event.value for event in events.Scalars(name)] == pytest.approx(
            [line[name] for line in by_step.values()], rel=1e-6
        )
    assert events.Tags()["images"] == ["grid"]


def test_weights_and_biases_is_given_curves_and_pictures(
    bases: dict[str, Base], split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = {"tracking.trackers": ("wandb",), "validation.grid_every": 3, "validation.grid_steps": 1}
    config = train_tiny(bases["sd"], split, tmp_path / "run", settings).config
    wandb.teardown()  # its own process writes the log: when that has ended, all of it is there
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert len(list(kept.glob("files/media/images/grid_*.png"))) == 1

    # A log of protocol buffers, in which numbers are JSON.
    content = next(kept.glob("*.wandb")).read_bytes()
    for line in metrics(config):
        for name in ("loss", "implicit_accuracy", "gradient_norm"):
            assert name.encode() in content
            assert json.dumps(line[name]).encode() in content


def test_held_out_pairs_and_unseen_users_are_looked_at_apart(runs: dict[str, Run]) -> None:
    text = (runs["sd"].config.run.output / "metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if "seen/loss" in line]
    assert [line["step"] for line in lines] == [0, 2, 3]
    for split in ("seen", "unseen"):
        assert lines[0][f"{split}/loss"] == pytest.approx(LN_2, rel=1e-6)
        assert all(f"{split}/chosen_error/quarter{i}" in lines[0] for i in (1, 2, 3, 4))
        assert lines[2][f"{split}/loss"] != lines[1][f"{split}/loss"] != lines[0][f"{split}/loss"]
    assert lines[2]["seen/loss"] != lines[2]["unseen/loss"]


def test_users_that_training_knows_are_not_unseen(runs: dict[str, Run], split: Path, tmp_path: Path) -> None:
    settings = {"validation.every": 1, "validation.unseen": split.with_name("seen")}
    with pytest.raises(DataError, match=r"5 users of .*seen are also in .*train .*they are not unseen"):
        train_tiny(runs["sd"].base, split, tmp_path / "run", settings)


def test_picture_report_and_last_words(runs: dict[str, Run]) -> None:
    output = runs["sd"].config.run.output
    with PIL.Image.open(output / "grids" / "step-000003.png") as grid:
        assert grid.width > 7 * 64  # base, L0 to L5
        assert grid.height > 64
    report = (output / "training_report.md").read_text(encoding="utf-8")
    assert f"{STEPS} of {STEPS}" in report
    assert f"{ROWS} of {USERS} users" in report
    assert "grids/step-000003.png" in report
    assert f"step {STEPS}/{STEPS}" in runs["sd"].said
    assert f"{adapter_file(runs['sd'].config)}: put it into ComfyUI's models/psa_adapters." in runs["sd"].said


def test_nothing_in_the_output_tells_of_users(runs: dict[str, Run], split: Path) -> None:
    users = [row["user_data"] for name in ("train", "seen", "unseen") for row in read_metadata(split.with_name(name))]
    words = {value for user in users for value in user.values() if isinstance(value, str) and len(value) > 5}
    assert {"qanzibel-1", *MARKERS.values()} <= words
    assert len(words) > 15
    files = [path for path in runs["sd"].config.run.output.rglob("*") if path.is_file()]
    names = {path.suffix for path in files}
    assert {".safetensors", ".bin", ".json", ".jsonl", ".md", ".png", ".yml"} <= names
    for path in files:
        content = path.read_bytes().decode("latin-1")
        assert not [word for word in words if word in content], path


def test_a_user_without_embedding_is_an_error_that_names_the_row(
    bases: dict[str, Base], split: Path, tmp_path: Path
) -> None:
    embeddings = tmp_path / "embeddings"
    embeddings.mkdir()
    users = {row["user_data"]["User_ID"]: row["user_data"] for row in read_metadata(split)}
    for user, values in users.items():
        if user != "qanzibel-3":
            np.save(embeddings / f"{user}.npy", embedding(read_profile(values, user))[0].numpy())
    settings = {"data.embeddings": embeddings}
    with pytest.raises(DataError, match=r"row 3 of metadata.jsonl: There is no embedding of the user qanzibel-3"):
        train_tiny(bases["sd"], split, tmp_path / "run", settings)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()

    found = train_tiny(bases["sd"], split, tmp_path / "run", {**settings, "data.max_skipped": 2, "run.steps": 1})
    history = load_adapter(adapter_file(found.config)).config.training
    assert (history["pairs"], history["users"]) == (ROWS - 2, USERS - 1)


def test_a_broken_image_is_an_error_that_names_the_row_or_a_reported_exception(
    bases: dict[str, Base], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, seen = marked_split(tmp_path / "data"), marked_split(tmp_path / "seen")
    for broken in (data / "000004_rejected.png", seen / "000004_rejected.png", seen / "000006_chosen.png"):
        broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match=r"row 5 of metadata.jsonl: .*000004_rejected.png cannot be read as an image"):
        train_tiny(bases["sd"], data, tmp_path / "run", {})

    looking = {"validation.every": 1, "validation.pairs": 1, "validation.seen": seen, "validation.unseen_users": 0.0}
    settings = {"data.max_skipped": 2, "run.steps": 1, **looking}
    found = train_tiny(bases["sd"], data, tmp_path / "run", settings, report=True)
    messages = [record.message for record in caplog.records if "left out" in record.message]
    names = ["000004_rejected.png", "000004_rejected.png", "000006_chosen.png"]
    assert all(name in message for name, message in zip(names, messages, strict=True))
    assert load_adapter(adapter_file(found.config)).config.training["pairs"] == ROWS - 1
    report = (found.config.run.output / "training_report.md").read_text(encoding="utf-8")
    assert "| rows of data.train left out | 1 |" in report
    assert "| rows of validation.seen left out | 2 |" in report


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer.kind": "adamw8bit"}, r"adamw8bit.* needs a CUDA device .*this device is cpu.*\"adamw\""),
        ({"model.attention": "xformers"}, r"model.attention = \"xformers\" cannot be used here .*\"sdpa\""),
        ({"tracking.trackers": ("nonsense",)}, r"tracking.trackers = \['nonsense'\] cannot be used"),
    ],
)
def test_what_this_machine_has_not(
    bases: dict[str, Base], split: Path, tmp_path: Path, settings: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        train_tiny(bases["sd"], split, tmp_path / "run", settings)


def test_a_wrong_validation_split_is_known_before_anything_is_cached(
    bases: dict[str, Base], split: Path, tmp_path: Path
) -> None:
    settings = {"validation.every": 1, "validation.seen": tmp_path / "sean", "data.cache": tmp_path / "cache"}
    with pytest.raises(DataError, match=r"There is no folder .*sean"):
        train_tiny(bases["sd"], split, tmp_path / "run", settings)
    assert not (tmp_path / "cache").exists()


def test_a_tracker_that_cannot_start_is_an_error_in_words(
    bases: dict[str, Base], split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody_is_logged_in(*_: object, **__: object) -> None:
        raise wandb.Error("api_key not configured (no-tty). call wandb.login(key=[your_api_key])")

    monkeypatch.setattr(wandb, "init", nobody_is_logged_in)
    with pytest.raises(TrainingError, match=r"\['wandb'\] cannot start \(api_key not configured.*WANDB_MODE=offline"):
        train_tiny(bases["sd"], split, tmp_path / "run", {"tracking.trackers": ("wandb",)})


def test_pictures_of_steps_that_were_taken_back_are_gone(bases: dict[str, Base], split: Path, tmp_path: Path) -> None:
    settings = {"validation.grid_every": 1, "validation.grid_steps": 1, "run.checkpoint_every": 1}
    first = train_tiny(bases["sd"], split, tmp_path / "run", settings | {"run.steps": 2}).config
    back = {"run.resume": str(checkpoint(first, 1)), "run.steps": 2, "validation.grid_every": 9}
    train_tiny(bases["sd"], split, tmp_path / "run", settings | back)
    assert [path.name for path in (tmp_path / "run" / "grids").iterdir()] == ["step-000001.png"]


def test_a_terminal_is_shown_a_bar(runs: dict[str, Run], split: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    config = tiny_config(tmp_path / "run", runs["sd"].base.folder, split, {"run.steps": 2})
    recipe.train(config, Console(file=said, width=160, force_terminal=True, color_system=None))
    (last,) = [line for line in said.getvalue().splitlines() if " 2/2 " in line][-1:]
    for part in ("training", "loss ", "accuracy ", "margin ", "pairs/s"):
        assert part in last
    assert re.search(r" \d:\d\d:\d\d ", last)  # the time that is left


def test_a_finished_adapter_is_rounded_if_the_configuration_says_so_and_checkpoints_are_not(
    bases: dict[str, Base], split: Path, tmp_path: Path
) -> None:
    config = train_tiny(bases["sd"], split, tmp_path / "run", {"adapter.dtype": "fp16"}).config
    whole = load_adapter(config.run.output / "checkpoints" / f"step-{STEPS:06d}" / "adapter.safetensors").state_dict()
    rounded = load_adapter(adapter_file(config)).state_dict()
    assert any(not torch.equal(whole[name], rounded[name]) for name in whole)
    for name, weight in whole.items():  # mean and deviation of embeddings are no weights
        expected = weight if name.startswith("embedding_") else weight.half().float()
        assert torch.equal(expected, rounded[name]), name
