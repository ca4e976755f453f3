"""What is drawn for a pair, and how pairs become batches: rates, sharing, order, and who is only looked at."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, DDPMScheduler
from pairs import write_image, write_sage_split
from PIL import Image, ImageOps
from pipelines import write_sdxl_pipeline
from torch import Tensor
from training_runs import RESOLUTION, tiny_config

from comfyui_psa.training.base import open_base
from comfyui_psa.training.config import TrainConfig
from comfyui_psa.training.data.cache import build_cache
from comfyui_psa.training.data.cached import CachedPairs
from comfyui_psa.training.data.split import split_pairs
from comfyui_psa.training.dpo.batches import Batches
from comfyui_psa.training.dpo.denoising import PairBatch, pair_errors
from comfyui_psa.training.dpo.draws import Draws
from comfyui_psa.training.errors import DataError

ROWS = 12
SHAPE = (4, 8, 8)
WIDE, TALL = (150, 100), (96, 130)  # (width, height)


def draws(
    seed: int = 1, prompt: float = 0.2, user: float = 0.1, offset: float = 0.0, smallest: int = 0, noises: int = 0
) -> Draws:
    rates = {"prompt_dropout": prompt, "user_dropout": user, "noise_offset": offset}
    return Draws(seed, timesteps=1000, **rates, min_timestep=smallest, noises_per_pair=noises)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two shapes, neither of them a square."""
    folder = write_sage_split(tmp_path_factory.mktemp("data"), rows=ROWS, users=3, size=WIDE)
    generator = np.random.default_rng(5)
    for row in range(1, ROWS, 2):
        for side in ("chosen", "rejected"):
            write_image(folder / f"{row:06d}_{side}.png", TALL, generator)
    return folder


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "sdxl"
    write_sdxl_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def cached(data: Path, sdxl: Path) -> CachedPairs:
    return cache(tiny_config(sdxl.with_name("run"), sdxl, data, {"data.crop": "random", "data.flip": True}))


def cache(config: TrainConfig) -> CachedPairs:
    cached = build_cache(config, config.data.train, open_base(config.model.base), (), {}, PartialState())
    # Thousands of batches of a dozen rows: each is read once.
    for name in ("row", "text", "user"):
        setattr(cached, name, functools.cache(getattr(cached, name)))
    return cached


def batches(cached: CachedPairs, draws: Draws) -> Batches:
    return Batches(cached, range(len(cached)), draws, RESOLUTION)


def assert_equal(a: PairBatch, b: PairBatch) -> None:
    for field in fields(PairBatch):
        one, other = getattr(a, field.name), getattr(b, field.name)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, field.name


def joined(parts: list[PairBatch]) -> PairBatch:
    values = {}
    for field in fields(PairBatch):
        members = [getattr(part, field.name) for part in parts]
        if members[0] is None:
            values[field.name] = None
        else:
            values[field.name] = torch.cat(members) if isinstance(members[0], Tensor) else sum(members, ())
    return PairBatch(**values)


def deviations(count: int, of: int, rate: float) -> float:
    """How many standard deviations a count is away from its expectation."""
    return abs(count - of * rate) / (of * rate * (1 - rate)) ** 0.5


def test_both_images_of_a_pair_get_the_same_noise_at_the_same_timestep(cached: CachedPairs) -> None:
    seen: list[Tensor] = []

    def unet(noisy: Tensor, timesteps: Tensor, _text: Tensor, **_: object) -> SimpleNamespace:
        seen.extend((noisy, timesteps))
        return SimpleNamespace(sample=torch.zeros_like(noisy))

    unet.dtype = torch.float32
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    batch = batches(cached, draws()).training(0, 6)
    pair_errors(unet, scheduler, batch)
    noisy, timesteps = seen
    first, second = timesteps.chunk(2)
    assert torch.equal(first, second)
    assert len(set(first.tolist())) == 6
    alphas = scheduler.alphas_cumprod[first].view(-1, 1, 1, 1)
    in_chosen, in_rejected = (
        (half - alphas.sqrt() * images) / (1 - alphas).sqrt()
        for half, images in zip(noisy.chunk(2), (batch.chosen, batch.rejected), strict=True)
    )
    assert torch.allclose(in_chosen, in_rejected, atol=1e-3)
    assert not torch.allclose(in_chosen[0], in_chosen[1], atol=1)


