"""Adapters and compiled profiles that ComfyUI's account may not read, and folders that it may not fill."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from kinds_by_hand import TEXT, kinds_adapter, users

from comfyui_psa.adapter import (
    AdapterError,
    compile_profile,
    load_adapter,
    load_adapter_config,
    load_compiled,
    save_adapter,
    save_compiled,
)

ADAPTER = kinds_adapter((), 24, text=TEXT)
PROFILE, OTHER = (compile_profile(ADAPTER, ADAPTER.effect(users(number).vectors)) for number in (0, 1))
CLOSED = r"mine\.safetensors cannot be read \(Permission denied\)\. Make the file and its folder readable"


@contextmanager
def as_nobody() -> Iterator[None]:
    """Inside, root has no more rights than anybody else."""
    if root := os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def path() -> Iterator[Path]:
    """A file's place in a folder that everybody may read; pytest's own are private."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder / "mine.safetensors"
        folder.chmod(0o755)


@pytest.mark.parametrize("closed", ["the file", "the folder"])
@pytest.mark.parametrize("load", [load_adapter, load_adapter_config, load_compiled])
def test_what_may_not_be_read(path: Path, closed: str, load: Callable[[Path], object]) -> None:
    if load is load_compiled:
        save_compiled(PROFILE, path)
    else:
        save_adapter(ADAPTER, path)
    (path if closed == "the file" else path.parent).chmod(0)
    with as_nobody(), pytest.raises(AdapterError, match=CLOSED):
        load(path)


def test_a_closed_file_is_not_replaced(path: Path) -> None:
    save_compiled(PROFILE, path)
    content = path.read_bytes()
    path.chmod(0)
    with as_nobody(), pytest.raises(AdapterError, match=CLOSED):
        save_compiled(OTHER, path, overwrite=True)
    assert path.read_bytes() == content


def test_where_nothing_may_be_written(path: Path) -> None:
    path.parent.chmod(0o555)
    with (
        as_nobody(),
        pytest.raises(AdapterError, match=r"cannot be written \(Permission denied\).* make the folder wri"),
    ):
        save_compiled(PROFILE, path)
    assert list(path.parent.iterdir()) == []
