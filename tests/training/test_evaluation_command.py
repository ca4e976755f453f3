"""The command `psa evaluate`: from a configuration to a report, or one half of it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from evaluations import write_adapter
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

from comfyui_psa.training.cli import app
from comfyui_psa.training.errors import DataError, TrainingError
from comfyui_psa.training.evaluation import assess as assessing
from comfyui_psa.training.evaluation.assess_config import AssessSettings
from comfyui_psa.training.evaluation.config import load_evaluation
from comfyui_psa.training.evaluation.engines.local import DiffusersEngine
from comfyui_psa.training.evaluation.evaluate import evaluate
from comfyui_psa.training.evaluation.manifest import read_manifest


@pytest.fixture
def config(small: Path, tmp_path: Path) -> Path:
    """Two methods, one prompt, two levels."""
    adapter = write_adapter(tmp_path / "psa.safetensors", small)
    (tmp_path / "prompts.toml").write_text('prompts = ["a harbour at dawn"]', encoding="utf-8")
    path = tmp_path / "config.toml"
    path.write_text(
        f'''
model = {{ base = "{small}", precision = "fp32", device = "cpu" }}
prompts.file = "{tmp_path / "prompts.toml"}"
users.levels = ["L0", "L5"]
sampling.steps = 2
methods = [{{ name = "base", kind = "base" }}, {{ name = "PSA", kind = "adapter", paths = ["{adapter}"] }}]
run.output = "{tmp_path / "run"}"
assess.title = "Mine"
''',
        encoding="utf-8",
    )
    return path


@pytest.fixture
def assessed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, AssessSettings]]:
    """What was handed on to be measured; measuring has tests of its own."""
    found: list[tuple[Path, AssessSettings]] = []

    def watched(folder: Path, settings: AssessSettings, _progress: Progress) -> Path:
        found.append((folder, settings))
        assert len(read_manifest(folder)) == 4
        return folder / "report.html"

    monkeypatch.setattr(assessing, "assess", watched)
    return found


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_it_draws_then_measures(config: Path, tmp_path: Path, assessed: list[Any]) -> None:
    result = run(config)
    assert result.exit_code == 0, result.exception
    ((folder, settings),) = assessed
    assert folder == tmp_path / "run"
    assert settings.title == "Mine"
    assert f"Report: {tmp_path / 'run' / 'report.html'}" in result.stderr
    about = json.loads((tmp_path / "run" / "evaluation.json").read_text(encoding="utf-8"))
    assert (about["format"], about["steps"]) == ("psa_evaluation", 2)


def test_each_half_can_be_had_alone(config: Path, tmp_path: Path, assessed: list[Any]) -> None:
    result = run(config, "--only-draw")
    assert result.exit_code == 0, result.exception
    assert assessed == []
    assert f"Pictures: {tmp_path / 'run'}" in result.stderr
    (tmp_path / "psa.safetensors").unlink()  # what is drawn can be measured without the models
    result = run(config, "--only-assess", "--set", "assess.title=Other")
    assert result.exit_code == 0, result.exception
    assert assessed[0][1].title == "Other"


def test_nothing_can_be_measured_before_it_is_drawn(config: Path) -> None:
    with pytest.raises(DataError, match=r"has no manifest\.parquet\. Draw its pictures first"):
        evaluate(load_evaluation(config), Console(quiet=True), "assess")


def test_both_halves_alone_are_nothing(config: Path) -> None:
    result = run(config, "--only-draw", "--only-assess")
    assert isinstance(result.exception, TrainingError)
    assert "leave nothing to do" in str(result.exception)


def test_a_setting_can_be_changed_for_one_run(config: Path, tmp_path: Path) -> None:
    result = run(config, "--only-draw", "--set", "sampling.steps=1", "--set", f"run.output={tmp_path / 'other'}")
    assert result.exit_code == 0, result.exception
    assert {row.steps for row in read_manifest(tmp_path / "other")} == {1}
    assert not (tmp_path / "run").exists()


def test_sigterm_lets_go_of_what_is_held_and_the_same_command_goes_on(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    closed: list[bool] = []
    original = DiffusersEngine.draw

    def terminated(self: DiffusersEngine, *arguments: Any) -> Any:
        if (tmp_path / "run" / "pictures").is_dir():
            signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(DiffusersEngine, "draw", terminated)
        patch.setattr(DiffusersEngine, "close", lambda self: closed.append(True))
        result = run(config, "--only-draw", "--set", "sampling.batch_size=1")
    assert result.exit_code == 128 + signal.SIGTERM
    assert closed == [True]
    assert signal.getsignal(signal.SIGTERM) == before
    assert 0 < len(read_manifest(tmp_path / "run")) < 4
    assert run(config, "--only-draw").exit_code == 0
    assert len(read_manifest(tmp_path / "run")) == 4
