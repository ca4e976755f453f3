"""`psa train` as people type it: what they print, write, and refuse."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from interrupted_runs import Ended, Workplace, command, folder_bytes, steps_kept, write_config
from safetensors.torch import load_file
from training_runs import adapter_file
from typer.testing import CliRunner, Result

from comfyui_psa.adapter import load_adapter
from comfyui_psa.profiles import Profile
from comfyui_psa.profiles.encoders import AttributesEncoder
from comfyui_psa.training.cli import app
from comfyui_psa.training.config import load_config

ATTRIBUTES = AttributesEncoder().encode([Profile()]).shape[1]

# An import of `datasets` fails as it does where the package is not installed.
WITHOUT_DATASETS = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "datasets":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
sys.argv = ["psa", *sys.argv[1:]]
from comfyui_psa.training.cli import main
main()
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace.write(tmp_path_factory.mktemp("command"))


def _psa(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})


def _sentence(ended: Ended) -> str:
    lines = ended.stderr.splitlines()
    assert (ended.code, len(lines), ended.stdout) == (1, 1, ""), lines[-1:]
    assert lines[0].startswith("psa: ")
    return lines[0]


def test_a_dry_run_shows_everything_and_writes_nothing(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = workplace.config(tmp_path / "run", run__accumulation=3)
    file = write_config(config, tmp_path / "run.toml")
    before = folder_bytes(tmp_path), folder_bytes(workplace.folder)
    result = _psa("train", file, "--dry-run", "--set", "run.steps=1234", "--set", "adapter.null=none",
                  "--set", "loss.user_dropout=0")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (folder_bytes(tmp_path), folder_bytes(workplace.folder)) == before

    shown = [line.strip() for line in result.stdout.splitlines()]
    settings = (tmp_path / "shown.toml").resolve()
    settings.write_text("\n".join(shown[: shown.index("Run")]), encoding="utf-8")
    overrides = ["run.steps=1234", "adapter.null=none", "loss.user_dropout=0"]
    assert load_config(settings) == load_config(file, overrides)

    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in shown if "  " in line)
    base_unet = workplace.folder / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    assert facts["UNet"] == f"{_numbers(base_unet):,} parameters, frozen"
    assert facts["optimizer steps"] == "1,234"
    assert facts["pairs per step"] == "6"
    pairs = len((config.data.train / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
    assert facts["epochs"] == f"{1234 * 6 / pairs:.4g} over {pairs} pairs, those of the validation included"
    # Every site's values, and the projection with its norm.
    hidden = (2 * 32, 2 * 64, 2 * 64, 3 * 64, 3 * 64, 3 * 32, 64)
    assert facts["adapter"] == f"{sum(hidden) * 24 + 24 * ATTRIBUTES + 3 * 24:,} parameters, trained"
    memory = [float(facts[name].removesuffix(" GB")) for name in ("UNet weights", "activations", "together")]
    assert 0 < memory[0] < memory[2]
    assert 0 < memory[1] < memory[2]


def _numbers(weights: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(weights).values())


def test_a_toml_file_alone_is_psa_train(workplace: Workplace, tmp_path: Path) -> None:
    config = workplace.config(tmp_path / "run", run__steps=3)
    file = write_config(config, tmp_path / "run.toml")
    ended = command([file, "--set", "tracking.every=2"], tmp_path)
    assert ended.code == 0, ended.stderr
    progress, done = ended.stderr.splitlines()
    number = r"-?[\d.]+(e[+-]\d+)?"
    assert re.fullmatch(rf"step 2/3  loss {number}  accuracy {number}  margin {number}  {number} pairs/s", progress), (
        progress
    )
    assert done == f"{adapter_file(config)}: put it into ComfyUI's models/psa_adapters."
    assert (config.run.output / "training_report.md").is_file()
    assert load_adapter(adapter_file(config)).config.training["steps"] == 3
    again = command(["train", file], tmp_path)
    assert "already holds a run (step-000003)" in _sentence(again)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.base=missing"], ["missing"]),
        (["data.train=missing"], ["missing"]),
        (["run.resume=latest"], ["no checkpoint in"]),
        (['tracking.trackers=["tensorbord"]'], ["tensorbord"]),
        (["optimizer.kind=adamw8bit"], ["bitsandbytes", "adafactor"]),
    ],
    ids=["base", "data", "checkpoint", "tracker", "optimizer"],
)
def test_what_is_missing_is_one_sentence(
    workplace: Workplace, tmp_path: Path, overrides: list[str], expected: list[str]
) -> None:
    file = write_config(workplace.config(tmp_path / "run"), tmp_path / "run.toml")
    message = _sentence(command([file, *(part for value in overrides for part in ("--set", value))], tmp_path))
    assert all(part in message for part in expected), message
    assert steps_kept(workplace.config(tmp_path / "run")) == []


def test_a_missing_configuration_is_one_sentence(tmp_path: Path) -> None:
    message = _sentence(command(["missing.toml"], tmp_path))
    assert message == (
        "psa: There is no configuration missing.toml. Name a TOML file, or one of miniature, psa-sd15, "
        "psa-sd15-combined, psa-sd15-text, psa-sdxl, psa-sdxl-combined, psa-sdxl-text."
    )


def test_a_missing_package_comes_with_the_command_that_installs_it(workplace: Workplace, tmp_path: Path) -> None:
    file = write_config(workplace.config(tmp_path / "run"), tmp_path / "run.toml")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DATASETS, "train", str(file)], capture_output=True, encoding="utf-8", check=False
    )
    message = _sentence(Ended(done.returncode, done.stdout, done.stderr))
    assert "datasets" in message
    assert "pip install -e '.[train]'" in message
