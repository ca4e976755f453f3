"""The private store: what it keeps, what it refuses, and what it never shows."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from comfyui_psa.profiles import (
    ConflictError,
    Profile,
    ProfileError,
    ProfileStore,
    StoreError,
    embeddings_folder,
    files,
    private_fingerprint,
    profiles_folder,
)

MARKER = "Zorblax"
FULL = Profile(
    name="evening",
    age=87,
    gender=MARKER,
    religion=MARKER,
    physical_condition=MARKER,
    mental_condition=MARKER,
    overrides={"Propaganda": "ban", "Hate": "allow"},
    notes=MARKER + "\n ünïcode 名前",
)
DAMAGED = {
    "empty": b"",
    "cut off": b'{"format": "psa_profile", "format_version": 1, "profile": {"gender": "Zorbl',
    "not text": b"\xff\xfe\x00",
    "a list": b"[]",
    "another format": b'{"format": "Zorblax", "format_version": 1, "profile": {}}',
    "no profile": b'{"format": "psa_profile", "format_version": 1}',
    "a number of 5,000 digits": b'{"format": "psa_profile", "age": ' + b"7" * 5000 + b"}",
    "nested without end": b"[" * 100_000,
}


@pytest.fixture
def store(tmp_path: Path) -> ProfileStore:
    return ProfileStore(profiles_folder(tmp_path / "user"))


def _file(store: ProfileStore, profile_id: str) -> Path:
    return store.root / f"{profile_id}.json"


def _write(store: ProfileStore, profile_id: str, profile: Any, **changes: Any) -> None:
    content = {"format": "psa_profile", "format_version": 1, "revision": "1", "profile": profile} | changes
    _file(store, profile_id).write_text(json.dumps(content), encoding="utf-8")


def test_a_profile_comes_back_as_it_was(store: ProfileStore) -> None:
    created = store.create(FULL)
    assert ProfileStore(store.root).read(created.id) == created
    assert store.read(created.id).profile == FULL


def test_a_saved_change_comes_back(store: ProfileStore) -> None:
    created = store.create(FULL)
    saved = store.save(created, Profile(age=3))
    assert saved.id == created.id
    assert store.read(created.id) == saved
    assert saved.profile == Profile(age=3)


def test_ids_are_random_and_tell_nothing(store: ProfileStore) -> None:
    ids = {store.create(FULL).id for _ in range(10)}
    assert len(ids) == 10
    assert all(re.fullmatch(r"[0-9a-f]{16}", profile_id) for profile_id in ids)


def test_only_the_owner_can_read_files_and_folders(store: ProfileStore) -> None:
    before = os.umask(0)
    try:
        stored = store.create(FULL)
        store.save(stored, FULL)
        store.activate(stored.id)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (store.root, store.root.parent)] == [0o700, 0o700]
    assert {path.name: stat.S_IMODE(path.stat().st_mode) & 0o077 for path in store.root.iterdir()} == {
        path.name: 0 for path in store.root.iterdir()
    }
    assert stat.S_IMODE(_file(store, stored.id).stat().st_mode) == 0o600


def test_the_list_shows_names_sorted_and_no_attributes(store: ProfileStore) -> None:
    ids = {name: store.create(FULL.model_copy(update={"name": name})).id for name in ("work", "Evening", "kids")}
    store.activate(ids["kids"])
    entries = store.entries()
    assert [(entry.name, entry.id, entry.active) for entry in entries] == [
        ("Evening", ids["Evening"], False),
        ("kids", ids["kids"], True),
        ("work", ids["work"], False),
    ]
    assert MARKER not in repr(entries)
    assert "87" not in repr([(entry.name, entry.problem) for entry in entries])


def test_reading_an_empty_store_makes_no_folder(store: ProfileStore) -> None:
    assert store.entries() == ()
    assert store.active_id() is None
    with pytest.raises(ProfileError):
        store.read("0123456789abcdef")
    assert not store.root.parent.exists()


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_named_and_hides_no_other(store: ProfileStore, damage: str) -> None:
    healthy = store.create(FULL)
    damaged = store.create(FULL)
    _file(store, damaged.id).write_bytes(DAMAGED[damage])
    with pytest.raises(ProfileError) as refused:
        store.read(damaged.id)
    assert str(_file(store, damaged.id)) in str(refused.value)
    assert MARKER not in str(refused.value)
    problems = {entry.id: entry.problem for entry in store.entries()}
    assert problems == {healthy.id: None, damaged.id: str(refused.value)}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_that_is_deleted_is_set_aside(store: ProfileStore, damage: str) -> None:
    damaged = store.create(FULL)
    store.activate(damaged.id)
    for number in (1, 2):
        _file(store, damaged.id).write_bytes(DAMAGED[damage])
        store.delete(damaged.id)
        assert store.entries() == ()
        assert store.active_id() is None
        assert _file(store, damaged.id).with_suffix(f".damaged-{number}").read_bytes() == DAMAGED[damage]
        assert store.put_back(damaged.id, FULL).profile == FULL


@pytest.mark.parametrize("damage", DAMAGED)
def test_the_version_before_the_last_save_comes_back_for_a_damaged_file(store: ProfileStore, damage: str) -> None:
    stored = store.save(store.create(FULL), Profile(name="later"))
    _file(store, stored.id).write_bytes(DAMAGED[damage])
    (entry,) = store.entries()
    assert entry.problem
    assert entry.restorable
    restored = store.restore(stored.id)
    assert restored.profile == FULL
    assert restored.revision != stored.revision
    assert store.read(stored.id) == restored
    assert _file(store, stored.id).with_suffix(".damaged-1").read_bytes() == DAMAGED[damage]


def test_the_earlier_version_of_a_damaged_file_that_is_deleted_stays_beside_it(store: ProfileStore) -> None:
    stored = store.save(store.create(FULL), Profile(name="later"))
    path = _file(store, stored.id)
    path.write_bytes(b"{")
    before = path.with_suffix(".backup").read_bytes()
    store.delete(stored.id)
    assert path.with_suffix(".damaged-1.backup").read_bytes() == before


def test_restoring_a_whole_profile_takes_the_last_save_back_and_forth(store: ProfileStore) -> None:
    stored = store.save(store.create(FULL), Profile(name="later"))
    assert store.restore(stored.id).profile == FULL
    assert store.restore(stored.id).profile == Profile(name="later")
    assert len(list(store.root.glob("*.damaged-*"))) == 0


def test_without_an_earlier_version_nothing_is_restored(store: ProfileStore) -> None:
    stored = store.create(FULL)
    with pytest.raises(ProfileError, match="no earlier version"):
        store.restore(stored.id)
    _file(store, stored.id).write_bytes(b"cut off")
    assert not store.entries()[0].restorable
    with pytest.raises(ProfileError, match="no earlier version"):
        store.restore(stored.id)
    _file(store, stored.id).with_suffix(".backup").write_bytes(b"cut off, too")
    assert not store.entries()[0].restorable
    with pytest.raises(ProfileError, match=r"\.backup is damaged"):
        store.restore(stored.id)
    assert _file(store, stored.id).read_bytes() == b"cut off"


def test_a_deleted_profile_can_be_put_back_under_its_id(store: ProfileStore) -> None:
    stored = store.create(FULL)
    with pytest.raises(ConflictError):
        store.put_back(stored.id, Profile())
    store.delete(stored.id)
    assert store.put_back(stored.id, stored.profile).id == stored.id
    assert store.read(stored.id).profile == FULL


def test_a_file_of_an_earlier_version_is_brought_up(store: ProfileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, as if versions 0 and -1 had been: other names for the age."""

    def renamed(old: str, new: str, version: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def migrate(content: dict[str, Any]) -> dict[str, Any]:
            profile = {new if name == old else name: value for name, value in content["profile"].items()}
            return {**content, "format_version": version, "profile": profile}

        return migrate

    monkeypatch.setattr(files, "MIGRATIONS", {-1: renamed("years", "Age", 0), 0: renamed("Age", "age", 1)})
    stored = store.create(Profile())
    _write(store, stored.id, {"years": 61}, format_version=-1)
    before = _file(store, stored.id).read_bytes()
    read = store.read(stored.id)
    assert read.profile == Profile(age=61)
    assert _file(store, stored.id).read_bytes() == before  # reading changes nothing
    store.save(read, Profile(age=62))
    assert json.loads(_file(store, stored.id).read_text(encoding="utf-8"))["format_version"] == 1
    assert store.restore(stored.id).profile == Profile(age=61)


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"age": MARKER}, "age"),
        ({"age": 12345}, "age"),
        ({"religion": [MARKER]}, "religion"),
        ({"overrides": {"Violence": MARKER}}, "overrides"),
        ({MARKER: 1}, "fields"),
        (MARKER, "object"),
    ],
)
def test_a_file_with_wrong_types_is_refused_without_its_values(store: ProfileStore, document: Any, field: str) -> None:
    stored = store.create(FULL)
    _write(store, stored.id, document)
    with pytest.raises(ProfileError) as refused:
        store.read(stored.id)
    message = str(refused.value)
    assert str(_file(store, stored.id)) in message
    assert field in message
    assert MARKER not in message
    assert "12345" not in message


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_another_format_version_is_refused_and_kept(store: ProfileStore, version: Any) -> None:
    stored = store.create(FULL)
    _write(store, stored.id, {}, format_version=version)
    before = _file(store, stored.id).read_bytes()
    with pytest.raises(ProfileError, match=r"version 1\).*Update"):
        store.read(stored.id)
    with pytest.raises(ProfileError):
        store.save(stored, Profile())
    assert _file(store, stored.id).read_bytes() == before


