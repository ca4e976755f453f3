"""The configuration of an evaluation: what is refused when it is read, each in words that help."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from evaluations import evaluation

from comfyui_psa.training.config import CONFIGS
from comfyui_psa.training.errors import TrainingError
from comfyui_psa.training.evaluation.config import load_evaluation
from comfyui_psa.training.miniature import MINIATURE

LEAST = """
[model]
base = "sd15"
[prompts]
file = "prompts.jsonl"
[users]
levels = ["L0"]
"""
METHOD = '[[methods]]\nname = "base"\nkind = "base"\n'


def problem(tmp_path: Path, text: str, *overrides: str) -> str:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TrainingError) as error:
        load_evaluation(path, overrides)
    return str(error.value)


def method(**values: Any) -> str:
    return "[[methods]]\n" + "".join(f"{name} = {value!r}\n" for name, value in values.items())


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    said = problem(tmp_path, LEAST + METHOD, "sampling.stepz=3", "sampling.steps=0", "run.outptu=x")
    assert "is not an evaluation's configuration" in said
    assert "sampling.stepz: there is no such key. Did you mean sampling.steps?" in said
    assert "sampling.steps: Input should be greater than 0 (found 0)." in said
    assert "run.outptu: there is no such key. Did you mean run.output?" in said


def test_a_wrong_key_of_a_method_names_the_right_one(tmp_path: Path) -> None:
    said = problem(tmp_path, LEAST + METHOD + 'pahts = ["x"]\n')
    assert "methods.pahts: there is no such key. Did you mean methods.paths?" in said


def test_a_wrong_key_of_a_judge_names_those_of_its_kind(tmp_path: Path) -> None:
    said = problem(tmp_path, LEAST + METHOD + '[[assess.judges]]\nkind = "remote"\nurl = "http://x"\nmodell = "m"\n')
    assert "modell: there is no such key. Did you mean assess.judges.remote.model?" in said


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("", "methods: is missing"),
        ("methods = []", "methods: Tuple should have at least 1 item"),
        (METHOD + METHOD, 'two methods are called "base": give each its own name'),
        (
            method(name="SLD", kind="sld") + method(name="SLD max", kind="adapter", paths=["a"]),
            'two methods are called "SLD max"',
        ),
        (method(name="PSA", kind="adapter"), 'the method "PSA" names no file'),
        (method(name="x", kind="magic"), "Input should be 'base', 'adapter'"),
        (method(name="x", kind="base", paths=["a"]), 'the method "x" is of kind base, which has no paths'),
        (method(name="x", kind="sld", strengths=[1.0]), "kind sld, which has no strengths; it takes concept, degrees"),
        (method(name="x", kind="adapter", paths=["a"], everyone="L9"), 'There is no safety level "L9"'),
        (method(name="x", kind="adapter", paths=["a"], strengths=[-1.0]), "greater than or equal to 0"),
    ],
)
def test_methods_that_make_no_sense_are_refused(tmp_path: Path, methods: str, message: str) -> None:
    text = methods + LEAST if methods.startswith("methods") else LEAST + methods
    assert message in problem(tmp_path, text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": {"levels": ("L0", "L7")}}, 'There is no safety level "L7". Choose one of L0, L1'),
        ({"users": {"levels": ("L1 - bans",)}}, 'expected "L1"'),
        ({"users": {"levels": ()}}, r"there are prompts and no users: fill in \[users\]"),
        ({"prompts": {"file": None}}, r"there are users and no prompts: fill in \[prompts\]"),
        ({"prompts": {"file": None}, "users": {"levels": ()}}, "nothing is asked for"),
        ({"sampling": {"width": 100}}, "multiple of 8"),
        ({"engine": {"kind": "comfyui", "address": "localhost:8188"}}, "address"),
        ({"engine": {"kind": "comfyui"}, "embeddings": {"given": Path("x")}}, "cannot be handed to a ComfyUI"),
    ],
)
def test_sections_that_make_no_sense_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluation(tmp_path, tmp_path / "run", **changes)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("assess.base_method=bsae",), 'names the method "bsae", which is not there; the nearest is "base"'),
        (('assess.against=["psa"]',), 'names the method "psa", which is not there; the nearest is "PSA, strength 0.5"'),
        (("assess.base_method=PSA",), '"PSA", which is there at several strengths: name one of them, such as "PSA, s'),
        (('assess.against=["PSA"]',), '"PSA", which is there at several strengths: name one of them'),
        (('assess.against=["base", "PSA, strength 0.5", "SLD max", "gone"]',), 'names the method "gone"'),
    ],
)
def test_a_method_to_compare_with_has_to_be_one(tmp_path: Path, overrides: Sequence[str], message: str) -> None:
    sweep = method(name="PSA", kind="adapter", paths=["a"], strengths=[0.5, 1.0])
    assert message in problem(tmp_path, LEAST + METHOD + sweep + method(name="SLD", kind="sld"), *overrides)


def test_a_strength_of_a_sweep_can_be_what_the_others_are_compared_with(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    sweep = method(name="PSA", kind="adapter", paths=["a"], strengths=[0.5, 1.0])
    path.write_text(LEAST + sweep + method(name="SLD", kind="sld"), encoding="utf-8")
    for name in ("PSA, strength 0.5", "SLD max"):
        assert load_evaluation(path, (f'assess.base_method="{name}"',)).assess.base_method == name


def test_a_document_among_the_evaluations_own_files_is_refused(tmp_path: Path) -> None:
    inside = ("run.output=runs/mine", "assess.document=runs/mine/results.md")
    said = problem(tmp_path, LEAST + METHOD, *inside)
    assert "lies in run.output, among the files of the evaluation itself" in said
    assert "its numbers (results.json) may overwrite: name a file in another folder" in said


def test_several_sets_of_pairs_are_a_list(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('model.base = "sd15"\npairs.miniature = 2\n' + METHOD, encoding="utf-8")
    assert [pairs.miniature for pairs in load_evaluation(path, ("pairs.miniature=3",)).pairs] == [3]
    text = '[[pairs]]\nsage = "a"\nseen = true\n[[pairs]]\nsage = "b"\nsean = false\n'
    said = problem(tmp_path, LEAST + METHOD + text)
    assert "pairs.sean: there is no such key. Did you mean pairs.seen?" in said


def test_what_an_engine_cannot_do_is_refused_at_once(tmp_path: Path) -> None:
    said = problem(tmp_path, LEAST + method(name="SLD", kind="sld"), "engine.kind=comfyui")
    assert 'the method "SLD" is Safe Latent Diffusion, for which ComfyUI has no node' in said


def test_a_missing_file_names_the_ready_ones(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"There is no configuration .*evaluate-miniature"):
        load_evaluation(tmp_path / "nothing.toml")


def test_the_miniature_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_evaluation(Path("evaluate-miniature"))
    assert config.model.base == MINIATURE
    paths = [path for method in config.methods for path in method.paths]
    assert paths
    assert all(path.is_file() for path in paths)


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("evaluate-*.toml"))])
def test_ready_configurations_are_valid(name: str) -> None:
    config = load_evaluation(Path(name))
    kinds = {method.kind for method in config.methods}
    assert {"base", "adapter", "negative_prompt"} <= kinds
    assert {"L1", "L3", "L5"} <= set(config.users.levels)  # those that the paper has numbers of
    # A distance to photographs says something of pictures of their captions alone.
    published = config.assess.published
    assert config.assess.fid.reference is None or (published is not None and published.data_set == "COCO-10k")
