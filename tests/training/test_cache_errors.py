"""The caching pass: rows that are left out, and what is refused."""

from __future__ import annotations

import json
import logging
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cache_testing import (
    ROWS,
    SHARD,
    WatchedBase,
    break_image,
    build,
    cached_values,
    changed,
    check_latents,
    parts,
    watch,
    write_embeddings,
)
from pairs import read_metadata, write_metadata
from torch import Tensor

from comfyui_psa.training.base import open_base
from comfyui_psa.training.config import TrainConfig
from comfyui_psa.training.errors import DataError


def test_a_broken_image_stops_the_pass(config: TrainConfig) -> None:
    break_image(config.data.train, 3)
    base = watch(config)
    with pytest.raises(DataError, match=r"^row 4 of metadata\.jsonl: .*000003_rejected\.png cannot be read") as error:
        build(config, base)
    assert "data.max_skipped" in str(error.value)


def test_broken_images_are_left_out_up_to_the_limit(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    whole = build(config)
    break_image(config.data.train, 1)
    break_image(config.data.train, 3)
    with pytest.raises(DataError, match=r"up to 1 unusable rows"):
        build(changed(config, "data", max_skipped=1))
    allowed = changed(config, "data", max_skipped=2)
    base = watch(config)
    with caplog.at_level(logging.WARNING):
        cached = build(allowed, base)
    assert [cached.row(i).row for i in range(len(cached))] == [0, 2, 4]
    assert cached.row_users == ("0000001",) * 3
    assert cached.users == ("0000001",)
    assert torch.equal(cached.row(1).chosen, whole.row(2).chosen)
    assert [report.partition(":")[0] for report in cached.skipped] == [
        "row 2 of metadata.jsonl",
        "row 4 of metadata.jsonl",
    ]
    assert [record.args for record in caplog.records] == [(report,) for report in cached.skipped]

    # The cache is the same for every limit, and the limit holds for a warm one too.
    with pytest.raises(DataError, match=r"up to 1 unusable rows"):
        build(changed(config, "data", max_skipped=1))
    again = watch(config)
    assert cached_values(build(allowed, again)) == cached_values(cached)
    assert again.loaded == []


def test_a_shard_of_broken_images_alone(config: TrainConfig) -> None:
    break_image(config.data.train, 2)
    break_image(config.data.train, 3)
    cached = build(changed(config, "data", max_skipped=2))
    assert [cached.row(i).row for i in range(len(cached))] == [0, 1, 4]


def test_no_usable_row_is_an_error(config: TrainConfig) -> None:
    for row in range(ROWS):
        break_image(config.data.train, row)
    with pytest.raises(DataError, match=r"No row of .*train can be used\. The first one: row 1 of metadata\.jsonl"):
        build(changed(config, "data", max_skipped=ROWS))


def test_a_missing_embedding_stops_before_any_model_is_loaded(config: TrainConfig, tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "embeddings", ["0000001"])
    base = watch(config)
    with pytest.raises(DataError, match=r"^row 2 of metadata\.jsonl: .*0000002\.npy"):
        build(changed(config, "data", embeddings=folder), base)
    assert base.loaded == []


def test_missing_embeddings_and_broken_images_count_together(config: TrainConfig, tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "embeddings", ["0000001"])
    (folder / "0000002.npy").write_bytes(b"damaged")
    break_image(config.data.train, 1)  # its user has no embedding either, so it counts once
    break_image(config.data.train, 4)
    with pytest.raises(DataError, match=r"^row 5 of metadata\.jsonl: .*up to 2 unusable rows"):
        build(changed(config, "data", embeddings=folder, max_skipped=2))
    cached = build(changed(config, "data", embeddings=folder, max_skipped=3))
    assert [cached.row(i).row for i in range(len(cached))] == [0, 2]
    assert ["0000002.npy" in report for report in cached.skipped] == [True, True, False]
    with pytest.raises(DataError, match="not in the cache"):
        cached.user("0000002")
    write_embeddings(folder, ["0000001", "0000002"])
    assert len(build(changed(config, "data", embeddings=folder, max_skipped=3))) == 3


def test_a_user_who_is_two_people_is_an_error(config: TrainConfig) -> None:
    rows = read_metadata(config.data.train)
    rows[2]["user_data"]["Age"] = "3"
    write_metadata(config.data.train, rows)
    with pytest.raises(DataError, match=r"row 3 of metadata\.jsonl: the user 0000001 .* row 1 of metadata\.jsonl"):
        build(config)


def test_latents_that_are_no_numbers_are_no_data(config: TrainConfig) -> None:
    class Overflowing(WatchedBase):
        def count(self, batch: Sequence[str] | Tensor) -> None:
            super().count(batch)
            if isinstance(batch, Tensor):
                batch.mul_(float("inf") if self.images == 3 else 1)

    base = Overflowing(open_base(config.model.base))
    with pytest.raises(DataError, match=r"^row 2 of metadata\.jsonl: the VAE .*infinite.*model\.dtype"):
        build(config, base)


def test_a_source_without_rows_is_an_error(config: TrainConfig) -> None:
    write_metadata(config.data.train, [])
    with pytest.raises(DataError, match="no preference pair"):
        build(config)


def test_embeddings_of_another_encoder_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "embeddings", ["0000001", "0000002"])
    config = changed(config, "data", embeddings=folder)
    (folder / "encoder.json").write_text(json.dumps({"encoder": "llm:Qwen2.5-7B-Instruct:0123456789abcdef"}))
    with pytest.raises(DataError, match=r"encoder llm:Qwen2\.5-7B-Instruct.*attributes-1"):
        build(config)
    (folder / "encoder.json").write_text(json.dumps({"encoder": "attributes-1"}))
    assert len(build(config)) == ROWS
    (folder / "encoder.json").write_text("no JSON")
    with pytest.raises(DataError, match=r"encoder\.json is damaged"):
        build(config)


def test_embeddings_of_different_lengths_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "embeddings", ["0000001"])
    write_embeddings(folder, ["0000002"], dim=7)
    with pytest.raises(DataError, match="6 numbers for the user 0000001, 7 numbers for the user 0000002"):
        build(changed(config, "data", embeddings=folder))


def test_a_shard_of_another_size_is_computed_again(config: TrainConfig) -> None:
    before = cached_values(build(config))
    shard = parts(config, "latents")[0] / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    base = watch(config)
    assert cached_values(build(config, base)) == before
    assert base.images == 2 * SHARD
    again = watch(config)
    build(config, again)
    assert again.loaded == []


@pytest.mark.parametrize("name", ["pairs", "users", "captions", "latents"])
def test_damage_names_the_folder_to_delete(config: TrainConfig, name: str) -> None:
    before = cached_values(build(config))
    (folder,) = parts(config, name)
    shard = folder / "shard-00000.arrow"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    with pytest.raises(DataError, match=rf"{folder} is damaged.*Delete this folder"):
        build(config)
    shutil.rmtree(folder)
    assert cached_values(build(config)) == before
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match=rf"manifest\.json is damaged.*Delete the folder {folder}"):
        build(config)


def test_a_full_disk_is_said_and_leaves_nothing_half(config: TrainConfig) -> None:
    base = open_base(config.model.base)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # enough for pairs and users, not for captions
    try:
        with pytest.raises(DataError, match=r"captions-\w+ cannot be written \(File too large\)"):
            build(config, base)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(parts(config, "captions")[0].iterdir()) == []
    check_latents(build(config), config)
