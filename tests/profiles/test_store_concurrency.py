"""The private store with several real programs writing at once."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from comfyui_psa.profiles import Profile, ProfileStore, StoreError

Start = Callable[..., "subprocess.Popen[str]"]

SAVE_ONCE = """
import sys
from pathlib import Path
from comfyui_psa.profiles import ProfileStore, StoreError

store = ProfileStore(Path(sys.argv[1]))
stored = store.read(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
try:
    store.save(stored, stored.profile.model_copy(update={"name": sys.argv[3]}))
    print("saved " + sys.argv[3])
except StoreError:
    print("refused")
"""

GROW_OLDER = """
import sys
from pathlib import Path
from comfyui_psa.profiles import ProfileStore, StoreError

store = ProfileStore(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[3])):
    for attempt in range(1000):
        stored = store.read(sys.argv[2])
        try:
            store.save(stored, stored.profile.model_copy(update={"age": stored.profile.age + 1}))
            break
        except StoreError:
            pass
    else:
        sys.exit("no change ever got through")
"""

HOLD_THE_LOCK = """
import sys
from filelock import FileLock

with FileLock(sys.argv[1]):
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def store(tmp_path: Path) -> ProfileStore:
    return ProfileStore(tmp_path / "profiles", lock_seconds=0.2)


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Start:
    """Start a program that has got as far as printing "ready", and waits for a line."""

    def run(script: str, *args: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        request.addfinalizer(lambda: (process.kill(), process.communicate()))
        return process

    return run


def _wait_until_ready(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"


def _let_go(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


def _assert_only_whole_files(store: ProfileStore) -> None:
    assert [
        path.name for path in store.root.iterdir() if not re.fullmatch(r"[0-9a-f]{16}\.(json|backup)|\.lock", path.name)
    ] == []


def test_of_two_programs_that_save_what_both_opened_one_wins(store: ProfileStore, start: Start) -> None:
    stored = store.create(Profile(age=5))
    processes = [start(SAVE_ONCE, store.root, stored.id, name) for name in ("first", "second")]
    _wait_until_ready(*processes)
    _let_go(*processes)
    results = sorted(process.communicate(timeout=60)[0].strip() for process in processes)
    winner = store.read(stored.id).profile.name
    assert winner in ("first", "second")
    assert results == ["refused", f"saved {winner}"]
    _assert_only_whole_files(store)


def test_no_change_is_lost_and_every_read_is_whole(store: ProfileStore, start: Start) -> None:
    stored = store.create(Profile(age=0))
    processes = [start(GROW_OLDER, store.root, stored.id, 30) for _ in range(2)]
    _wait_until_ready(*processes)
    _let_go(*processes)
    ages = [0]
    while any(process.poll() is None for process in processes):
        ages.append(store.read(stored.id).profile.age or 0)
    assert [process.returncode for process in processes] == [0, 0]
    assert ages == sorted(ages)
    assert store.read(stored.id).profile.age == 60
    _assert_only_whole_files(store)


def test_while_another_program_writes_a_change_is_refused_and_reading_goes_on(
    store: ProfileStore, start: Start
) -> None:
    stored = store.create(Profile(age=5))
    holder = start(HOLD_THE_LOCK, store.root / ".lock")
    _wait_until_ready(holder)
    for change in (
        lambda: store.create(Profile()),
        lambda: store.save(stored, Profile()),
        lambda: store.delete(stored.id),
        lambda: store.activate(stored.id),
    ):
        with pytest.raises(StoreError, match=r"0\.2 seconds; nothing was changed"):
            change()
    assert store.read(stored.id) == stored
    assert [entry.id for entry in store.entries()] == [stored.id]
    assert store.active_id() is None
    _let_go(holder)
    holder.communicate(timeout=60)
    assert store.save(stored, Profile(age=6)).profile.age == 6
