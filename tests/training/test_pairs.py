"""Preference pairs from Sage folders and from `datasets` folders: what is read, what is refused, what changes a set."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, Features, Image, Value
from pairs import read_metadata, write_metadata, write_sage_split

from comfyui_psa.training.data.pairs import Pair, Pairs, open_pairs
from comfyui_psa.training.errors import DataError

Row = dict[str, Any]
Writer = Callable[[Path, list[Row]], None]


@pytest.fixture(autouse=True)
def _own_cache_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def sage(tmp_path: Path) -> Path:
    return write_sage_split(tmp_path / "sage", rows=5, users=2)


def _table_rows(sage: Path, images: Callable[[Path], Any]) -> list[Row]:
    """The rows of a Sage folder with its images in another form."""
    return [row | {side: images(sage / row[side]) for side in ("chosen", "rejected")} for row in read_metadata(sage)]


def _flat(rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "user_data"} | row["user_data"] for row in rows]


def _as_json(rows: list[Row]) -> list[Row]:
    return [row | {"user_data": json.dumps(row["user_data"])} for row in rows]


def _parquet(folder: Path, rows: list[Row]) -> None:
    """Two shards: of three rows, and of the others."""
    folder.mkdir()
    Dataset.from_list(rows[:3]).to_parquet(folder / "a-0.parquet")
    Dataset.from_list(rows[3:]).to_parquet(folder / "a-1.parquet")


def _saved(folder: Path, rows: list[Row]) -> None:
    Dataset.from_list(rows).save_to_disk(folder, num_shards=2)


def _jsonl(folder: Path, rows: list[Row]) -> None:
    folder.mkdir()
    for shard, part in (("b", rows[3:]), ("a", rows[:3])):
        (folder / f"{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def _contents(pairs: Pairs) -> list[tuple[Any, ...]]:
    """Everything that a pair says, with the images' bytes wherever they lie."""
    return [
        (
            pair.row,
            pair.caption,
            *(image if isinstance(image, bytes) else image.read_bytes() for image in (pair.chosen, pair.rejected)),
            pair.user_id,
            dict(pair.user),
        )
        for pair in pairs
    ]


def test_a_sage_folder_row_by_row(sage: Path) -> None:
    rows = read_metadata(sage)
    pairs = list(open_pairs(sage))
    assert [pair.row for pair in pairs] == [0, 1, 2, 3, 4]
    assert [pair.where for pair in pairs] == [f"row {n} of metadata.jsonl" for n in (1, 2, 3, 4, 5)]
    assert [pair.user_id for pair in pairs] == ["0000001", "0000002", "0000001", "0000002", "0000001"]
    for pair, row in zip(pairs, rows, strict=True):
        assert pair.caption == row["caption"]
        assert (pair.chosen, pair.rejected) == (sage / row["chosen"], sage / row["rejected"])
        assert pair.user == row["user_data"]
        assert pair.category is None


def test_pairs_can_be_read_more_than_once(sage: Path) -> None:
    pairs = open_pairs(sage)
    assert list(pairs) == list(pairs)


@pytest.mark.parametrize("users", [list, _flat, _as_json], ids=["struct", "columns", "json text"])
@pytest.mark.parametrize("images", [lambda path: path.name, Path.read_bytes], ids=["paths", "bytes"])
@pytest.mark.parametrize("write", [_parquet, _saved])
def test_a_datasets_folder_has_the_same_pairs(
    sage: Path,
    write: Writer,
    images: Callable[[Path], Any],
    users: Callable[[list[Row]], list[Row]],
) -> None:
    folder = sage.parent / "table"
    write(folder, users(_table_rows(sage, images)))
    for image in sage.glob("*.png"):
        shutil.copy(image, folder)
    assert _contents(open_pairs(folder)) == _contents(open_pairs(sage))


@pytest.mark.parametrize("write", ["to_parquet", "save_to_disk"])
def test_the_image_feature_is_taken_as_it_is(sage: Path, write: str) -> None:
    # Bytes that no decoder takes: reading a pair must not decode them.
    rows = _table_rows(sage, lambda path: {"bytes": path.name.encode(), "path": None})
    folder = sage.parent / "table"
    folder.mkdir()
    table = Dataset.from_list(rows).cast_column("chosen", Image()).cast_column("rejected", Image())
    getattr(table, write)(folder / "a.parquet" if write == "to_parquet" else folder)
    pairs = list(open_pairs(folder))
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        (row["chosen"]["bytes"], row["rejected"]["bytes"]) for row in rows
    ]


