"""`psa check-data`: what it reports of a good set, and of sets with one thing wrong each."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import typer
from datasets import Dataset
from pairs import read_metadata, sage_user, write_image, write_metadata, write_sage_split
from PIL import Image
from typer.testing import CliRunner, Result

from comfyui_psa.profiles import CATEGORIES, Profile, banned_categories
from comfyui_psa.training.data.check import Report, check_pairs
from comfyui_psa.training.data_commands import check_data, encode
from comfyui_psa.training.errors import DataError

FINDINGS = (
    "bad_rows",
    "missing_images",
    "broken_images",
    "unusable_users",
    "missing_embeddings",
    "same_images",
    "duplicate_rows",
    "duplicate_files",
)


@pytest.fixture
def sage(tmp_path: Path) -> Path:
    return write_sage_split(tmp_path / "sage", rows=6, users=3)


def _check(folder: Path, embeddings: Path | None = None) -> Report:
    return check_pairs(folder, embeddings, workers=2)


def _found(report: Report) -> dict[str, list[str]]:
    return {name: found for name in FINDINGS if (found := getattr(report, name))}


def _run(*arguments: str | Path) -> Result:
    app = typer.Typer()
    app.command("check-data")(check_data)
    app.command("encode")(encode)
    return CliRunner().invoke(app, ["check-data", *map(str, arguments)])


def _embeddings(folder: Path, *dims: int) -> Path:
    folder.mkdir()
    for number, dim in enumerate(dims, start=1):
        np.save(folder / f"{number:07d}.npy", np.ones(dim, dtype=np.float32))
    return folder


def test_a_good_set(sage: Path) -> None:
    write_image(sage / "000005_rejected.png", (24, 16), np.random.default_rng(1))
    report = _check(sage)
    assert (report.rows, report.users) == (6, 3)
    assert report.sizes == {(40, 32): 11, (24, 16): 1}
    assert _found(report) == {}
    assert report.reasons == ()


def test_categories_are_those_that_the_users_ban(sage: Path) -> None:
    rows = read_metadata(sage)
    bans = {0: ["Hate"], 1: ["Hate", "Violence"], 2: []}
    for number, row in enumerate(rows):
        row["user_data"]["Banned_Categories"] = bans[number % 3]
    write_metadata(sage, rows)
    report = _check(sage)
    assert report.banned_by_users
    assert report.categories == {"Hate": 2, "Violence": 1}


def test_categories_of_users_follow_from_the_rules(sage: Path) -> None:
    users = [sage_user(number) for number in (1, 2, 3)]
    profiles = [
        Profile(
            age=int(user["Age"]),
            gender=user["Gender"],
            religion=user["Religion"],
            physical_condition=user["Physical_Condition"],
            mental_condition=user["Mental_Condition"],
        )
        for user in users
    ]
    banned = [category for profile in profiles for category in banned_categories(profile)]
    assert _check(sage).categories == {c: banned.count(c) for c in CATEGORIES if c in banned}


def test_a_category_column_is_counted_by_rows(sage: Path) -> None:
    rows = read_metadata(sage)
    write_metadata(sage, [row | {"category": "Hate" if n < 4 else "Shocking"} for n, row in enumerate(rows)])
    report = _check(sage)
    assert not report.banned_by_users
    assert report.categories == {"Hate": 4, "Shocking": 2}


def _edit_row(row: int, **columns: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        rows = read_metadata(folder)
        rows[row] |= columns
        write_metadata(folder, rows)

    return edit


def _break_a_line(folder: Path) -> None:
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    lines[2] = lines[2][:-1]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def _bomb(folder: Path) -> None:
    """A small file whose header promises more pixels than Pillow opens."""
    with io.BytesIO() as buffer:
        Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
        (folder / "000001_chosen.png").write_bytes(buffer.getvalue())


FATAL: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a row without caption": (_edit_row(2, caption=None), "bad_rows", "row 3 of metadata.jsonl has no caption"),
    "a broken line": (_break_a_line, "bad_rows", "row 3 of metadata.jsonl is no JSON"),
    "an image outside": (_edit_row(2, chosen="../x.png"), "bad_rows", "lies outside"),
    "a missing image": (lambda folder: (folder / "000001_chosen.png").unlink(), "missing_images", "000001_chosen.png"),
    "a cut off image": (
        lambda folder: os.truncate(folder / "000001_chosen.png", 200),
        "broken_images",
        "000001_chosen.png",
    ),
    "an empty image": (
        lambda folder: (folder / "000001_chosen.png").write_bytes(b""),
        "broken_images",
        "row 2 of metadata.jsonl",
    ),
    "a text as image": (
        lambda folder: (folder / "000001_chosen.png").write_text("x"),
        "broken_images",
        "000001_chosen.png",
    ),
    "a decompression bomb": (_bomb, "broken_images", "000001_chosen.png"),
    "a user without attributes": (
        _edit_row(2, user_data={"User_ID": 9}),
        "unusable_users",
        "row 3 of metadata.jsonl says nothing about its user",
    ),
    "a user of an impossible age": (_edit_row(2, user_data={"User_ID": 9, "Age": -4}), "unusable_users", "age should"),
    "one id for two users": (
        _edit_row(2, user_data={"User_ID": 1, "Age": 101}),
        "unusable_users",
        "the user 0000001 is somebody else in row 1 of metadata.jsonl",
    ),
}


@pytest.mark.parametrize("problem", FATAL)
def test_what_training_would_stop_at_is_found_and_named(sage: Path, problem: str) -> None:
    change, kind, message = FATAL[problem]
    change(sage)
    report = _check(sage)
    assert list(_found(report)) == [kind]
    (finding,) = getattr(report, kind)
    assert message in finding
    assert len(report.reasons) == 1
    assert report.rows == 6
    result = _run(sage)
    assert result.exit_code == 1
    assert finding in result.output
    assert f"It cannot be trained on: {report.reasons[0]}." in result.output


def test_every_problem_is_reported_and_not_only_the_first(sage: Path) -> None:
    for name in ("000000_chosen.png", "000003_rejected.png"):
        (sage / name).unlink()
    (sage / "000004_chosen.png").write_bytes(b"x")
    _edit_row(1, caption="")(sage)
    report = _check(sage)
    assert {kind: len(found) for kind, found in _found(report).items()} == {
        "bad_rows": 1,
        "missing_images": 2,
        "broken_images": 1,
    }
    assert len(report.reasons) == 3


def test_a_set_without_rows_cannot_be_trained_on(sage: Path) -> None:
    write_metadata(sage, [])
    assert _check(sage).reasons == ("there are no rows",)
    assert _run(sage).exit_code == 1


@pytest.mark.parametrize("users", [1, 2])
def test_fewer_users_than_the_defaults_need_are_said_and_no_obstacle(tmp_path: Path, users: int) -> None:
    folder = write_sage_split(tmp_path / "few", rows=6, users=users)
    result = _run(folder)
    assert result.exit_code == 0
    assert f"The defaults need 3 users, and there are {users}: one is kept out" in " ".join(result.output.split())


def test_with_a_folder_of_embeddings_every_user_needs_one_and_no_attributes(sage: Path, tmp_path: Path) -> None:
    rows = read_metadata(sage)
    for row in rows:
        row["user_data"] = {"User_ID": row["user_data"]["User_ID"]}
    write_metadata(sage, rows)
    whole = _embeddings(tmp_path / "whole", 4, 4, 4)
    assert _found(_check(sage, whole)) == {}
    (finding,) = _check(sage, _embeddings(tmp_path / "half", 4, 4)).missing_embeddings
    assert finding.startswith("row 3 of metadata.jsonl")
    assert "0000003.npy" in finding
    assert _run(sage, "--embeddings", whole).exit_code == 0
    assert _run(sage, "--embeddings", tmp_path / "half").exit_code == 1
    assert _run(sage).exit_code == 1


def test_embeddings_of_two_lengths_do_not_fit_together(sage: Path, tmp_path: Path) -> None:
    (finding,) = _check(sage, _embeddings(tmp_path / "e", 4, 5, 5)).missing_embeddings
    assert finding == "The embeddings have different lengths: 4 (0000001), 5 (0000002)."


def _copy_file(folder: Path) -> None:
    shutil.copy(folder / "000001_chosen.png", folder / "000001_rejected.png")


def _encode_again(folder: Path) -> None:
    """The same pixels in a file of other bytes."""
    Image.open(folder / "000001_chosen.png").save(folder / "000001_rejected.png", compress_level=0)


@pytest.mark.parametrize(
    ("change", "copies"),
    [(_copy_file, 1), (_encode_again, 0), (_edit_row(1, rejected="000001_chosen.png"), 0)],
    ids=["equal files", "equal pixels", "one file"],
)
def test_a_pair_of_equal_images_is_found_and_no_obstacle(
    sage: Path, change: Callable[[Path], object], copies: int
) -> None:
    change(sage)
    report = _check(sage)
    assert report.same_images == ["row 2 of metadata.jsonl: the chosen and the rejected image are the same."]
    assert len(report.duplicate_files) == copies
    assert report.reasons == ()
    assert _run(sage).exit_code == 0


def test_a_set_of_nothing_but_equal_images_cannot_be_trained_on(sage: Path) -> None:
    for row in range(6):
        shutil.copy(sage / f"{row:06d}_chosen.png", sage / f"{row:06d}_rejected.png")
    assert len(_check(sage).same_images) == 6
    assert _run(sage).exit_code == 1


def test_images_of_equal_bytes_and_another_shape_are_not_the_same(sage: Path) -> None:
    for name, size in (("chosen", (40, 20)), ("rejected", (20, 40))):
        Image.new("RGB", size, "red").save(sage / f"000001_{name}.png")
    assert _check(sage).same_images == []


def test_repeated_rows_and_copies_of_files_are_found(sage: Path) -> None:
    rows = read_metadata(sage)
    other_user = rows[0] | {"user_data": rows[1]["user_data"]}
    other_caption = rows[0] | {"caption": "another one"}
    swapped = rows[0] | {"chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}
    shutil.copy(sage / rows[2]["chosen"], sage / "copy.png")
    same_content = rows[2] | {"chosen": "copy.png"}
    write_metadata(sage, [*rows, other_user, other_caption, swapped, rows[0], same_content])
    report = _check(sage)
    assert report.duplicate_rows == [
        "row 10 of metadata.jsonl repeats row 1 of metadata.jsonl.",
        "row 11 of metadata.jsonl repeats row 3 of metadata.jsonl.",
    ]
    assert report.duplicate_files == [f"{sage / 'copy.png'} is a copy of {sage / rows[2]['chosen']}."]
    assert report.sizes == {(40, 32): 13}
    assert report.reasons == ()


def test_a_table_with_its_images_inside(sage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    rows = read_metadata(sage)
    for row in rows:
        row |= {side: (sage / row[side]).read_bytes() for side in ("chosen", "rejected")}
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[4]["chosen"] = rows[5]["chosen"] = b"nonsense"
    (tmp_path / "table").mkdir()
    Dataset.from_list([*rows, rows[0]]).to_parquet(tmp_path / "table" / "a.parquet")
    report = _check(tmp_path / "table")
    assert (report.rows, report.users) == (7, 3)
    assert report.sizes == {(40, 32): 9}
    assert report.same_images == ["row 4 of a.parquet: the chosen and the rejected image are the same."]
    assert report.duplicate_rows == ["row 7 of a.parquet repeats row 1 of a.parquet."]
    assert [finding.split(":")[0] for finding in report.broken_images] == ["row 5 of a.parquet", "row 6 of a.parquet"]
    assert report.duplicate_files == []
    assert report.missing_images == []


def test_more_rows_than_are_looked_at_at_once(tmp_path: Path) -> None:
    sage = write_sage_split(tmp_path / "sage", rows=150, users=7, size=(8, 8))
    rows = read_metadata(sage)
    write_metadata(sage, [*rows, rows[0]])
    report = _check(sage)
    assert (report.rows, report.users, report.sizes) == (151, 7, {(8, 8): 300})
    assert len(report.duplicate_rows) == 1


def test_the_command_shows_counts_and_changes_nothing(sage: Path) -> None:
    before = {path: path.read_bytes() for path in sage.iterdir()}
    rows = read_metadata(sage)
    result = _run(sage)
    assert result.exit_code == 0
    cells = [line.strip("│").split("│") for line in result.output.splitlines() if line.startswith("│")]
    counts = {what.strip(): int(count) for what, count in cells}
    assert counts.items() >= {"rows": 6, "users": 3, "images of 40 x 32 pixels": 12, "missing images": 0}.items()
    assert "It can be trained on." in result.output
    assert json.dumps(rows) == json.dumps(read_metadata(sage))
    assert {path: path.read_bytes() for path in sage.iterdir()} == before


@pytest.mark.parametrize(
    ("categories", "bans", "said"),
    [
        ((None,) * 6, "[]", "Not with loss.fidelity: no row has a column category that names one of the seven"),
        (("Hate", "harmless", "violence") * 2, "['Hate']", "With loss.fidelity, too."),
        (
            ("Hate", "Other", None) * 2,
            "[]",
            "rows of unknown category, which stay preferences: 4",
        ),
        (("Hate",) * 6, None, "missing or no list of categories: 3 (row 1 of metadata.jsonl)."),
        (("Hate",) * 6, "['Fear']", "missing or no list of categories: 3 (row 1 of metadata.jsonl)."),
        (("Hate", "harmless") * 3, "[]", "Not with loss.fidelity: every pair shows what its user allows"),
    ],
)
def test_it_says_whether_fidelity_has_what_it_needs(
    sage: Path, tmp_path: Path, categories: tuple[str | None, ...], bans: str | None, said: str
) -> None:
    rows = read_metadata(sage)
    for row, category in zip(rows, categories, strict=True):
        row["category"] = category
        row["user_data"].pop("Banned_Categories", None)
        row["user_data"] |= {} if bans is None else {"Banned_Categories": bans}
    write_metadata(sage, rows)
    result = _run(sage, "--embeddings", _embeddings(tmp_path / "embeddings", 4, 4, 4))
    assert result.exit_code == 0
    assert said in result.output


def test_a_row_in_which_a_user_stops_saying_their_bans_is_found_for_fidelity(sage: Path, tmp_path: Path) -> None:
    rows = read_metadata(sage)
    for row in rows:
        row |= {
            "category": "Hate",
            "user_data": {"User_ID": row["user_data"]["User_ID"], "Banned_Categories": "['Hate']"},
        }
    del rows[4]["user_data"]["Banned_Categories"]
    write_metadata(sage, rows)
    said = _run(sage, "--embeddings", _embeddings(tmp_path / "embeddings", 4, 4, 4)).output
    assert "missing or no list of categories: 1 (row 5 of metadata.jsonl)." in said


def test_a_long_list_of_findings_ends_with_their_number(tmp_path: Path) -> None:
    sage = write_sage_split(tmp_path / "sage", rows=14, users=3, size=(8, 8))
    for row in range(14):
        (sage / f"{row:06d}_chosen.png").unlink()
    result = _run(sage)
    assert "and 4 more" in result.output
    assert "It cannot be trained on: missing images (14)." in result.output


def test_what_is_no_set_of_pairs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no folder"):
        _check(tmp_path / "nowhere")
