"""The report: its page, its Markdown and its numbers, and what it says when something is missing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from evaluation_testing import BARE, PROGRAMMATIC, assessed, cell, draw_picture, row, small_evaluation, write_evaluation
from pydantic import ValidationError
from rich.progress import Progress

from comfyui_psa.training.errors import DataError, TrainingError
from comfyui_psa.training.evaluation.assess import assess
from comfyui_psa.training.evaluation.assess_config import AssessSettings
from comfyui_psa.training.evaluation.manifest import write_manifest


class Page(HTMLParser):
    """Collects what a page refers to, its headings and its cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.headings: list[str] = []
        self.cells: list[str] = []
        self.ids: set[str] = set()
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        for name, value in attrs:
            if name in ("src", "href", "data", "action", "srcset", "poster"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.add(value or "")

    def handle_data(self, data: str) -> None:
        if self._tag == "h2" and data.strip():
            self.headings.append(data.strip())
        if self._tag in ("td", "th") and data.strip():
            self.cells.append(data.strip())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that was assessed by the detector."""
    folder = small_evaluation(tmp_path_factory.mktemp("run"), methods=("base", "PSA", "<b>static</b> | x"))
    assessed(
        folder,
        judges=[PROGRAMMATIC],
        pairs=20,
        title="PSA & others",
        facts={"Seeds": "0 <1>"},
        published={"data_set": "I2P", "base": "SD1.5"},
        document=folder / "docs" / "read.md",
    )
    return folder


def test_the_page_asks_nobody_for_anything(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= page.ids
    assert "@import" not in text
    assert "url(" not in text
    assert "<script" not in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_the_page_has_all_chapters_and_shows_names_as_they_are(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.headings == [
        "At a glance",
        "Personal compliance",
        "Which picture is better",
        "Safety against quality",
        "Levels",
        "Over-blocking",
        "Beside the paper",
        "Pictures",
        "What was left out",
        "Judges",
        "Settings",
        "All numbers",
    ]
    assert "<b>" not in text
    assert "<b>static</b> | x" in page.cells
    assert "PSA &amp; others" in text
    assert "0 <1>" in page.cells
    assert "In every case all methods had the same prompt, seed" in text


def test_the_markdown_names_its_figures(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    figures = re.findall(r"!\[.+\]\((.+)\)", text)
    assert len(figures) >= 6
    for name in figures:
        with PIL.Image.open(folder / name) as image:
            assert min(image.size) > 100
    # A method's name does not break a table.
    for line in text.splitlines():
        if line.startswith("| <b>static</b>"):
            assert "<b>static</b> \\| x" in line
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") - line.count("\\|") for line in rows} <= set(range(3, 12))


def test_a_document_is_the_report_without_the_chapter_of_all_numbers(folder: Path) -> None:
    whole, read = ((folder / name).read_text(encoding="utf-8") for name in ("report.md", "docs/read.md"))
    before, rest = whole.split("## All numbers")
    assert rest.count("\n|") > 10
    assert read.strip() == before.replace("](figures/", "](images/read/").strip()
    for name in re.findall(r"!\[.+\]\((.+)\)", read):
        with PIL.Image.open(folder / "docs" / name) as image:
            assert image.mode == "P"


def test_the_numbers_of_a_document_stand_beside_it(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = json.loads((folder / "docs" / "read.json").read_text(encoding="utf-8"))
    assert {one["people"] for one in rows} == {"everyone", "L0", "L1", "L5"}
    names = {"passes (detector)", "inappropriate (detector)", "expected objects there", "SSIM to the base"}
    assert {one["measure"] for one in rows} == names
    for one in rows:
        where = {name: one[name] for name in ("people", "seen", "asked")}
        whole = cell(results, one["measure"], one["method"], **where)
        assert (one["value"], one["low"], one["high"]) == pytest.approx(
            (whole["value"], whole["low"], whole["high"]), abs=1e-4
        )
        assert (one["pictures"], one["runs"]) == (whole["pictures"], whole["runs"])


def test_the_page_and_the_numbers_agree(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    found = cell(results, "passes (detector)", "PSA")
    text = (folder / "report.md").read_text(encoding="utf-8")
    words = f"{100 * found['value']:.1f} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"
    assert f"| PSA | {words}" in text or f" | {words} |" in text
    assert results["settings"]["judges"][0]["kind"] == "programmatic"
    assert {one["measure"] for one in results["measures"]} == {one["measure"] for one in results["cells"]}


def test_trainings_with_other_seeds_are_told_apart_in_the_document(tmp_path: Path) -> None:
    rows = []
    for method, runs in (("base", 1), ("PSA", 3)):
        for run in range(runs):
            for number in range(4):
                image = f"{method}-{run}-{number}.png"
                draw_picture(tmp_path / image, ("Hate",) if method == "base" or number < run else (), seed=number)
                rows.append(row(image, method, run=run, category="Hate", banned=("Hate",), prompt_id=str(number)))
    document = tmp_path / "docs" / "read.md"
    assessed(write_evaluation(tmp_path, rows), judges=[PROGRAMMATIC], document=document)
    chapter = document.read_text(encoding="utf-8").split("## Trainings with other seeds")[1].split("##")[0]
    (line,) = [line for line in chapter.splitlines() if line.startswith("| PSA | unseen people |")]
    assert "| 25.0 (50.0 to 100.0) |" in line  # passes, and below: nothing is left, a quarter, a half
    assert "| 25.0 (0.0 to 50.0) |" in line
    assert "base" not in chapter


def test_headings_say_over_which_prompts_a_measure_is(folder: Path) -> None:
    glance = (folder / "report.md").read_text(encoding="utf-8").split("## Personal compliance")[0]
    assert "inappropriate (detector), sensitive prompts, lower is better" in glance
    assert "expected objects there, all prompts, higher is better" in glance
    assert "SSIM to the base, prompts that the person does not ban, higher is better" in glance
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    found = cell(results, "inappropriate (detector)", "base", asked="sensitive")
    assert (found["value"], found["pictures"]) == (1, 12)
    assert re.search(rf"\| base \|.*\| 100\.0 \({100 * found['low']:.1f} to 100\.0\) \|", glance)


def test_levels_are_shown_of_methods_that_know_them(tmp_path: Path) -> None:
    blind = [f"blind {number}" for number in range(6)]  # as many as there are grids of levels
    rows = []
    for level in ("L0", "L5"):
        for method in ("base", *blind, "PSA"):
            image = f"{level}.png" if method == "PSA" else f"{method}.png"
            draw_picture(tmp_path / image)
            rows.append(row(image, method, user=level, level=level, seen=None, prompt_id="p"))
    assessed(write_evaluation(tmp_path, rows))
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "PSA: the same prompts and noise for all levels" in report
    assert "blind 0: the same prompts" not in report


def test_levels_beside_seen_and_unseen_people_are_named(tmp_path: Path) -> None:
    rows = []
    for seen in (True, False, None):
        draw_picture(tmp_path / f"{seen}.png", ("Hate",))
        level = "L0" if seen is None else None
        person = {"user": level or f"{seen}", "level": level, "seen": seen}
        rows.append(row(f"{seen}.png", category="Hate", **person))
    assessed(write_evaluation(tmp_path, rows), judges=[PROGRAMMATIC])
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    (header, *_) = [line for line in report.split("## Over-blocking")[1].splitlines() if line.startswith("| method |")]
    columns = [column.strip() for column in header.split("|")]
    assert {"everyone, seen", "everyone, unseen", "everyone, levels"} <= set(columns)
    assert "everyone" not in columns
    settings = report.split("## Settings")[1].split("##")[0]
    assert settings.count("| base |") == settings.count("| base model | drawings 0123 |") == 1


def test_unequal_settings_are_said(tmp_path: Path) -> None:
    rows = []
    for method, steps in (("base", 10), ("other", 20)):
        draw_picture(tmp_path / f"{method}.png")
        rows.append(row(f"{method}.png", method, steps=steps))
    assessed(write_evaluation(tmp_path, rows))
    assert "Not equal: " in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("broken", ["comfyui_psa.training.evaluation.report.make_chapters", "PIL.Image.Image.quantize"])
def test_an_interrupted_report_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    folder = small_evaluation(tmp_path / "run", prompts=1)
    document = tmp_path / "docs" / "read.md"
    settings = {"judges": [PROGRAMMATIC], "pairs": 10, "document": document}
    assessed(folder, **settings)
    pictures = [*tmp_path.rglob("figures/*.png"), *tmp_path.rglob("images/read/*.png")]
    written = [document, *folder.glob("report.*"), *pictures]
    before = {path: path.read_bytes() for path in written}
    assert len(before) > 8

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(broken, interrupted)
        with pytest.raises(KeyboardInterrupt):
            assessed(folder, **settings, title="Another")
    assert {path: path.read_bytes() for path in written} == before
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]
    for stale in (folder / "figures" / "gone.png", document.parent / "images" / "read" / "gone.png"):
        stale.write_bytes(b"")
    assessed(folder, **settings)
    assert all(path.is_file() for path in written)
    assert not list(tmp_path.rglob("gone.png"))


def test_unreadable_pictures_are_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    folder = small_evaluation(tmp_path, prompts=2)
    names = [f"pictures/PSA-{level}-0.png" for level in ("L0", "L1", "L5")]
    (folder / names[0]).write_bytes(b"no picture")
    (folder / names[1]).unlink()
    whole = (folder / names[2]).read_bytes()
    (folder / names[2]).write_bytes(whole[: len(whole) // 2])
    results = assessed(folder, judges=[PROGRAMMATIC], pairs=20)
    assert set(results["unreadable"]) == set(names)
    assert results["unreadable"][names[1]] == "it is not there"
    assert results["pictures"] == 3 * 12 - 3
    assert cell(results, "passes (detector)", "PSA")["pictures"] == 9
    (lacking,) = [one["reason"] for one in results["left_out"] if one["name"] == "pictures of some methods"]
    assert "PSA: 9 of 12" in lacking
    for report in ("report.html", "report.md"):
        text = (folder / report).read_text(encoding="utf-8")
        assert "3 pictures could not be read" in text
        assert names[1] in text


def test_an_empty_manifest_and_one_without_pictures_are_errors(tmp_path: Path) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(DataError) as error:
            assess(folder, AssessSettings.model_validate(BARE), Progress(disable=True))
        assert not (folder / "report.html").exists()
        return str(error.value)

    assert "has no manifest.parquet" in refused(tmp_path)
    write_manifest(tmp_path, [])
    assert "names no picture" in refused(tmp_path)
    write_evaluation(tmp_path, [row("a.png"), row("b.png", prompt_id="q")])
    message = refused(tmp_path)
    assert "None of the 2 pictures" in message
    assert "a.png: it is not there" in message
    draw_picture(tmp_path / "a.png")
    (tmp_path / "users.jsonl").write_text('{"user": "u", "text": "x"}\n{"user"', encoding="utf-8")
    assert "users.jsonl, line 2" in refused(tmp_path)


def test_without_the_base_there_is_still_a_report(tmp_path: Path) -> None:
    folder = small_evaluation(tmp_path, prompts=1, methods=("PSA", "static"))
    results = assessed(folder, judges=[PROGRAMMATIC], pairs=10)
    assert results["judges"][0]["compared"] == []
    reasons = {one["name"]: one["reason"] for one in results["left_out"]}
    assert "assess.base_method" in reasons["everything that is compared with the base"]
    assert "compared with the base" not in str(assessed(folder, base_method="PSA")["left_out"])
    results = assessed(folder, judges=[PROGRAMMATIC], pairs=10, against=["static"])
    (compared,) = results["judges"][0]["compared"]
    assert (compared["method"], compared["against"]) == ("PSA", "static")


def test_a_strength_can_be_what_the_others_are_compared_with(tmp_path: Path) -> None:
    rows = []
    for method, strength in (("base", 1.0), ("PSA", 0.5), ("PSA", 1.0)):
        for number in range(3):
            image = f"{method}-{strength}-{number}.png"
            draw_picture(tmp_path / image, seed=number + int(10 * strength))
            adapter = "PSA 1" if method == "PSA" else None
            about = {"strength": strength, "adapter": adapter, "seen": None, "banned": ("Hate",)}
            category = "Hate" if number == 2 else "harmless"
            rows.append(row(image, method, category=category, prompt_id=str(number), **about))
    folder = write_evaluation(tmp_path, rows)
    base = "PSA, strength 0.5"
    results = assessed(folder, judges=[PROGRAMMATIC], pairs=10, base_method=base)
    assert list(results["methods"]) == [base, "base", "PSA, strength 1"]
    (judge,) = results["judges"]
    assert {(one["method"], one["against"]) for one in judge["compared"]} == {("base", base), ("PSA, strength 1", base)}
    likeness = {one["method"]: one["value"] for one in results["cells"] if one["measure"] == "SSIM to the base"}
    assert likeness.keys() == {"base", "PSA, strength 1"}
    # Strength 0 would be the model alone, and the base here is an adapter.
    points = [[point["name"] for point in curve["points"]] for curve in results["calibration"]]
    assert ["0.5", "1"] in points
    assert all("0 (base)" not in names for names in points)
    curves = assessed(folder, judges=[PROGRAMMATIC], base_method="base")["calibration"]
    assert any("0 (base)" in [point["name"] for point in curve["points"]] for curve in curves)
    with pytest.raises(TrainingError, match=r'"PSA", which is there at several strengths: name one of them'):
        assessed(folder, base_method="PSA")


def test_answers_that_cannot_be_written_are_an_error_in_words(tmp_path: Path) -> None:
    folder = small_evaluation(tmp_path, prompts=1, methods=("base",))
    (folder / "answers.jsonl").mkdir()
    with pytest.raises(
        TrainingError, match=r"answers\.jsonl cannot be written \(Is a directory\)\. .*make it writable"
    ):
        assessed(folder, judges=[PROGRAMMATIC])


def test_without_a_judge_the_report_says_what_it_lacks(tmp_path: Path) -> None:
    folder = small_evaluation(tmp_path, prompts=1)
    (reason,) = [one["reason"] for one in assessed(folder)["left_out"] if "pass and win rates" in one["name"]]
    assert "[[assess.judges]]" in reason
    assert "pass and win rates" not in str(assessed(folder, judges=[PROGRAMMATIC], pairs=10)["left_out"])


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="two judges have the same name"):
        AssessSettings.model_validate({"judges": [PROGRAMMATIC, PROGRAMMATIC]})
    with pytest.raises(ValidationError, match="extra"):
        AssessSettings.model_validate({"fids": {}})
    folder = small_evaluation(tmp_path, prompts=1, methods=("base",))
    with pytest.raises(TrainingError, match=r'assess\.base_method names the method "bse".*the nearest is "base"'):
        assessed(folder, base_method="bse")
    with pytest.raises(TrainingError, match=r'assess\.against names the method "Base".*the nearest is "base"'):
        assessed(folder, against=["Base"])
    with pytest.raises(TrainingError, match='device = "abacus"'):
        assessed(folder, device="abacus")
