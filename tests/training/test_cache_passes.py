"""The caching pass: what is in memory, and what an interrupted or shared pass computes."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from cache_testing import (
    CAPTIONS,
    EXTRA,
    ROWS,
    SHARD,
    USERS,
    build,
    build_and_count,
    cached_values,
    changed,
    parts,
    watch,
)
from processes import call_in_ranks
from rich.progress import Progress
from torch import nn

from comfyui_psa.profiles.encoders import AttributesEncoder
from comfyui_psa.training.config import TrainConfig
from comfyui_psa.training.data.pairs import open_pairs


def test_no_model_stays_in_memory(config: TrainConfig) -> None:
    base = watch(config)
    cached = build(config, base)
    assert base.loaded == ["text", "vae"]
    assert len(base.models) == 2
    assert base.alive() == []
    assert len(cached) == ROWS


def test_no_language_model_stays_in_memory(config: TrainConfig, smollm2_folder: Path) -> None:
    encoder = {"kind": "llm", "name": smollm2_folder.name, "folders": [smollm2_folder.parent], "batch_size": 1}
    cached = build(changed(config, "data", encoder=encoder))
    gc.collect()
    modules = {type(found).__name__ for found in gc.get_objects() if issubclass(type(found), nn.Module)}
    assert not [name for name in modules if name.startswith("Llama")]
    assert cached.user("0000001").shape == (576,)


def test_a_warm_cache_loads_nothing(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(config, watch(config), extra_profiles=EXTRA)
    monkeypatch.delattr(AttributesEncoder, "encode_batches")
    base = watch(config)
    second = build(config, base, extra_profiles=EXTRA)
    assert base.loaded == []
    assert cached_values(first) == cached_values(second)


def test_progress_counts_what_is_computed(config: TrainConfig) -> None:
    progress = Progress(disable=True)
    build(config, extra_profiles=EXTRA, progress=progress)
    done = {task.description: task.completed for task in progress.tasks}
    totals = {task.description: task.total for task in progress.tasks}
    assert done == {
        "Reading pairs": ROWS,
        "Caching users": USERS + len(EXTRA),
        "Caching captions": CAPTIONS,
        "Caching latents": ROWS,
    }
    assert totals == {**done, "Reading pairs": None}
    again = Progress(disable=True)
    build(config, extra_profiles=EXTRA, progress=again)
    assert again.tasks == []


def test_an_interrupted_pass_goes_on(config: TrainConfig, tmp_path: Path) -> None:
    interrupted = watch(config, stop_after=6)
    with pytest.raises(KeyboardInterrupt):
        build(config, interrupted)
    assert interrupted.images == 6  # three rows, of which the third is in no whole shard
    (folder,) = parts(config, "latents")
    assert [path.name for path in folder.iterdir()] == ["shard-00000.arrow"]
    (folder / ".shard-00001.arrow.0123abcd.tmp").write_bytes(b"what a kill leaves behind")
    resumed = watch(config)
    cached = build(config, resumed)
    assert resumed.images == 2 * (ROWS - SHARD)
    assert resumed.captions == []
    fresh = changed(config, "data", cache=tmp_path / "fresh")
    assert cached_values(cached) == cached_values(build(fresh))


def test_interrupted_captions_go_on(config: TrainConfig) -> None:
    build(config)
    (folder,) = parts(config, "captions")
    for name in ("manifest.json", "shard-00001.arrow"):
        (folder / name).unlink()
    base = watch(config)
    build(config, base)
    assert base.loaded == ["text"]
    assert base.captions == sorted({"", *(pair.caption for pair in open_pairs(config.data.train))})[2:4]


def test_two_processes_share_the_work(config: TrainConfig, tmp_path: Path) -> None:
    config = changed(config, "data", cache_batch_size=2)
    # Shards of two rows: the first process has rows 0, 1 and 4, the second one 2 and 3.
    assert call_in_ranks(2, build_and_count, config) == [(6, 5), (4, 5)]
    base = watch(config)
    together = build(config, base)
    assert base.loaded == []
    assert cached_values(together) == cached_values(build(changed(config, "data", cache=tmp_path / "fresh")))
