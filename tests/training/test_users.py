"""Users as data sets write them down: ids, profiles, user tables, embedding files, and the encoder for them."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairs import read_metadata, write_metadata, write_sage_split
from torch import Tensor, nn

from comfyui_psa.profiles import (
    CATEGORIES,
    EncoderError,
    Profile,
    SafetyEmbedding,
    banned_categories,
    default_template,
    save_embedding,
    simulate_users,
    user_row,
)
from comfyui_psa.profiles.encoders import AttributesEncoder, llm_identity
from comfyui_psa.training.config import EncoderSection
from comfyui_psa.training.data.pairs import open_pairs
from comfyui_psa.training.data.users import (
    DeviceHost,
    distinct_users,
    encode_users,
    encoder_spec,
    load_user_embedding,
    make_encoder,
    read_profile,
    read_users,
    user_id,
)
from comfyui_psa.training.errors import DataError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (12, "0000012"),
        ("12", "0000012"),
        ("0000012", "0000012"),
        (" 12 ", "0000012"),
        (12.0, "0000012"),
        (0, "0000000"),
        (123456789, "123456789"),
        ("L0", "L0"),
        ("anna-maria_7", "anna-maria_7"),
        ("a@b.org", "a@b.org"),
        ("Zoë", "Zoë"),
    ],
)
def test_user_ids(value: Any, expected: str) -> None:
    assert user_id(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        *("", " ", "../1", "a/b", "a\\b", ".hidden", "..", "a\0b", "a\nb", "C:", "x" * 101, "9" * 5000),
        *(None, True, 1.5, float("nan"), -1, [1], {"a": 1}),
    ],
    ids=str,
)
def test_what_cannot_name_a_file_is_no_user_id(value: Any) -> None:
    with pytest.raises(DataError, match="is no User_ID"):
        user_id(value)


def test_a_row_of_the_release_becomes_the_profile_that_it_was_written_from() -> None:
    for number, user in enumerate(simulate_users(30, seed=3), start=1):
        read = read_profile(user_row(number, user), "row")
        assert read.model_copy(update={"overrides": {}}) == user
        assert banned_categories(read) == banned_categories(user)


def test_the_religion_none_is_a_word_and_an_empty_one_is_unsaid() -> None:
    assert read_profile({"Religion": "None"}, "row").religion == "None"
    assert read_profile({"Religion": None, "Age": 7}, "row").religion is None
    assert read_profile({"Religion": " ", "Age": 7}, "row").religion is None


@pytest.mark.parametrize(("value", "age"), [(35, 35), ("35", 35), (" 35 ", 35), (35.0, 35), ("", None), (0, 0)])
def test_ages_are_numbers_or_text(value: Any, age: int | None) -> None:
    assert read_profile({"Age": value}, "row").age == age


@pytest.mark.parametrize("text", [False, True], ids=["list", "text"])
@pytest.mark.parametrize("banned", [[], ["Hate"], ["Violence", "Hate", "Self-Harm"], list(CATEGORIES)])
def test_banned_categories_decide_against_the_rules(banned: list[str], text: bool) -> None:
    # By the rules this child bans Self-Harm, Sexuality and Violence.
    profile = read_profile({"Age": 9, "Banned_Categories": str(banned) if text else banned}, "row")
    assert set(banned_categories(profile)) == set(banned)


def test_without_banned_categories_the_rules_decide() -> None:
    profile = read_profile({"Age": 9, "Banned_Categories": None}, "row")
    assert set(banned_categories(profile)) == {"Self-Harm", "Sexuality", "Violence"}
    assert profile == Profile(age=9)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"Age": "old"}, "age should be a whole number"),
        ({"Age": 131}, "age should be a whole number"),
        ({"Age": 3.5}, "age should be a whole number"),
        ({"Gender": 3}, "gender should be text"),
        ({"Banned_Categories": "Hate, Violence"}, "Banned_Categories should be a list"),
        ({"Banned_Categories": "['Zorblax']"}, "Banned_Categories should be a list"),
        ({"Banned_Categories": 3}, "Banned_Categories should be a list"),
        ({"Banned_Categories": [["Hate"]]}, "Banned_Categories should be a list"),
        ({}, "says nothing about its user"),
        ({"User_ID": 1, "Age": None}, "says nothing about its user"),
    ],
)
def test_a_profile_that_cannot_be_read_is_an_error_that_names_row_and_column(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as refused:
        read_profile(row, "row 4 of users.csv")
    assert str(refused.value).startswith("row 4 of users.csv")
    assert message in str(refused.value)
    assert "Zorblax" not in str(refused.value)


def _write_users(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    lines = [",".join(f'"{value}"' for value in line) for line in (rows[0], *(row.values() for row in rows))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_user_table_by_id_and_the_release_s_without_ids_by_row(tmp_path: Path) -> None:
    users = simulate_users(3, seed=1)
    rows = [user_row(7 * number, user) for number, user in enumerate(users, start=1)]
    with_ids = read_users(_write_users(tmp_path / "a.csv", rows))
    assert list(with_ids) == ["0000007", "0000014", "0000021"]
    for row in rows:
        del row["User_ID"]
    without_ids = read_users(_write_users(tmp_path / "b.csv", rows))
    assert list(without_ids) == ["0000001", "0000002", "0000003"]
    assert [user.age for user in without_ids.values()] == [user.age for user in users]
    assert list(with_ids.values()) == list(without_ids.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"User_ID,Age\n", "is empty"),
        (b"\xff\xfe\x00", "cannot be read as a user table"),
        (b"User_ID,Age\n1,7\n../2,8\n", "row 2 of users.csv: '../2' is no User_ID"),
        (b"User_ID,Age\n1,7\n2,old\n", "row 2 of users.csv is not a valid profile"),
        (b"User_ID,Age\n1,7\n01,8\n", "row 2 of users.csv: the user 0000001 is somebody else in row 1 of users.csv"),
        (b"User_ID,Years\n1,7\n", "row 1 of users.csv says nothing about its user"),
    ],
)
def test_a_damaged_user_table_is_an_error_that_names_it(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "users.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        read_users(path)
    assert message in str(refused.value)
    assert "users.csv" in str(refused.value)


def test_the_users_of_a_set_are_its_distinct_ones(tmp_path: Path) -> None:
    sage = write_sage_split(tmp_path / "sage", rows=7, users=3)
    users = distinct_users(open_pairs(sage))
    assert list(users) == ["0000001", "0000002", "0000003"]
    assert list(users.values()) == [simulate_users(number, 0)[-1] for number in (1, 2, 3)]


def test_one_id_for_two_users_is_refused(tmp_path: Path) -> None:
    sage = write_sage_split(tmp_path / "sage", rows=3, users=1)
    rows = read_metadata(sage)
    rows[2]["user_data"]["Age"] = 101
    write_metadata(sage, rows)
    with pytest.raises(DataError, match=r"row 3 .* the user 0000001 is somebody else in row 1 "):
        distinct_users(open_pairs(sage))


def test_an_embedding_is_found_by_the_id_of_its_user(tmp_path: Path) -> None:
    np.save(tmp_path / "0000001.npy", np.arange(4, dtype=np.float32))
    np.save(tmp_path / "0000002.npy", np.ones((1, 4), dtype=np.float16))
    save_embedding(SafetyEmbedding(torch.full((1, 4), 3.0)), tmp_path / "anna.safetensors")
    assert load_user_embedding(tmp_path, "0000001").tolist() == [0, 1, 2, 3]
    assert load_user_embedding(tmp_path, "0000002").tolist() == [1, 1, 1, 1]
    assert load_user_embedding(tmp_path, "0000002").dtype == torch.float32
    assert load_user_embedding(tmp_path, "anna").tolist() == [3, 3, 3, 3]


def test_an_embedding_that_cannot_be_used_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    np.save(tmp_path / "0000001.npy", np.ones((2, 4), dtype=np.float32))
    np.save(tmp_path / "0000002.npy", np.full(4, np.nan, dtype=np.float32))
    (tmp_path / "0000003.npy").write_bytes(b"nonsense")
    for user, message in [("0000001", "2 users"), ("0000002", "not numbers"), ("0000003", "not a readable embedding")]:
        with pytest.raises(DataError, match=rf"{user}\.npy.*{message}"):
            load_user_embedding(tmp_path, user)
    with pytest.raises(DataError, match=r"no embedding of the user 0000004: expected .*0000004\.npy"):
        load_user_embedding(tmp_path, "0000004")


def test_the_attributes_encoder_of_a_configuration() -> None:
    section = EncoderSection()
    assert isinstance(make_encoder(section, CPU), AttributesEncoder)
    assert encoder_spec(section).model_dump() == {"kind": "attributes", "name": "attributes-1", "template": None}
    with pytest.raises(DataError, match='no attributes encoder "attributes-9"'):
        make_encoder(EncoderSection(name="attributes-9"), CPU)


def test_the_language_model_of_a_configuration(tmp_path: Path, smollm2_gguf: Path) -> None:
    template = tmp_path / "template.txt"
    template.write_text("Somebody of <<AGE>> years.", encoding="utf-8")
    (tmp_path / "models").mkdir()
    shutil.copy(smollm2_gguf, tmp_path / "models")
    section = EncoderSection(kind="llm", name="a/SmolLM2-135M-Instruct", folders=(tmp_path / "models",))
    spec = encoder_spec(section)
    assert spec.template == default_template()
    assert make_encoder(section, CPU).identity == llm_identity(spec.name, default_template())
    own = section.model_copy(update={"template": template})
    assert encoder_spec(own).template == "Somebody of <<AGE>> years."
    assert make_encoder(own, CPU).identity == llm_identity(spec.name, "Somebody of <<AGE>> years.")
    with pytest.raises(DataError, match=r"nowhere\.txt cannot be read"):
        encoder_spec(section.model_copy(update={"template": tmp_path / "nowhere.txt"}))
    with pytest.raises(EncoderError, match="not on this machine"):
        make_encoder(section.model_copy(update={"folders": (tmp_path,)}), CPU)


def test_a_device_is_given_the_model_for_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 1024**3, 80 * 1024**3))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    host = DeviceHost(torch.device("cuda", 1))
    assert host.dtype == torch.bfloat16
    assert host.make_room(8 * 1024**3) is None
    memory = host.make_room(8 * 1024**3 + 1)
    assert memory is not None
    assert memory[1] == 8 * 1024**3
    assert memory["cpu"] > 0

    model = nn.Linear(2, 2)
    with DeviceHost(CPU).hold(model):
        assert model.weight.device == CPU
    assert model.weight.is_meta


class CountingEncoder(AttributesEncoder):
    """Remembers whom it encoded, and may break off after some batches."""

    def __init__(self, identity: str = "attributes-1", batches: int = 1000) -> None:
        self.identity = identity
        self.seen: list[Profile] = []
        self._batches = batches

    def encode_batches(self, profiles: Sequence[Profile], batch_size: int = 8) -> Iterator[Tensor]:
        for number, batch in enumerate(super().encode_batches(profiles, batch_size)):
            if number == self._batches:
                raise KeyboardInterrupt
            self.seen += profiles[number * batch_size : number * batch_size + len(batch)]
            yield batch


USERS = {user_id(number): user for number, user in enumerate(simulate_users(7, seed=4), start=1)}


def _encode(output: Path, encoder: CountingEncoder, users: dict[str, Profile] = USERS) -> list[int]:
    counts: list[int] = []
    encode_users(users, output, encoder, 3, counts.append)
    return counts


def test_users_are_written_one_private_file_each(tmp_path: Path) -> None:
    counts = _encode(tmp_path / "out", CountingEncoder())
    assert counts == [0, 3, 3, 1]
    expected = AttributesEncoder().encode(list(USERS.values()))
    for user, row in zip(USERS, expected, strict=True):
        path = tmp_path / "out" / f"{user}.npy"
        array = np.load(path)
        assert array.dtype == np.float32
        assert array.tolist() == row.tolist()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"{user}.npy" for user in USERS} | {"encoder.json"}
    assert json.loads((tmp_path / "out" / "encoder.json").read_text())["encoder"] == "attributes-1"


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _encode(tmp_path, CountingEncoder(batches=1))
    second = CountingEncoder()
    assert _encode(tmp_path, second) == [3, 3, 1]
    assert second.seen == list(USERS.values())[3:]
    third = CountingEncoder()
    assert _encode(tmp_path, third) == [7]
    assert third.seen == []


def test_a_damaged_file_is_computed_again(tmp_path: Path) -> None:
    _encode(tmp_path, CountingEncoder())
    (tmp_path / "0000005.npy").write_bytes(b"\x93NUMPY")
    again = CountingEncoder()
    _encode(tmp_path, again)
    assert again.seen == [USERS["0000005"]]
    expected = AttributesEncoder().encode([USERS["0000005"]])[0]
    assert torch.equal(load_user_embedding(tmp_path, "0000005"), expected)


def test_two_encoders_never_share_a_folder(tmp_path: Path) -> None:
    _encode(tmp_path, CountingEncoder())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match=r"another encoder \(attributes-1\) than this one \(other-1\)"):
        _encode(tmp_path, CountingEncoder("other-1"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "encoder.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"another encoder \(unknown\)"):
        _encode(tmp_path, CountingEncoder())
    (tmp_path / "encoder.json").unlink()
    with pytest.raises(DataError, match="unknown encoder"):
        _encode(tmp_path, CountingEncoder())


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"in the way")
    with pytest.raises(DataError, match="out cannot be written"):
        _encode(tmp_path / "out", CountingEncoder())