@pytest.mark.parametrize("use", [ProfileStore.read, ProfileStore.resolve, ProfileStore.delete, ProfileStore.activate])
@pytest.mark.parametrize(
    "reference", ["0123456789abcdef", "../outside", "", ".", "x/../{id}", "{id}.json/../../outside", "{path}"]
)
def test_an_unknown_id_is_refused_and_touches_nothing(
    store: ProfileStore, use: Callable[[ProfileStore, str], object], reference: str
) -> None:
    stored = store.create(FULL)
    outside = store.root.parent / "outside.json"
    shutil.copy(_file(store, stored.id), outside)
    path = _file(store, stored.id).with_suffix("")
    with pytest.raises(ProfileError, match="There is no safety profile"):
        use(store, reference.replace("{id}", stored.id).replace("{path}", str(path)))
    assert outside.exists()
    assert store.read(stored.id) == stored
    assert store.active_id() is None


def test_a_deleted_profile_leaves_no_file(store: ProfileStore) -> None:
    stored = store.save(store.create(FULL), FULL)
    store.delete(stored.id)
    assert {path.name for path in store.root.iterdir()} <= {".lock"}


def test_a_deleted_profile_is_gone(store: ProfileStore) -> None:
    kept, deleted = store.create(FULL), store.create(FULL)
    store.activate(kept.id)
    store.delete(deleted.id)
    with pytest.raises(ProfileError):
        store.read(deleted.id)
    assert store.resolve("active") == kept