def test_sdxl_prompts_are_dropped_once_at_the_stated_rate(cached: CachedPairs) -> None:
    samples = 3000
    batch = batches(cached, draws(prompt=0.2, user=0.0)).training(0, samples)
    captions = [cached.row(row).caption for row in batch.rows]
    empty = cached.text("")
    assert batch.pooled is not None
    dropped = 0
    for i, caption in enumerate(captions):
        text = cached.text(caption)
        is_dropped = torch.equal(batch.text[i], empty.hidden)
        # Text and pooled text belong together: never one without the other.
        expected = empty if is_dropped else text
        assert torch.equal(batch.text[i], expected.hidden)
        assert torch.equal(batch.pooled[i], expected.pooled)
        dropped += is_dropped
    assert deviations(dropped, samples, 0.2) < 4
    assert deviations(dropped, samples, 0.36) > 10  # dropped twice

    # Nothing else depends on it.
    never = batches(cached, draws(prompt=0.0, user=0.0)).training(0, samples)
    assert_equal(replace(batch, text=never.text, pooled=never.pooled), never)


def test_users_are_dropped_at_their_own_rate_whatever_happens_to_the_prompt() -> None:
    samples = 5000
    found = [draws(prompt=0.3, user=0.1).draw(sample, (1, 1, 1)) for sample in range(samples)]
    prompts = sum(draw.prompt_dropped for draw in found)
    users = sum(draw.user_dropped for draw in found)
    both = sum(draw.prompt_dropped and draw.user_dropped for draw in found)
    early = sum(draw.user_dropped and draw.timestep < 500 for draw in found)
    assert deviations(prompts, samples, 0.3) < 4
    assert deviations(users, samples, 0.1) < 4
    assert deviations(both, samples, 0.03) < 4
    assert deviations(early, samples, 0.05) < 4


def test_dropped_users_are_marked_in_the_batch(cached: CachedPairs) -> None:
    every, never = (batches(cached, draws(user=rate)).training(0, 5) for rate in (1.0, 0.0))
    assert every.dropped.all()
    assert not never.dropped.any()
    assert torch.equal(every.embedding, never.embedding)
    assert torch.equal(never.embedding, torch.stack([cached.user(cached.row(row).user_id) for row in never.rows]))


