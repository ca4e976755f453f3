"""The caching pass: what is stored, and under which key."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cache_testing import (
    EXTRA,
    ROWS,
    USERS,
    build,
    cached_values,
    changed,
    check_latents,
    parts,
    watch,
    write_embeddings,
)
from datasets import Dataset
from pairs import read_metadata, write_image, write_metadata
from pipelines import write_sd_pipeline, write_sdxl_pipeline
from torch import Tensor

from comfyui_psa.profiles import Profile
from comfyui_psa.profiles.encoders import AttributesEncoder
from comfyui_psa.training.base import TextEmbedding, open_base
from comfyui_psa.training.config import TrainConfig
from comfyui_psa.training.data import user_embeddings
from comfyui_psa.training.data.pairs import open_pairs
from comfyui_psa.training.data.users import read_profile
from comfyui_psa.training.errors import DataError


def test_latents_are_those_of_the_loaded_pair(config: TrainConfig) -> None:
    config = changed(config, "data", crop="random")
    cached = build(config)
    check_latents(cached, config)
    pairs = list(open_pairs(config.data.train))
    found = [(row.row, row.user_id, row.caption) for row in map(cached.row, range(len(cached)))]
    assert found == [(pair.row, pair.user_id, pair.caption) for pair in pairs]
    assert len({cached.row(i).crop for i in range(ROWS)}) > 2


def test_latents_and_texts_of_a_half_precision_run_are_stored_in_half(config: TrainConfig) -> None:
    whole = build(config)
    half = build(changed(config, "model", dtype="bf16"))
    row, text = half.row(1), half.text("")
    assert row.chosen.dtype == row.rejected.dtype == text.hidden.dtype == torch.float32
    assert torch.equal(row.chosen, whole.row(1).chosen.half().float())
    assert torch.equal(row.rejected, whole.row(1).rejected.half().float())
    assert torch.equal(text.hidden, whole.text("").hidden.half().float())
    assert torch.equal(half.user("0000001"), whole.user("0000001"))


def test_each_caption_is_encoded_once_and_the_empty_one_too(config: TrainConfig) -> None:
    base = watch(config)
    cached = build(config, base, ["a grid prompt", "a harbour at dawn"])
    captions = {pair.caption for pair in open_pairs(config.data.train)}
    assert sorted(base.captions) == sorted({"", "a grid prompt", *captions})
    encoder = open_base(config.model.base).text_encoder(torch.device("cpu"))
    for caption in base.captions:
        expected = encoder.encode([caption])[0]
        torch.testing.assert_close(cached.text(caption).hidden, expected.hidden)
        assert cached.text(caption).pooled is None
    assert not torch.equal(cached.text("").hidden, cached.text("a grid prompt").hidden)
    with pytest.raises(DataError, match='"never seen" is not in the cache'):
        cached.text("never seen")


def test_sdxl_has_pooled_texts(config: TrainConfig, tmp_path: Path) -> None:
    write_sdxl_pipeline(tmp_path / "sdxl")
    config = changed(config, "model", base=tmp_path / "sdxl")
    cached = build(config)
    expected: TextEmbedding = (
        open_base(config.model.base).text_encoder(torch.device("cpu")).encode(["a harbour at dawn"])[0]
    )
    found = cached.text("a harbour at dawn")
    assert found.pooled is not None
    torch.testing.assert_close(found.hidden, expected.hidden)
    torch.testing.assert_close(found.pooled, expected.pooled)


def test_each_user_is_encoded_once(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Profile] = []

    class Counting(AttributesEncoder):
        def encode_batches(self, profiles: Sequence[Profile], batch_size: int = 8) -> Iterator[Tensor]:
            seen.extend(profiles)
            return super().encode_batches(profiles, batch_size)

    monkeypatch.setattr(user_embeddings, "make_encoder", lambda *_: Counting())
    cached = build(config, extra_profiles=EXTRA)
    profiles = {pair.user_id: read_profile(pair.user, "") for pair in open_pairs(config.data.train)} | EXTRA
    assert len(seen) == len(profiles) == USERS + len(EXTRA)
    assert cached.users == ("0000001", "0000002")
    assert cached.row_users == ("0000001", "0000002", "0000001", "0000002", "0000001")
    for user, profile in profiles.items():
        assert torch.equal(cached.user(user), AttributesEncoder().encode([profile])[0])
    with pytest.raises(DataError, match="0000009 is not in the cache"):
        cached.user("0000009")


def test_users_come_from_a_folder_of_embeddings(config: TrainConfig, tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "embeddings", ["0000001", "0000002", "L5"])
    cached = build(changed(config, "data", embeddings=folder), extra_profiles=EXTRA)
    assert cached.user("0000002").tolist() == [1, 2, 3, 4, 5, 6]
    assert cached.user("L5").tolist() == [2, 3, 4, 5, 6, 7]
    with pytest.raises(DataError, match="L0 is not in the cache"):
        cached.user("L0")


def test_tensors_belong_to_the_caller(config: TrainConfig) -> None:
    cached = build(config)
    before = cached_values(cached)
    row, user, text = cached.row(0), cached.user("0000001"), cached.text("")
    for tensor in (row.chosen, row.rejected, user, text.hidden):
        tensor.zero_()
    assert cached_values(cached) == before


def test_a_streamed_table_gives_the_same(config: TrainConfig, tmp_path: Path) -> None:
    images = [
        {**row, **{side: (config.data.train / row[side]).read_bytes() for side in ("chosen", "rejected")}}
        for row in read_metadata(config.data.train)
    ]
    table = tmp_path / "table"
    table.mkdir()
    for shard, rows in enumerate((images[:2], images[2:])):
        pq.write_table(Dataset.from_list(rows).data.table, table / f"{shard}.parquet")
    from_table = changed(config, "data", train=table)
    assert cached_values(build(from_table)) == cached_values(build(config))


def test_cached_files_are_arrow_and_private(config: TrainConfig) -> None:
    build(config)
    files = [path for path in config.data.cache.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"manifest.json", *(f"shard-0000{shard}.arrow" for shard in range(3))}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in config.data.cache.iterdir()} == {0o700}
    latents = Dataset.from_file(str(parts(config, "latents")[0] / "shard-00001.arrow"))
    assert latents["row"][:] == [2, 3]


def test_a_changed_setting_never_meets_old_latents(config: TrainConfig) -> None:
    before = cached_values(build(config))
    changes: list[tuple[str, dict[str, object]]] = [
        ("data", {"resolution": 24}),
        ("data", {"crop": "random"}),
        ("data", {"flip": False}),
        ("run", {"seed": 1}),
        ("model", {"dtype": "fp16"}),
    ]
    for number, (section, values) in enumerate(changes, start=1):
        other = changed(config, section, **values)
        base = watch(other)
        check_latents(build(other, base), other)
        assert base.images == 2 * ROWS
        assert len(parts(config, "latents")) == number + 1
    again = watch(config)
    assert cached_values(build(config, again)) == before
    assert again.loaded == []


def test_another_vae_meets_no_old_latents_but_old_texts(config: TrainConfig, sd: Path, tmp_path: Path) -> None:
    build(config)
    other = tmp_path / "other"
    shutil.copytree(sd, other)
    write_sd_pipeline(tmp_path / "second", seed=1)
    shutil.rmtree(other / "vae")
    shutil.copytree(tmp_path / "second" / "vae", other / "vae")
    base = watch(changed(config, "model", base=other))
    build(config, base)
    assert base.loaded == ["vae"]


def test_another_text_encoder_meets_no_old_texts_but_old_latents(config: TrainConfig, sd: Path, tmp_path: Path) -> None:
    build(config)
    other = tmp_path / "other"
    shutil.copytree(sd, other)
    write_sd_pipeline(tmp_path / "second", seed=1)
    shutil.rmtree(other / "text_encoder")
    shutil.copytree(tmp_path / "second" / "text_encoder", other / "text_encoder")
    base = watch(changed(config, "model", base=other))
    cached = build(config, base)
    assert base.loaded == ["text"]
    expected = open_base(other).text_encoder(torch.device("cpu")).encode([""])[0]
    torch.testing.assert_close(cached.text("").hidden, expected.hidden)


def test_changed_data_meet_no_old_cache(config: TrainConfig) -> None:
    build(config)
    name = read_metadata(config.data.train)[3]["chosen"]
    write_image(config.data.train / name, (40, 32), np.random.default_rng(9))
    base = watch(config)
    cached = build(config, base)
    assert (base.loaded, base.images) == (["vae"], 2 * ROWS)
    rows = read_metadata(config.data.train)
    rows[3]["caption"] = "another caption"
    write_metadata(config.data.train, rows)
    cached = build(config)
    assert cached.row(3).caption == "another caption"
    assert cached.text("another caption").hidden.shape == cached.text("").hidden.shape


def test_changed_users_meet_no_old_embeddings(config: TrainConfig, tmp_path: Path) -> None:
    before = build(config).user("0000001")
    rows = read_metadata(config.data.train)
    for row in rows:
        if row["user_data"]["User_ID"] == "0000001":
            row["user_data"]["Age"] = "99"
    write_metadata(config.data.train, rows)
    after = build(config).user("0000001")
    assert after[7] == pytest.approx(0.99)
    assert not torch.equal(before, after)

    folder = write_embeddings(tmp_path / "embeddings", ["0000001", "0000002"])
    from_files = changed(config, "data", embeddings=folder)
    assert build(from_files).user("0000001").tolist() == [0, 1, 2, 3, 4, 5]
    write_embeddings(folder, ["0000002", "0000001"])
    assert build(from_files).user("0000001").tolist() == [1, 2, 3, 4, 5, 6]


def test_settings_that_change_nothing_share_the_cache(config: TrainConfig) -> None:
    fixed = changed(config, "data", flip=False)
    first = build(fixed)
    base = watch(config)
    second = build(changed(fixed, "run", seed=9), base)
    assert base.loaded == []
    assert cached_values(first) == cached_values(second)