def test_after_deleting_the_active_profile_none_is_active(store: ProfileStore) -> None:
    stored = store.create(FULL)
    store.activate(stored.id)
    store.delete(stored.id)
    assert store.active_id() is None


def test_active_refers_to_the_last_one_activated(store: ProfileStore) -> None:
    first, second = store.create(FULL), store.create(Profile(age=5))
    store.activate(first.id)
    store.activate(second.id)
    assert store.resolve("active") == second
    assert store.resolve(first.id) == first


def test_without_an_active_profile_the_message_says_how_to_make_one(store: ProfileStore) -> None:
    store.create(FULL)
    with pytest.raises(ProfileError, match="in the tab Safety Profiles"):
        store.resolve("active")


@pytest.mark.parametrize("content", [b"../outside", b"0123456789abcdef", b"", b"\xff\xfe\x00"])
def test_a_damaged_reference_to_the_active_profile_is_an_error_of_ours(store: ProfileStore, content: bytes) -> None:
    stored = store.create(FULL)
    store.activate(stored.id)
    (store.root / "active").write_bytes(content)
    with pytest.raises(ProfileError):
        store.resolve("active")
    assert [entry.id for entry in store.entries()] == [stored.id]


def test_a_change_on_top_of_an_outdated_one_is_refused(store: ProfileStore) -> None:
    opened = store.create(FULL)
    other = ProfileStore(store.root)
    theirs = other.save(other.read(opened.id), Profile(age=3))
    with pytest.raises(StoreError, match="nothing was overwritten"):
        store.save(opened, Profile(age=4))
    assert store.read(opened.id) == theirs


def test_saving_the_same_content_twice_still_counts_as_a_change(store: ProfileStore) -> None:
    opened = store.create(FULL)
    store.save(opened, FULL)
    with pytest.raises(StoreError):
        store.save(opened, FULL)


def test_a_fingerprint_belongs_to_one_profile() -> None:
    changes = {"name": "x", "age": 86, "gender": "x", "religion": "x", "physical_condition": "x"}
    changes |= {"mental_condition": "x", "overrides": {"Hate": "allow"}, "notes": "x"}
    assert set(changes) == set(Profile.model_fields)
    profiles = [FULL, *(FULL.model_copy(update={field: value}) for field, value in changes.items())]
    fingerprints = {private_fingerprint(profile.model_dump_json()) for profile in profiles}
    assert len(fingerprints) == len(profiles)
    assert private_fingerprint(Profile(**FULL.model_dump()).model_dump_json()) in fingerprints


def test_a_fingerprint_cannot_be_tried_out_in_another_process() -> None:
    script = "from comfyui_psa.profiles import private_fingerprint; print(private_fingerprint('a profile'))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    there, here = result.stdout.strip(), private_fingerprint("a profile")
    assert len(there) == len(here)
    assert there != here


def test_deleting_a_profile_deletes_cached_embeddings(tmp_path: Path) -> None:
    """They tell of their user, and not of which profile they are."""
    store = ProfileStore(profiles_folder(tmp_path))
    cache = embeddings_folder(tmp_path)
    cache.mkdir(parents=True)
    (cache / "0123.safetensors").write_bytes(b"numbers")
    stored = store.create(Profile())
    store.save(stored, Profile(age=12))
    assert cache.is_dir()
    store.delete(stored.id)
    assert not cache.exists()


def test_every_account_has_a_cache_of_its_own(tmp_path: Path) -> None:
    folders = {embeddings_folder(tmp_path), embeddings_folder(tmp_path, "alice"), embeddings_folder(tmp_path, "bob")}
    assert len(folders) == 3
    assert all(
        folder.parent == profiles_folder(tmp_path, user).parent
        for folder, user in zip(
            (embeddings_folder(tmp_path), embeddings_folder(tmp_path, "bob")), (None, "bob"), strict=True
        )
    )
