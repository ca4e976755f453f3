"""The private store on a disk that refuses: what was there stays, and the message says what could not be done."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from comfyui_psa.profiles import Profile, ProfileStore, StoreError, profiles_folder
from comfyui_psa.safe_files import replacing

PROFILE = Profile(name="evening", age=87, overrides={"Propaganda": "ban", "Hate": "allow"})


def test_a_folder_without_write_permission_is_reported_and_left_alone(
    open_folder: Path, without_root: Callable[[], AbstractContextManager[None]]
) -> None:
    with without_root():
        store = ProfileStore(profiles_folder(open_folder / "user"))
        stored, active = store.create(PROFILE), store.create(PROFILE)
        store.activate(active.id)
        before = {path.name: path.read_bytes() for path in store.root.iterdir()}
        store.root.chmod(0o500)
        for change in (
            lambda: store.create(PROFILE),
            lambda: store.save(stored, Profile()),
            lambda: store.delete(stored.id),
            lambda: store.delete(active.id),
            lambda: store.activate(stored.id),
        ):
            with pytest.raises(StoreError, match="cannot be written"):
                change()
        assert {path.name: path.read_bytes() for path in store.root.iterdir()} == before


def test_a_place_where_no_folder_can_be_made_is_reported(
    open_folder: Path, without_root: Callable[[], AbstractContextManager[None]]
) -> None:
    with without_root():
        open_folder.chmod(0o500)
        with pytest.raises(StoreError, match="cannot be written"):
            ProfileStore(profiles_folder(open_folder / "user")).create(PROFILE)
        assert list(open_folder.iterdir()) == []


def test_files_without_read_permission_are_reported(
    open_folder: Path, without_root: Callable[[], AbstractContextManager[None]]
) -> None:
    with without_root():
        store = ProfileStore(profiles_folder(open_folder))
        stored = store.create(PROFILE)
        (store.root / f"{stored.id}.json").chmod(0)
        with pytest.raises(StoreError, match="cannot be read"):
            store.read(stored.id)
        assert [entry.problem is None for entry in store.entries()] == [False]
        store.root.chmod(0)
        for read in (store.entries, store.active_id, lambda: store.resolve("active")):
            with pytest.raises(StoreError, match="cannot be read"):
                read()


def test_a_disk_that_fills_up_leaves_the_old_profile(
    tmp_path: Path, full_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    store = ProfileStore(profiles_folder(tmp_path / "user"))
    stored = store.create(PROFILE)
    before = sorted(path.name for path in store.root.iterdir())
    with full_disk(), pytest.raises(StoreError):
        store.save(stored, Profile(age=3))
    with full_disk(), pytest.raises(StoreError):
        store.create(Profile(age=3))
    assert store.read(stored.id) == stored
    assert sorted(path.name for path in store.root.iterdir()) == before


@pytest.mark.parametrize("old", [b"old", None])
def test_a_write_that_fails_half_way_leaves_everything_as_it_was(tmp_path: Path, old: bytes | None) -> None:
    path = tmp_path / "file.json"
    if old is not None:
        path.write_bytes(old)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UnicodeEncodeError), replacing(path) as aside, aside.open("w", encoding="ascii") as file:
        file.writelines(["new", "ü"])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
