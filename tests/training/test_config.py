"""The configuration: TOML, `--set`, and messages that name what is wrong and what was meant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from comfyui_psa.training.config import CONFIGS, TrainConfig, load_config
from comfyui_psa.training.errors import TrainingError

TRAININGS = [path.stem for path in sorted(CONFIGS.glob("*.toml")) if not path.stem.startswith("evaluate-")]
MINIMAL = '[model]\nbase = "models/base"\n[data]\ntrain = "pairs"\n'

# method.md, section 4.
PUBLISHED: Mapping[str, object] = {
    "model.dtype": "bf16",
    "loss.beta": 5000.0,
    "loss.prompt_dropout": 0.2,
    "loss.user_dropout": 0.0,
    "loss.noise_offset": 0.0,
    "optimizer.learning_rate": 5e-6,
    "optimizer.max_grad_norm": 1.0,
    "optimizer.schedule": "constant_with_warmup",
    "optimizer.warmup_steps": 500,
    "optimizer.ema_decay": 0.0,
    "adapter.null": "zero_embedding",
    "adapter.standardise": False,
    "data.encoder.kind": "llm",
    "data.encoder.name": "Qwen/Qwen2.5-7B-Instruct",
    "run.steps": 5000,
    "run.seed": 2025,
    "validation.grid_guidance_scale": 7.5,
    "validation.grid_users": ("0001001", "0000797", "0000697", "0000002", "0000742", "0000501"),
}
PUBLISHED_SD15 = {
    "data.resolution": 512,
    "model.gradient_checkpointing": False,
    "optimizer.kind": "adamw",
    "optimizer.betas": (0.9, 0.999),
    "optimizer.weight_decay": 1e-2,
    "run.batch_size": 6,
    "run.accumulation": 8,
}
PUBLISHED_SDXL = {
    "data.resolution": 1024,
    "model.gradient_checkpointing": True,
    "optimizer.kind": "adafactor",
    "run.batch_size": 2,
    "run.accumulation": 16,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def _value(config: TrainConfig, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


def _set(file: Path, *overrides: str) -> TrainConfig:
    return load_config(file, overrides)


def _problems(file: Path, *overrides: str) -> list[str]:
    """The problems that the message lists, one a line."""
    with pytest.raises(TrainingError) as caught:
        load_config(file, overrides)
    first, *problems = str(caught.value).splitlines()
    assert first == f"{file} is not a training configuration:"
    return [problem.strip() for problem in problems]


def _refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(TrainingError) as caught:
        load_config(file, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_file_is_read_with_nested_sections_and_the_rest_by_default(file: Path) -> None:
    section = 'kind = "llm"\nname = "Qwen/Qwen2.5-7B-Instruct"\nfolders = ["ä", "b"]\n'
    text = f"{MINIMAL}resolution = 768\n[data.encoder]\n{section}"
    file.write_text(text + "[run]\nsteps = 7\ncheckpoints_total_limit = 1\n", encoding="utf-8")
    config = load_config(file)
    assert (config.model.base, config.data.train) == (Path("models/base"), Path("pairs"))
    assert (config.data.resolution, config.run.steps, config.run.checkpoints_total_limit) == (768, 7, 1)
    encoder = config.data.encoder
    assert (encoder.name, encoder.folders) == ("Qwen/Qwen2.5-7B-Instruct", (Path("ä"), Path("b")))
    assert (config.loss.beta, config.data.embeddings, config.run.resume) == (5000, None, None)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("run.step", "run.steps"),
        ("run.batchsize", "run.batch_size"),
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("data.encoder.batchsize", "data.encoder.batch_size"),
        ("data.encoder.folder", "data.encoder.folders"),
        ("optimiser.kind", "optimizer"),  # a whole section
    ],
)
def test_an_unknown_key_names_the_nearest_one(file: Path, key: str, meant: str) -> None:
    found = key.split(".")[0] if meant == "optimizer" else key
    assert _problems(file, f"{key}=3") == [f"{found}: there is no such key. Did you mean {meant}?"]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("run.learning_rate", "optimizer.learning_rate"),
        ("model.resolution", "data.resolution"),
        ("model.folders", "data.encoder.folders"),
        ("data.encoder.beta", "loss.beta"),
        ("accumulation", "run.accumulation"),
    ],
)
def test_a_key_in_the_wrong_section_names_its_own(file: Path, key: str, meant: str) -> None:
    assert _problems(file, f"{key}=3") == [f"{key}: there is no such key. Did you mean {meant}?"]


def test_a_key_that_resembles_none_lists_those_that_there_are(file: Path) -> None:
    assert _problems(file, "tracking.zzz=3") == [
        "tracking.zzz: there is no such key. Known here: trackers, project, every."
    ]


@pytest.mark.parametrize(
    ("key", "found", "expected"),
    [
        ("run.steps", 0, "greater than 0"),
        ("run.steps", "many", "valid integer"),
        ("run.batch_size", 1.5, "valid integer"),
        ("loss.prompt_dropout", 1.5, "less than or equal to 1"),
        ("optimizer.ema_decay", 1, "less than 1"),
        ("optimizer.learning_rate", -1e-6, "greater than 0"),
        ("data.resolution", 100, "multiple of 8"),
        ("model.dtype", "fp8", "'fp32', 'bf16' or 'fp16'"),
        ("optimizer.kind", "sgd", "'adamw', 'adafactor' or 'adamw8bit'"),
        ("data.encoder.batch_size", 0, "greater than 0"),
        ("adapter.name", "../other", "pattern"),
    ],
)
def test_a_wrong_value_names_its_key_and_what_was_found(file: Path, key: str, found: object, expected: str) -> None:
    (problem,) = _problems(file, f"{key}={found}")
    assert f"(found {found!r})." in problem


def test_every_problem_is_listed(file: Path) -> None:
    file.write_text('[model]\ndtype = "fp8"\n[data]\ntrian = "x"\n[run]\nsteps = -1\n', encoding="utf-8")
    problems = _problems(file, "loss.betas=1")
    assert sorted(problem.split(":")[0] for problem in problems) == [
        "data.train",
        "data.trian",
        "loss.betas",
        "model.base",
        "model.dtype",
        "run.steps",
    ]
    assert "data.train: is missing; it has to be stated." in problems
    assert "data.trian: there is no such key. Did you mean data.train?" in problems


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.steps=12", 12),
        ("optimizer.learning_rate=1e-4", 1e-4),
        ("run.resume=latest", "latest"),
        ("run.resume = 'latest' ", "latest"),
        ('run.resume="a = b"', "a = b"),
        ("run.resume=runs/a=b/step-000002", "runs/a=b/step-000002"),
        ("model.base=models/my model v1.5.safetensors", Path("models/my model v1.5.safetensors")),
        ("tracking.trackers=[]", ()),
        ('tracking.trackers=["wandb", "tensorboard"]', ("wandb", "tensorboard")),
        ("optimizer.betas=[0.8, 0.95]", (0.8, 0.95)),
        ("data.flip=false", False),
        ("model.compile=true", True),
        ("data.encoder.batch_size=2", 2),
        ("validation.seen=val", Path("val")),
    ],
)
def test_set_changes_a_setting_and_makes_its_section(file: Path, override: str, expected: object) -> None:
    config = _set(file, override)
    assert _value(config, override.partition("=")[0].strip()) == expected


def test_set_wins_over_the_file_and_the_last_one_over_the_first(file: Path) -> None:
    file.write_text(MINIMAL + "[run]\nsteps = 5\nseed = 1\n", encoding="utf-8")
    run = _set(file, "run.steps=6", "run.steps=7").run
    assert (run.steps, run.seed) == (7, 1)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.steps", "expected section.key=value"),
        ("=5", "expected section.key=value"),
        ("model.base.name=x", "base is a value and no section"),
        ("run.steps=5 = 6", "run.steps"),
    ],
)
def test_a_wrong_set_is_named(file: Path, override: str, expected: str) -> None:
    with pytest.raises(TrainingError, match=expected) as caught:
        _set(file, override)
    assert override.partition("=")[2] in str(caught.value)


def test_the_null_user_cannot_be_trained_where_there_is_none(file: Path) -> None:
    (problem,) = _problems(file, "adapter.null=none")
    assert "loss.user_dropout = 0" in problem
    assert 'adapter.null = "zero_embedding"' in problem
    assert _set(file, "adapter.null=none", "loss.user_dropout=0").adapter.null == "none"


def test_the_base_model_knows_the_width_of_its_pooled_text(file: Path) -> None:
    (problem,) = _problems(file, "adapter.text.pooled_dim=1280")
    assert "adapter.text" in problem
    assert "leave it out" in problem


def test_the_text_side_has_the_form_that_did_best_unless_another_is_named(file: Path) -> None:
    assert load_config(file).adapter.text.form == "mlp"
    assert _set(file, "adapter.text.token_dim=8").adapter.text.form == "mlp"
    assert _set(file, 'adapter.text.form="attention"', "adapter.text.num_tokens=4").adapter.text.num_tokens == 4
    for setting in ("num_tokens=4", "heads=8"):
        (problem,) = _problems(file, f"adapter.text.{setting}")
        assert 'the form "mlp"' in problem
        assert 'name the form "attention"' in problem


def test_a_language_model_needs_its_name(file: Path) -> None:
    (problem,) = _problems(file, "data.encoder.kind=llm")
    assert problem.startswith("data.encoder: ")
    assert "needs the name of its language model" in problem


@pytest.mark.parametrize(("name", "own"), [("psa-sd15", PUBLISHED_SD15), ("psa-sdxl", PUBLISHED_SDXL)])
def test_ready_configurations_have_the_published_settings(name: str, own: Mapping[str, object]) -> None:
    config = load_config(CONFIGS / f"{name}.toml")
    expected = {**PUBLISHED, **own}
    assert {key: _value(config, key) for key in expected} == expected


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
@pytest.mark.parametrize("kind", ["text", "combined"])
def test_recommended_configurations_have_the_papers_data_and_the_miniatures_loss(base: str, kind: str) -> None:
    paper, miniature = load_config(CONFIGS / f"psa-{base}.toml"), load_config(CONFIGS / "miniature.toml")
    config = load_config(CONFIGS / f"psa-{base}-{kind}.toml")
    assert (config.model, config.data) == (paper.model, paper.data)
    assert (config.run.steps, config.run.batch_size) == (paper.run.steps, paper.run.batch_size)
    departures = ("beta", "winner_anchor", "final_beta", "final_winner_anchor", "switch_at", "min_timestep")
    for name in (*departures, "timestep_weight_limit"):
        assert getattr(config.loss, name) == getattr(miniature.loss, name), name
    assert (config.adapter.text.form, config.adapter.null) == ("mlp", "none")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["optimizer.kind=adafactor", "optimizer.betas=[0.5, 0.9]"], "betas"),
        (["optimizer.kind=adafactor", "optimizer.epsilon=1e-3"], "epsilon"),
        (["optimizer.cycles=3"], "cycles"),
        (["optimizer.schedule=cosine", "optimizer.power=2"], "power"),
    ],
)
def test_a_setting_that_would_not_count_is_refused(file: Path, overrides: list[str], name: str) -> None:
    (problem,) = _problems(file, *overrides)
    assert problem.startswith("optimizer: ")
    assert f"{name} does not count with " in problem


@pytest.mark.parametrize("name", TRAININGS)
def test_a_ready_configuration_is_found_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = load_config(CONFIGS / f"{name}.toml")
    assert load_config(Path(name)) == load_config(Path(f"{name}.toml")) == expected
    changed = load_config(Path(name), ["run.steps=3"])
    assert changed.run.model_copy(update={"steps": expected.run.steps}) == expected.run
    (tmp_path / f"{name}.toml").write_text(MINIMAL, encoding="utf-8")
    assert load_config(Path(f"{name}.toml")).data.train == Path("pairs")  # a file of one's own wins


def test_a_missing_file_is_named_together_with_the_ready_ones(tmp_path: Path) -> None:
    message = _refusal(tmp_path / "psa-sd15.toml")  # not by its path
    assert str(tmp_path / "psa-sd15.toml") in message
    assert "one of miniature, psa-sd15, psa-sd15-combined, psa-sd15-text, psa-sdxl, psa-sdxl-combined, " in message


@pytest.mark.parametrize("content", [b"[model\n", b"\xff\xfe", b"steps = 1\nsteps = 2\n"])
def test_what_is_no_toml_is_said_so(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert f"{file} cannot be read as TOML" in _refusal(file)


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    assert f"{tmp_path} cannot be read as TOML" in _refusal(tmp_path)