def test_shards_of_jsonl_are_read_in_the_order_of_their_names(sage: Path) -> None:
    folder = sage.parent / "shards"
    _jsonl(folder, read_metadata(sage))
    for image in sage.glob("*.png"):
        shutil.copy(image, folder)
    pairs = open_pairs(folder)
    assert _contents(pairs) == _contents(open_pairs(sage))
    assert [pair.where for pair in pairs][2:4] == ["row 3 of a.jsonl", "row 1 of b.jsonl"]


def test_reading_copies_nothing_into_the_cache_of_the_library(sage: Path) -> None:
    _parquet(sage.parent / "table", _table_rows(sage, Path.read_bytes))
    assert len(list(open_pairs(sage.parent / "table"))) == 5
    assert list((sage.parent / "hf_cache").rglob("*.arrow")) == []


def test_rows_of_tables_are_named_by_their_shard(sage: Path) -> None:
    rows = _table_rows(sage, Path.read_bytes)
    rows[4]["caption"] = ""
    _parquet(sage.parent / "table", rows)
    with pytest.raises(DataError, match=r"^row 2 of a-1\.parquet has no caption"):
        list(open_pairs(sage.parent / "table"))


def _change(**columns: Any) -> Callable[[Row], object]:
    return lambda row: row | columns


def _without(column: str) -> Callable[[Row], object]:
    return lambda row: {name: value for name, value in row.items() if name != column}


BAD_ROWS: dict[str, tuple[Callable[[Row], object], str]] = {
    "no caption": (_without("caption"), "has no caption"),
    "an empty caption": (_change(caption=" \n"), "has no caption"),
    "a caption that is no text": (_change(caption=["a"]), "has no caption"),
    "no chosen image": (_without("chosen"), "no image in the column chosen"),
    "no rejected image": (_without("rejected"), "no image in the column rejected"),
    "an image that is a number": (_change(chosen=3), "no image in the column chosen"),
    "an image without name": (_change(rejected=""), "no image in the column rejected"),
    "an image above the folder": (_change(chosen="../secret.png"), "lies outside"),
    "an image above the folder by a detour": (_change(chosen="a/../../secret.png"), "lies outside"),
    "an image elsewhere": (_change(rejected="/etc/secret.png"), "lies outside"),
    "the folder as an image": (_change(rejected="."), "lies outside"),
    "no user data": (_without("user_data"), "names no user"),
    "user data without id": (_change(user_data={"Age": 4}), "names no user"),
    "user data that is a list": (_change(user_data=[1]), "user_data is no object"),
    "user data that is no JSON": (_change(user_data="{"), "user_data is no object"),
    "a user id that is a path": (_change(user_data={"User_ID": "../7"}), "is no User_ID"),
    "no object": (lambda row: list(row), "is no object"),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_bad_row_is_an_error_that_names_it(sage: Path, bad: str) -> None:
    change, message = BAD_ROWS[bad]
    rows: list[Any] = read_metadata(sage)
    rows[3] = change(rows[3])
    write_metadata(sage, rows)
    with pytest.raises(DataError) as refused:
        list(open_pairs(sage))
    assert str(refused.value).startswith("row 4 of metadata.jsonl")
    assert message in str(refused.value)


@pytest.mark.parametrize("line", [b'{"caption": "a"', b"\xff\xfe", b"[" * 100_000], ids=["cut off", "no text", "deep"])
def test_a_broken_line_is_an_error_and_the_others_stay_readable(sage: Path, line: bytes) -> None:
    path = sage / "metadata.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], b"", line, *lines[3:]]))
    found = list(open_pairs(sage).read())
    assert [pair.row if isinstance(pair, Pair) else str(pair)[:32] for pair in found] == [
        0,
        "row 3 of metadata.jsonl is no JS",
        2,
        3,
    ]
    with pytest.raises(DataError, match=r"row 3 of metadata\.jsonl is no JSON"):
        list(open_pairs(sage))


def test_a_byte_order_mark_is_no_content(sage: Path) -> None:
    before = list(open_pairs(sage))
    path = sage / "metadata.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert list(open_pairs(sage)) == before


@pytest.mark.parametrize("write", [_parquet, _saved])
def test_a_damaged_table_is_an_error_that_names_its_file(sage: Path, write: Writer) -> None:
    folder = sage.parent / "table"
    write(folder, _table_rows(sage, Path.read_bytes))
    file = sorted(path for path in folder.iterdir() if path.suffix in (".parquet", ".arrow"))[1]
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(DataError, match=f"{file.name} cannot be read"):
        list(open_pairs(folder))


def test_a_category_is_kept_and_printing_a_pair_tells_nothing_of_its_user(sage: Path) -> None:
    write_metadata(sage, [row | {"category": "Violence"} for row in read_metadata(sage)])
    pair = next(iter(open_pairs(sage)))
    assert pair.category == "Violence"
    assert "Religion" in pair.user
    assert "Religion" not in repr(pair)


def _nowhere(folder: Path) -> None:
    shutil.rmtree(folder)


def _several_splits(folder: Path) -> None:
    splits = {"train": Dataset.from_list(read_metadata(folder)), "val": Dataset.from_list(read_metadata(folder))}
    shutil.rmtree(folder)
    datasets.DatasetDict(splits).save_to_disk(folder)


def _splits_side_by_side(folder: Path) -> None:
    """As sets lie on the hub: `data/train-00000-of-00002.parquet` beside the files of the other splits."""
    rows = Dataset.from_list(read_metadata(folder))
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test_unseen-00000-of-00001"):
        rows.to_parquet(folder / f"{name}.parquet")
    (folder / "metadata.jsonl").unlink()


def _splits_by_name(folder: Path) -> None:
    (folder / "metadata.jsonl").rename(folder / "train.jsonl")
    shutil.copy(folder / "train.jsonl", folder / "test_seen.jsonl")


def _two_kinds(folder: Path) -> None:
    (folder / "metadata.jsonl").rename(folder / "a.jsonl")
    (folder / "b.parquet").write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_nowhere, "There is no folder"),
        (lambda folder: (folder / "metadata.jsonl").unlink(), "is no set of preference pairs.*found none"),
        (_two_kinds, r"several kinds \(\.jsonl, \.parquet\)"),
        (_several_splits, r"holds several splits.*sage/train.*sage/val"),
        (_splits_by_name, r"holds several splits \(test_seen, train\)"),
        (_splits_side_by_side, r"holds several splits \(test_unseen, train\).*a folder of its own"),
        (lambda folder: (folder / "metadata.jsonl").rename(folder / "state.json"), "damaged"),
    ],
    ids=[
        "no folder",
        "no metadata",
        "two kinds",
        "several splits",
        "splits by name",
        "splits side by side",
        "damaged state",
    ],
)
def test_what_is_no_set_of_pairs_is_refused(sage: Path, change: Callable[[Path], object], message: str) -> None:
    change(sage)
    with pytest.raises(DataError, match=message):
        open_pairs(sage)


