"""The whole way, shortened to moments: a base from nothing, pairs, an adapter, and tables of what it does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import PIL.Image
import pytest
import torch
from diffusers import StableDiffusionPipeline
from rich.progress import Progress
from typer.testing import CliRunner

from comfyui_psa.adapter import load_adapter
from comfyui_psa.training import train
from comfyui_psa.training.base import open_base
from comfyui_psa.training.cli import app
from comfyui_psa.training.config import load_config
from comfyui_psa.training.errors import TrainingError
from comfyui_psa.training.miniature import ablation, adapters, evaluation, recipe
from comfyui_psa.training.miniature.fitting import Plan
from comfyui_psa.training.miniature.recipe import Extent, train_base
from comfyui_psa.training.miniature.sampling import Painter
from comfyui_psa.training.miniature.world import GLYPHS

MOMENT = Extent(
    autoencoder=Plan("autoencoder", steps=3, learning_rate=1e-3),
    detector=Plan("detector", steps=3, learning_rate=1e-3),
    text_model=Plan("text model", steps=3, learning_rate=1e-3),
    unet=Plan("UNet", steps=3, learning_rate=1e-3),
    scenes=48,
    drawings=32,
    prompts=4,
)
SHORT = (
    "run.steps=2",
    "run.batch_size=2",
    "validation.every=2",
    "validation.pairs=1",
    "validation.held_out=0.1",
    "validation.grid_every=2",
    "validation.grid_steps=1",
    "tracking.every=1",
    "tracking.trackers=[]",
)


def one_thread(_workers: int, _context: object, opened: Callable[..., None], files: tuple[object, ...]) -> Executor:
    """In place of processes, which would each import everything."""
    return ThreadPoolExecutor(1, initializer=opened, initargs=files)


class QuickPainter(Painter):
    """A painter of two steps in place of ten: what a base of three steps of training draws is noise anyway."""

    def paint(self, *arguments: Any, **options: Any) -> list[PIL.Image.Image]:
        return super().paint(*arguments, **options, steps=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("miniature")
    with Progress(disable=True) as progress:
        train_base(folder / "work", folder / "base", progress, extent=MOMENT)
    return folder / "base"


def test_the_base_is_a_pipeline_of_diffusers_and_a_base_for_training(base: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(base, local_files_only=True, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline("a ring", width=96, height=96, num_inference_steps=1).images
    assert image.size == (96, 96)
    opened = open_base(base)
    assert opened.prediction_type == "v_prediction"
    assert opened.unet(torch.float32).dtype == torch.float32
    weights = [path for path in base.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in weights) < 12e6


def test_the_figures_come_from_the_written_files(base: Path) -> None:
    figures = json.loads((base / recipe.FIGURES).read_text(encoding="utf-8"))
    assert set(figures["detector"]) == {"drawings", "decoded latents"}
    assert {kind: shares["object"]["pictures"] for kind, shares in figures["base"].items()} == {
        "named": 4,
        "implied": 4,
        "harmless": 4,
        "all": 12,
    }


def test_the_card_says_what_it_is_and_what_was_measured(base: Path) -> None:
    figures = json.loads((base / recipe.FIGURES).read_text(encoding="utf-8"))
    card = (base / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\n")
    for plan in (
        "autoencoder 3 steps of 8",
        "detector 3 steps of 64",
        "text model 3 steps of 64",
        "UNet 3 steps of 16",
    ):
        assert plan in card
    assert f"psa miniature train-base OUT --seed {figures['seed']}" in card
    for mention, shares in figures["base"].items():
        (line,) = [line for line in card.splitlines() if line.startswith(f"| {mention} |")]
        assert all(
            f"{share['value']:.3f} ({share['low']:.3f}-{share['high']:.3f})" in line for share in shares.values()
        )
    for where, accuracy in figures["detector"].items():
        assert f"| {where} | {accuracy['glyphs']:.3f} | {accuracy['objects']:.3f} |" in card


def test_going_on_after_the_end_changes_nothing(base: Path, tmp_path: Path) -> None:
    with Progress(disable=True) as progress:
        train_base(base.parent / "work", tmp_path / "again", progress, extent=MOMENT)
    for part in ("unet", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert (tmp_path / "again" / name).read_bytes() == (base / name).read_bytes()


def test_a_base_that_is_being_replaced_is_no_model(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(base, tmp_path / "again")
    monkeypatch.setattr(recipe, "write_base", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), Progress(disable=True) as progress:
        train_base(base.parent / "work", tmp_path / "again", progress, extent=MOMENT)
    with pytest.raises(TrainingError):
        open_base(tmp_path / "again")


def test_a_painted_picture_depends_on_its_own_noise_and_prompt_alone(base: Path) -> None:
    painter = Painter(base)
    noise = torch.randn((3, *painter.latent_shape), generator=torch.Generator().manual_seed(1))
    prompts = ["a tree in the snow", "a ring", "a cat at night"]
    together = painter.paint(prompts, noise, steps=2)
    alone = painter.paint(prompts[1:2], noise[1:2], steps=2)
    # The same up to the kernels' rounding for another batch size.
    difference = torch.tensor(list(together[1].tobytes())).sub(torch.tensor(list(alone[0].tobytes()))).abs()
    assert int(difference.max()) <= 1
    assert together[0].tobytes() != together[1].tobytes()


def test_an_adapter_is_trained_on_drawn_pairs_and_measured(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapters, "PAIRS", 24)
    monkeypatch.setattr(adapters, "PEOPLE", 40)

    def psa(*arguments: object) -> str:
        done = CliRunner().invoke(app, ["miniature", *map(str, arguments)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    changes = [part for change in SHORT for part in ("--set", change)]
    psa("train-adapter", "--base", base, *changes)
    psa("train-adapter", "--base", base, "--static", *changes)
    work = tmp_path / "runs" / "miniature"
    assert len((work / "psa-pairs" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()) == 24
    ours, static = work / "psa" / "psa_miniature.safetensors", work / "static" / "static_miniature.safetensors"
    assert (work / "psa" / "grids" / "step-000002.png").is_file()

    command = (
        "evaluate", f"PSA={ours}", f"PSA={ours}", "--static", static, "--base", base, "--per-cell", 2,
        "--output", tmp_path / "results.json",
    )  # fmt: skip
    shown = psa(*command)  # in processes of their own; from here on in this one, which knows everything already
    monkeypatch.setattr(evaluation, "ProcessPoolExecutor", one_thread)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    rows = results["shares"]
    pictures = {row["method"]: row["pictures"] for row in rows}
    assert pictures == {"base": 2, "negative prompt": 2, "static": 2, "PSA": 4}
    assert {len(row["runs"]) for row in rows if row["method"] == "PSA"} == {2}
    assert {row["method"] for row in results["differences"]} == {"negative prompt", "static", "PSA"}
    assert {(row["group"], row["people"]) for row in rows} == {
        (group, people) for group in ("nothing", "some", "everything") for people in ("seen", "unseen")
    }
    assert shown.strip() == (tmp_path / "results.md").read_text(encoding="utf-8").strip()
    implied = [row for row in results["phrases"] if (row["method"], row["measure"]) == ("base", "clean")]
    assert {row["asked"].split(", ")[-1] for row in implied} == {"first phrase", "second phrase"}
    assert sum(row["pictures"] for row in implied) == 2 * 4  # some and everything, seen and unseen

    counted = sorted((work / "counted").iterdir())
    assert len(counted) == 4  # the two runs are of one file
    for file in counted:  # as if it had been interrupted, and one file damaged
        rows = json.loads(file.read_text(encoding="utf-8"))
        file.write_text("{" if file is counted[0] else json.dumps(dict([*rows.items()][:40])), encoding="utf-8")
    assert psa(*command) == shown
    for file in counted:
        rows = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({key: [[], []] for key in rows}), encoding="utf-8")
    assert psa(*command) != shown  # what is kept counts, and is not drawn again

    kept = {file.name for file in (work / "counted").iterdir()}
    monkeypatch.setattr(evaluation, "Painter", QuickPainter)
    looked = psa(
        "evaluate", f"PSA={ours}", "--base", base, "--per-cell", 2, "--no-seen", "--strength", 0, "--strength", 1,
        "--likeness", 1, "--output", tmp_path / "strengths.json",
    )  # fmt: skip
    assert len({file.name for file in (work / "counted").iterdir()} - kept) == 1  # strength 1 is there already
    found = json.loads((tmp_path / "strengths.json").read_text(encoding="utf-8"))
    assert {row["people"] for row in found["shares"]} == {"unseen"}
    alike = {(row["method"], row["group"], row["asked"]): row["value"] for row in found["likeness"]}
    assert {method for method, *_ in alike} == {"base", "negative prompt", "PSA, strength 0", "PSA, strength 1"}
    assert not any("banned" in asked for *_, asked in alike)
    same = [value for (method, *_), value in alike.items() if method in ("base", "PSA, strength 0")]
    assert same == pytest.approx([1.0] * len(same), abs=1e-6)
    assert min(value for (method, *_), value in alike.items() if method == "negative prompt") < 0.99
    assert "SSIM" in looked

    only = (
        "evaluate",
        f"PSA={ours}",
        "--base",
        base,
        "--per-cell",
        2,
        "--output",
        tmp_path / "seen.json",
        "--no-unseen",
    )
    assert "unseen" not in psa(*only)

    def counted() -> int:
        return sum(len(json.loads(file.read_text(encoding="utf-8"))) for file in (work / "counted").iterdir())

    before = counted()
    psa(*only)
    assert counted() == before
    psa(*only, "--trial", 1)  # other prompts and other noise, so other pictures
    assert counted() > before
    found = json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))
    assert {row["people"] for row in found["shares"]} == {"seen"}
    with pytest.raises(TrainingError, match="Neither seen nor unseen"):
        psa(*only, "--no-seen")


def test_an_ablation_trains_what_is_not_there_and_compares_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapters, "PAIRS", 24)
    monkeypatch.setattr(adapters, "PEOPLE", 40)
    monkeypatch.setattr(ablation, "PEOPLE", 40)
    monkeypatch.setattr(evaluation, "ProcessPoolExecutor", one_thread)
    monkeypatch.setattr(evaluation, "Painter", QuickPainter)
    monkeypatch.setattr(train, "write_report", mock.Mock())  # whose plots take longer than such a training
    short = [change for change in SHORT if not change.startswith(("run.steps", "validation.grid"))]
    plan = {"steps": 4, "seeds": [1, 2], "per_cell": 1, "likeness": 1, "curve": 1, "checkpoints": 2}
    variants = {
        "text, plain": ["loss.fidelity=3"],
        "the paper's": ['adapter.kinds=["constant"]', "loss.winner_anchor=0"],
    }
    lines = [f"{name} = {value}" for name, value in plan.items()] + ["common = ['loss.fidelity=0', 'loss.beta=7']"]
    for name, changes in variants.items():
        lines += [f'[variants."{name}"]', f"set = {json.dumps([*short, *changes])}"]
    lines.append("first_phrases = true")  # of the last one
    (tmp_path / "plan.toml").write_text("\n".join(lines), encoding="utf-8")
    options = ("ablation", "--base", base, "--plan", "plan.toml", "--output", tmp_path / "results.json")

    def run() -> str:
        done = CliRunner().invoke(app, ["miniature", *map(str, options)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    shown = run()
    rows = {line.split("|")[1].strip() for line in shown.splitlines()[2:] if line.startswith("|")}
    assert rows == {"base", "negative prompt", *variants}
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {len(row["runs"]) for row in results["shares"] if row["method"] in variants} == {2}
    (line,) = [line for line in shown.splitlines() if line.startswith("| text, plain |")]
    asked = ("text, plain", "some", "unseen", "banned, named", "clean")
    (clean,) = [
        row["value"]
        for row in results["shares"]
        if tuple(row[name] for name in ("method", "group", "people", "asked", "measure")) == asked
    ]
    assert line.split("|")[2].strip().startswith(f"{100 * clean:.1f} (")
    assert {name: [row["step"] for row in rows] for name, rows in results["curves"].items()} == {
        name: [2, 4] for name in variants
    }
    with PIL.Image.open(tmp_path / "results.png") as picture:
        assert picture.width > 1000
    assert (tmp_path / "results.md").read_text(encoding="utf-8").startswith(shown.strip()[:200])

    pairs = tmp_path / "runs" / "miniature" / "psa-first-phrases-pairs"
    told = (pairs / "metadata.jsonl").read_text(encoding="utf-8")
    assert not any(glyph.implied[1] in told for glyph in GLYPHS.values())

    trained = sorted((tmp_path / "runs" / "miniature" / "ablation").glob("*/*.safetensors"))
    names = [path.parent.name.rpartition("-")[0] for path in trained]
    assert names == ["text-plain-1", "text-plain-2", "the-paper-s-1", "the-paper-s-2"]
    kinds = [load_adapter(path).config for path in trained]
    assert [config.constant for config in kinds] == [False, False, True, True]
    assert [config.training.get("fidelity") for config in kinds] == [3, 3, None, None]
    assert {config.training["beta"] for config in kinds} == {7}
    before = [path.stat().st_mtime_ns for path in trained]
    assert run() == shown
    assert [path.stat().st_mtime_ns for path in trained] == before


@pytest.mark.parametrize("command", [("evaluate", "A.safetensors"), ("ablation",)])
def test_results_that_their_tables_would_replace_are_refused_at_once(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = CliRunner().invoke(
        app, ["miniature", *command, "--output", str(tmp_path / "results.md")], env={"COLUMNS": "250"}
    )
    assert done.exit_code == 2
    assert "is no .json file" in done.output


@pytest.mark.parametrize("text", ["steps = 4", 'steps = "x"\nunknown = 1', "steps = ["])
def test_a_plan_that_makes_no_sense_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.toml").write_text(text, encoding="utf-8")
    command = ("miniature", "ablation", "--plan", tmp_path / "plan.toml", "--output", tmp_path / "results.json")
    done = CliRunner().invoke(app, [*map(str, command)])
    assert done.exit_code == 1
    assert "plan.toml" in str(done.exception) or "plan.toml" in done.output


def test_the_plan_that_is_shipped_names_settings_that_exist() -> None:
    plan = ablation.load_ablation(ablation.PLAN)
    configs = {
        name: load_config(Path("miniature"), (*plan.common, *variant.set)) for name, variant in plan.variants.items()
    }
    trained = {(configs[name].model_dump_json(), variant.first_phrases) for name, variant in plan.variants.items()}
    assert len(trained) == len(configs)
    assert configs["text, mlp, fidelity"] == load_config(Path("miniature"))
