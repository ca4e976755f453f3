"""The training report: what it says, and what it links to, from metrics written by the run's own writer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from comfyui_psa.training.config import TrainConfig, load_config
from comfyui_psa.training.dpo.metrics import METRICS, MetricsFile, device_memory
from comfyui_psa.training.dpo.report import write_report
from comfyui_psa.training.errors import TrainingError

STEPS = 60
FACTS = {"base": "sd15.safetensors", "pairs": "4,000", "skipped rows": "1: row 3 | broken"}


@pytest.fixture
def config() -> TrainConfig:
    sections: dict[str, Any] = {
        "model": {"base": "models/sd15.safetensors"},
        "data": {"train": "data/train", "encoder": {"batch_size": 3}},
        "run": {"steps": STEPS},
        "validation": {"grid_prompts": ['a "quoted" harbour', "straße\nand street"]},
    }
    return TrainConfig.model_validate(sections)


def values(step: int) -> dict[str, float]:
    errors = {
        f"{side}_error{quarter}": sign * 1e-5 * step
        for side, sign in (("chosen", -1), ("rejected", 1))
        for quarter in ("", *(f"/quarter{i}" for i in range(1, 5)))
    }
    return {"loss": 0.7 - 0.001 * step, "implicit_accuracy": 0.5 + 0.005 * step, "margin": 0.01 * step, **errors}


def write_metrics(output: Path, steps: int = STEPS, **extra: float) -> None:
    output.mkdir(parents=True, exist_ok=True)
    file = MetricsFile(output, resumed_step=0)
    for step in range(steps + 1):
        if step:
            optimizer = {"gradient_norm": 0.1 + step, "learning_rate": 5e-6, "pairs_per_second": 3.25}
            norms = {"adapter/projection_norm": 30.0, "adapter/values_norm": 0.1 * step}
            file.write(step, {**values(step), **optimizer, **norms, **extra})
        if step % 20 == 0:
            file.write(step, {f"{split}/{k}": v for split in ("seen", "unseen") for k, v in values(step).items()})


def links(report: Path) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", report.read_text(encoding="utf-8"))


def table(report: Path) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in report.read_text(encoding="utf-8").splitlines() if "|" in line]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_first_and_last_values_are_those_of_the_metrics(tmp_path: Path, config: TrainConfig) -> None:
    write_metrics(tmp_path)
    report = write_report(tmp_path, config, FACTS)
    assert report == tmp_path / "training_report.md"
    rows = table(report)
    assert rows["loss"] == ["0.699", "1", "0.64", "60"]
    assert rows["unseen/margin"] == ["0", "0", "0.6", "60"]
    assert rows["rejected_error/quarter4"] == ["1e-05", "1", "0.0006", "60"]
    assert rows["adapter/values_norm"] == ["0.1", "1", "6", "60"]
    logged = {*values(1), "gradient_norm", "learning_rate", "pairs_per_second", "adapter/projection_norm"}
    logged |= {"adapter/values_norm", *(f"{split}/{name}" for split in ("seen", "unseen") for name in values(1))}
    assert logged <= set(rows)


def test_facts_configuration_and_warning_are_there(tmp_path: Path, config: TrainConfig) -> None:
    write_metrics(tmp_path)
    text = write_report(tmp_path, config, FACTS).read_text(encoding="utf-8")
    assert "| pairs | 4,000 |" in text
    assert "| skipped rows | 1: row 3 \\| broken |" in text
    assert "**Implicit accuracy says nothing about the pictures**" in text
    toml = text.split("```toml\n")[1].split("```")[0]
    (tmp_path / "again.toml").write_text(toml, encoding="utf-8")
    assert load_config(tmp_path / "again.toml") == config


def test_plots_are_linked_and_legible_in_size(tmp_path: Path, config: TrainConfig) -> None:
    write_metrics(tmp_path)
    report = write_report(tmp_path, config, {})
    assert links(report) == [f"report/{name}.png" for name in ("loss", "errors", "optimizer", "speed")]
    for link in links(report):
        with Image.open(tmp_path / link) as image:
            assert image.format == "PNG"
            assert min(image.size) > 300
            assert np.asarray(image.convert("L")).std() > 5
    assert not list(tmp_path.rglob("*.tmp"))


def test_curves_follow_the_numbers(tmp_path: Path, config: TrainConfig) -> None:
    """Equal numbers give an equal picture; a change in one split's values changes the picture that shows it alone."""

    def plots(name: str) -> dict[str, bytes]:
        write_report(tmp_path / name, config, {})
        return {path.stem: path.read_bytes() for path in (tmp_path / name / "report").iterdir()}

    for name in ("one", "same", "other"):
        write_metrics(tmp_path / name)
    other = tmp_path / "other" / METRICS
    other.write_text(other.read_text().replace('"unseen/loss": 0.7', '"unseen/loss": 0.6'))
    one, same, changed = plots("one"), plots("same"), plots("other")
    assert one == same
    assert {name for name in one if one[name] != changed[name]} == {"loss"}