def _touch(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


CHANGES: dict[str, Callable[[Path], object]] = {
    "a word": lambda folder: write_metadata(folder, [row | {"caption": "x"} for row in read_metadata(folder)]),
    "the order": lambda folder: write_metadata(folder, read_metadata(folder)[::-1]),
    "a row less": lambda folder: write_metadata(folder, read_metadata(folder)[:-1]),
    "an image's time": lambda folder: _touch(folder / "000003_rejected.png"),
    "an image less": lambda folder: (folder / "000004_chosen.png").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_sage_folder_has_another_fingerprint(sage: Path, change: str) -> None:
    before = open_pairs(sage).fingerprint()
    assert open_pairs(sage).fingerprint() == before
    CHANGES[change](sage)
    assert open_pairs(sage).fingerprint() != before


def test_a_moved_folder_and_a_file_that_is_no_part_of_it_keep_the_fingerprint(sage: Path) -> None:
    before = open_pairs(sage).fingerprint()
    (sage / "notes.txt").write_text("x", encoding="utf-8")
    assert open_pairs(sage.rename(sage.parent / "moved")).fingerprint() == before


@pytest.mark.parametrize("write", [_parquet, _saved])
@pytest.mark.parametrize("images", [lambda path: path.name, lambda path: {"bytes": None, "path": path.name}])
def test_images_beside_a_table_count_for_its_fingerprint(
    sage: Path, write: Writer, images: Callable[[Path], Any]
) -> None:
    folder = sage.parent / "table"
    write(folder, _table_rows(sage, images))
    for image in sage.glob("*.png"):
        shutil.copy(image, folder)
    prints = [open_pairs(folder).fingerprint(), open_pairs(folder).fingerprint()]
    _touch(folder / "000004_rejected.png")
    prints.append(open_pairs(folder).fingerprint())
    _touch(next(path for path in folder.iterdir() if path.suffix in (".parquet", ".arrow")))
    prints.append(open_pairs(folder).fingerprint())
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_a_table_with_other_columns_reads_by_name(sage: Path) -> None:
    folder = sage.parent / "table"
    folder.mkdir()
    features = Features({"caption": Value("string"), "chosen": Value("string")})
    Dataset.from_dict({"caption": ["a"], "chosen": ["b.png"]}, features=features).to_parquet(folder / "a.parquet")
    open_pairs(folder).fingerprint()
    with pytest.raises(DataError, match=r"row 1 of a\.parquet names no user"):
        list(open_pairs(folder))