def test_timesteps_are_uniform_over_the_whole_schedule() -> None:
    found = torch.tensor([draws().draw(sample, (1, 1, 1)).timestep for sample in range(4000)])
    counts = torch.bincount(found // 100, minlength=10)
    assert len(counts) == 10
    assert all(deviations(count, 4000, 0.1) < 4 for count in counts.tolist())
    only = Draws(1, timesteps=3, prompt_dropout=0, user_dropout=0, noise_offset=0)
    assert {only.draw(sample, (1, 1, 1)).timestep for sample in range(60)} == {0, 1, 2}


def test_timesteps_are_uniform_from_the_smallest_on() -> None:
    found = torch.tensor([draws(smallest=200).draw(sample, (1, 1, 1)).timestep for sample in range(4000)])
    assert int(found.min()) >= 200
    counts = torch.bincount((found - 200) // 100, minlength=8)
    assert len(counts) == 8
    assert all(deviations(count, 4000, 1 / 8) < 4 for count in counts.tolist())
    assert {draws(smallest=999).draw(sample, (1, 1, 1)).timestep for sample in range(5)} == {999}


def test_noise_is_standard_and_an_offset_shifts_whole_channels() -> None:
    plain = torch.stack([draws().draw(sample, SHAPE).noise for sample in range(800)])
    assert float(plain.mean()) == pytest.approx(0, abs=0.01)
    assert float(plain.std()) == pytest.approx(1, abs=0.01)
    shifted = torch.stack([draws(offset=0.3).draw(sample, SHAPE).noise for sample in range(800)])
    offsets = (shifted - plain).flatten(2)
    assert torch.allclose(offsets, offsets[..., :1].expand_as(offsets), atol=1e-6)
    assert float(offsets[..., 0].std()) == pytest.approx(0.3, rel=0.06)
    assert float(torch.corrcoef(offsets[..., 0].T)[0, 1]) == pytest.approx(0, abs=0.15)  # each channel has its own


def test_every_row_comes_once_per_epoch_in_another_order(cached: CachedPairs) -> None:
    source = batches(cached, draws())
    rows = source.training(0, 3 * ROWS).rows
    epochs = [rows[start : start + ROWS] for start in range(0, 3 * ROWS, ROWS)]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert len(set(epochs)) == 3
    some = Batches(cached, (7, 2, 4), draws(), RESOLUTION).training(0, 6).rows
    assert sorted(some[:3]) == sorted(some[3:]) == [2, 4, 7]


@pytest.mark.parametrize(("size", "noises"), [(1, 0), (5, 0), (8, 0), (5, 2)])
def test_a_sample_is_the_same_in_batches_of_any_size(cached: CachedPairs, size: int, noises: int) -> None:
    whole = batches(cached, draws(offset=0.1, noises=noises)).training(0, 40)
    source = batches(cached, draws(offset=0.1, noises=noises))
    starts = range(0, 40, size)
    assert_equal(joined([source.training(start, size) for start in starts]), whole)
    # In any order too: a rank sees every n-th batch, a resumed run only the later ones.
    parts = [source.training(start, size) for start in reversed(starts)]
    assert_equal(joined(parts[::-1]), whole)


def test_another_seed_draws_everything_anew(cached: CachedPairs) -> None:
    one, other = (batches(cached, draws(seed=seed)).training(0, ROWS) for seed in (1, 2))
    assert one.rows != other.rows
    assert not torch.equal(one.timesteps, other.timesteps)
    assert not torch.equal(one.noise, other.noise)


def test_the_noises_of_a_pair_come_again_in_turn(cached: CachedPairs) -> None:
    """Three epochs with two noises: the third is the first again, in another order and for other null users."""
    batch = batches(cached, draws(prompt=0.5, user=0.5, noises=2)).training(0, 3 * ROWS)
    assert batch.variants == (0,) * ROWS + (1,) * ROWS + (0,) * ROWS
    order = [torch.tensor(batch.rows[start : start + ROWS]).argsort() + start for start in range(0, 3 * ROWS, ROWS)]
    first, second, third = order
    assert batch.pooled is not None
    for drawn in (batch.noise, batch.timesteps, batch.text, batch.pooled):
        assert torch.equal(drawn[first], drawn[third])
        assert not torch.equal(drawn[first], drawn[second])
    assert all(not torch.equal(batch.noise[i], batch.noise[j]) for i, j in zip(first, second, strict=True))
    assert len({noise.numpy().tobytes() for noise in batch.noise}) == 2 * ROWS  # other pairs, other noises
    assert not torch.equal(batch.dropped[first], batch.dropped[third])
    assert batch.rows[:ROWS] != batch.rows[2 * ROWS :]

    fresh = batches(cached, draws()).training(0, 3 * ROWS)
    assert fresh.variants == ()
    assert len({noise.numpy().tobytes() for noise in fresh.noise}) == 3 * ROWS


def test_noises_that_come_again_have_the_stated_rates() -> None:
    found = [draws(prompt=0.3, user=0.1, noises=4).draw(i, (1, 1, 1), i % 1000, i // 1000) for i in range(4000)]
    both = sum(draw.prompt_dropped and draw.user_dropped for draw in found)
    assert deviations(sum(draw.prompt_dropped for draw in found), 4000, 0.3) < 4
    assert deviations(sum(draw.user_dropped for draw in found), 4000, 0.1) < 4
    assert deviations(both, 4000, 0.03) < 4
    assert deviations(sum(draw.timestep < 500 for draw in found), 4000, 0.5) < 4
    assert float(torch.stack([draw.noise for draw in found]).std()) == pytest.approx(1, abs=0.05)


def test_what_is_looked_at_has_noise_of_its_own_that_never_changes(cached: CachedPairs) -> None:
    source = batches(cached, draws(prompt=1.0, user=1.0))
    batch = source.fixed((3, 8), timestep=625)
    assert_equal(batches(cached, draws(prompt=1.0, user=1.0)).fixed((3, 8), 625), batch)
    assert_equal(joined([source.fixed((3,), 625), source.fixed((8,), 625)]), batch)
    assert torch.equal(source.fixed((3, 8), 125).noise, batch.noise)
    assert not torch.equal(batch.noise[0], batch.noise[1])
    assert batch.timesteps.tolist() == [625, 625]
    assert not batch.dropped.any()
    assert torch.equal(batch.text, torch.stack([cached.text(cached.row(i).caption).hidden for i in (3, 8)]))


def test_sdxl_time_ids_are_those_of_the_real_crop(cached: CachedPairs, data: Path, sdxl: Path) -> None:
    """Cut out by hand where the time ids say, the images give exactly the latents that are trained on."""
    batch = batches(cached, draws()).training(0, ROWS)
    vae = AutoencoderKL.from_pretrained(sdxl / "vae", local_files_only=True)
    assert batch.time_ids is not None
    places = set()
    for i, row in enumerate(batch.rows):
        width, height = TALL if row % 2 else WIDE
        assert batch.time_ids[i, :2].tolist() == [height, width]
        assert batch.time_ids[i, 4:].tolist() == [RESOLUTION, RESOLUTION]
        top, left = (int(number) for number in batch.time_ids[i, 2:4])
        assert (top == 0) if width > height else (left == 0)
        places.add((top, left))
        flipped = cached.row(row).crop.flipped
        for side, latents in (("chosen", batch.chosen), ("rejected", batch.rejected)):
            image = Image.open(data / f"{row:06d}_{side}.png")
            assert torch.allclose(latents[i], encoded(vae, image, top, left, flipped), atol=2e-4)
            assert not torch.allclose(latents[i], encoded(vae, image, top, left, not flipped), atol=2e-2)
    assert len(places) > ROWS // 2
    assert {cached.row(row).crop.flipped for row in range(ROWS)} == {True, False}


@torch.no_grad()
def encoded(vae: AutoencoderKL, image: Image.Image, top: int, left: int, flipped: bool) -> Tensor:
    scale = RESOLUTION / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
    pixels = np.asarray(ImageOps.mirror(image) if flipped else image)[top : top + RESOLUTION, left : left + RESOLUTION]
    images = torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    return vae.encode(images).latent_dist.mean[0] * vae.config.scaling_factor


USERS = tuple(f"{i % 20:07d}" for i in range(400))


def generators() -> Iterator[torch.Generator]:
    return (draws(seed=seed).generator("split", 0) for seed in range(5))


def test_unseen_users_and_held_out_pairs_are_not_trained_on() -> None:
    splits = [split_pairs(USERS, 0.1, 0.15, generator) for generator in generators()]
    for split in splits:
        assert sorted(split.train + split.seen + split.unseen) == list(range(400))
        unseen = {USERS[i] for i in split.unseen}
        assert len(unseen) == 3
        assert len(split.unseen) == 3 * 20
        assert unseen.isdisjoint(USERS[i] for i in split.train + split.seen)
        assert len(split.seen) == 34  # a tenth of what is left
    assert len({split.unseen for split in splits}) > 1
    assert len({split.seen for split in splits}) > 1


def test_the_split_depends_on_the_seed_and_the_users_alone() -> None:
    one, other = (split_pairs(USERS, 0.1, 0.15, draws(seed=3).generator("split", 0)) for _ in range(2))
    assert one == other


def test_a_share_of_zero_keeps_nothing_out_and_a_small_one_keeps_at_least_one() -> None:
    generator = draws().generator("split", 0)
    assert split_pairs(USERS, 0, 0, generator) == (tuple(range(400)), (), ())
    split = split_pairs(USERS, 1e-6, 1e-6, generator)
    assert len(split.seen) == 1
    assert len({USERS[i] for i in split.unseen}) == 1


@pytest.mark.parametrize(("held_out", "unseen"), [(0.0, 1.0), (1.0, 0.0), (0.02, 0.05)])
def test_nothing_left_to_train_on_is_an_error(held_out: float, unseen: float) -> None:
    users = ("0000001", "0000001") if held_out == 0.02 else USERS
    with pytest.raises(DataError, match=r"none is left to train on.*validation.unseen_users.*validation.held_out"):
        split_pairs(users, held_out, unseen, draws().generator("split", 0))