def test_gpu_memory_has_a_panel_only_where_it_was_measured(tmp_path: Path, config: TrainConfig) -> None:
    widths = []
    for name, extra in (("cpu", {}), ("cuda", {"gpu_memory_gb": 11.5})):
        write_metrics(tmp_path / name, **extra)
        write_report(tmp_path / name, config, {})
        widths.append(Image.open(tmp_path / name / "report" / "speed.png").width)
    assert widths[1] == 2 * widths[0]


def test_grids_are_linked_in_order(tmp_path: Path, config: TrainConfig) -> None:
    write_metrics(tmp_path)
    (tmp_path / "grids").mkdir()
    for step in (1000, 500, 12000):
        Image.new("RGB", (8, 8)).save(tmp_path / "grids" / f"step-{step:06d}.png")
    report = write_report(tmp_path, config, {})
    grids = [link for link in links(report) if link.startswith("grids/")]
    steps = ["000500", "001000", "012000"]
    assert grids == [f"grids/step-{step}.png" for step in ("012000", *steps)]  # the last one is shown
    assert "Step [500](grids/step-000500.png), [1,000](" in report.read_text()


@pytest.mark.parametrize("content", [None, "", '{"step": 10, "lo'])
def test_run_without_metrics(tmp_path: Path, config: TrainConfig, content: str | None) -> None:
    if content is not None:
        (tmp_path / METRICS).write_text(content)
    report = write_report(tmp_path, config, FACTS)
    text = report.read_text(encoding="utf-8")
    assert "**Nothing was logged:** `metrics.jsonl` is missing or empty" in text
    assert "| pairs | 4,000 |" in text
    assert links(report) == []
    assert list((tmp_path / "report").iterdir()) == []


def test_interrupted_run_says_how_far_it_came(tmp_path: Path, config: TrainConfig) -> None:
    write_metrics(tmp_path, steps=37)
    assert "Logged up to step 37 of 60." in write_report(tmp_path, config, {}).read_text()
    write_metrics(tmp_path)
    assert "All 60 steps were done." in write_report(tmp_path, config, {}).read_text()


def test_only_a_validation_before_the_first_step(tmp_path: Path, config: TrainConfig) -> None:
    write_metrics(tmp_path, steps=0)
    report = write_report(tmp_path, config, {})
    assert links(report) == ["report/loss.png"]
    assert table(report)["seen/loss"] == ["0.7", "0", "0.7", "0"]


def test_report_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path, config: TrainConfig) -> None:
    write_metrics(tmp_path)
    before = write_report(tmp_path, config, {"run": "first"}).read_bytes()
    for path in (tmp_path / "report").iterdir():
        path.unlink()
    (tmp_path / "report").rmdir()
    (tmp_path / "report").write_text("in the way")
    with pytest.raises(TrainingError, match=r"report cannot be written to .* metrics\.jsonl holds all"):
        write_report(tmp_path, config, {"run": "second"})
    assert (tmp_path / "training_report.md").read_bytes() == before


def test_the_memory_of_a_gpu_is_one_of_the_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: devices.append(device) or 12_345_000_000)
    assert device_memory(torch.device("cuda", 1)) == {"gpu_memory_gb": 12.345}
    assert devices == [torch.device("cuda", 1)]
    assert device_memory(torch.device("cpu")) == {}
