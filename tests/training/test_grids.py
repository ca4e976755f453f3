"""Image grids: against diffusers' own pipelines, and what the layout promises."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import write_sd_pipeline, write_sdxl_pipeline
from torch import Tensor, nn

from comfyui_psa.adapter import AdapterConfig, EncoderSpec, PSAAdapter, SiteVectors, UserEffect, find_sites
from comfyui_psa.training.base import BaseModel, ImageCoder, TextEmbedding, open_base
from comfyui_psa.training.config import ValidationSection
from comfyui_psa.training.dpo.grids import draw_grid
from comfyui_psa.training.dpo.policy import Policy

CPU = torch.device("cpu")
RESOLUTION = 64
SETTINGS = ValidationSection(grid_steps=3, grid_guidance_scale=4.0)
CAPTIONS = ("a harbour at dawn", "a crowd in the street")


class Scene:
    """A tiny base model with its UNet, the texts of the captions, and users."""

    def __init__(self, folder: Path, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.base: BaseModel = open_base(folder)
        self.unet = self.base.unet(torch.float32)
        self.texts: dict[str, TextEmbedding] = dict(
            zip(("", *CAPTIONS), self.base.text_encoder(CPU).encode(("", *CAPTIONS)), strict=True)
        )
        self.sites = find_sites(self.unet)
        config = AdapterConfig(
            hidden_sizes=tuple(site.hidden_size for site in self.sites),
            cross_attention_dim=self.sites[0].cross_attention_dim,
            embedding_dim=6,
            encoder=EncoderSpec(kind="attributes", name="attributes-1"),
        )
        self.policy = Policy(self.unet, self.base.noise_scheduler(), PSAAdapter(config))

    def user(self, seed: int, null: bool = True) -> UserEffect:
        generator = torch.Generator().manual_seed(seed)
        sizes = [site.hidden_size for site in self.sites]
        user = tuple(torch.randn((1, size), generator=generator) for size in sizes)
        nulls = tuple(torch.randn(size, generator=generator) for size in sizes) if null else None
        return UserEffect(SiteVectors(user, nulls), None, None)

    def grid(self, columns: dict[str, UserEffect | None], captions: tuple[str, ...] = CAPTIONS, **changed: Any) -> Any:
        options: dict[str, Any] = {"config": SETTINGS, "device": CPU, "seed": 7, "resolution": RESOLUTION}
        return draw_grid(self.base, self.policy, columns, captions, self.texts, **options | changed)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("sd")
    return Scene(folder, write_sd_pipeline(folder))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("sdxl")
    return Scene(folder, write_sdxl_pipeline(folder))


def tiles(sheet: Image.Image, rows: int, columns: int) -> np.ndarray:
    """Cut ``[rows, columns, 64, 64, 3]`` out of a sheet, whose right and lower margins are 20, and gaps 10, pixels.

    Pictures of 64 pixels are drawn three times as large.
    """
    side = 3 * RESOLUTION
    pixels = np.asarray(sheet)
    left, top = sheet.width - 20 - columns * (side + 10) + 10, sheet.height - 20 - rows * (side + 10) + 10
    cut = [
        [pixels[top + r * (side + 10) :, left + c * (side + 10) :][:side, :side] for c in range(columns)]
        for r in range(rows)
    ]
    return np.array(cut)[:, :, ::3, ::3]


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a == b).all())


def by_diffusers(scene: Scene, caption: str, noise: Tensor) -> np.ndarray:
    """The picture as diffusers' own pipeline draws it, bytes ``[64, 64, 3]``."""
    scene.pipeline.scheduler = scene.base.sampler()
    scene.pipeline.set_progress_bar_config(disable=True)
    result = scene.pipeline(
        caption,
        negative_prompt="",
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=SETTINGS.grid_steps,
        guidance_scale=SETTINGS.grid_guidance_scale,
        latents=noise,
        output_type="np",
    )
    return (result.images[0] * 255).round()


def noises(rows: int, seed: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((1, 4, 8, 8), generator=generator) for _ in range(rows)]


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_base_column_is_what_diffusers_draws(family: str, request: pytest.FixtureRequest) -> None:
    scene: Scene = request.getfixturevalue(family)
    found = tiles(scene.grid({"base": None}), rows=2, columns=1)
    for row, (caption, noise) in enumerate(zip(CAPTIONS, noises(2), strict=True)):
        expected = by_diffusers(scene, caption, noise)
        assert np.abs(found[row, 0] - expected).max() <= 1  # rounding to bytes
        assert expected.std() > 5


@pytest.mark.parametrize("null", [True, False])
def test_user_reaches_the_conditional_half_and_the_null_user_the_other(sd: Scene, null: bool) -> None:
    """The reference adds the vectors to what goes into ``to_out`` by itself, in diffusers' pipeline."""
    effect = sd.user(1, null)
    user = effect.constant
    assert user is not None
    found = tiles(sd.grid({"user": effect}), rows=2, columns=1)

    def adding(index: int) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        def hook(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            hidden = args[0].clone()
            if user.null is not None:
                hidden[0] += user.null[index]
            hidden[1] += user.user[index][0]
            return (hidden,)

        return hook

    modules = [sd.pipeline.unet.get_submodule(f"{site.path}.to_out.0") for site in sd.sites]
    handles = [module.register_forward_pre_hook(adding(i)) for i, module in enumerate(modules)]
    try:
        expected = by_diffusers(sd, CAPTIONS[1], noises(2)[1])
    finally:
        for handle in handles:
            handle.remove()
    assert np.abs(found[1, 0] - expected).max() <= 1
    assert not same(found, tiles(sd.grid({"base": None}), rows=2, columns=1))


def test_columns_of_a_row_share_their_noise_and_rows_do_not(sd: Scene) -> None:
    zeros = tuple(torch.zeros(1, site.hidden_size) for site in sd.sites)
    nobody = UserEffect(SiteVectors(zeros, None), None, None)
    grid = tiles(sd.grid({"base": None, "nobody": nobody, "again": None}, (CAPTIONS[0],) * 2), rows=2, columns=3)
    assert same(grid[:, 0], grid[:, 1])
    assert same(grid[:, 0], grid[:, 2])
    assert not same(grid[0], grid[1])


def test_grid_depends_on_the_seed_and_on_nothing_else(sd: Scene) -> None:
    columns = {"base": None, "L1": sd.user(1)}
    before = torch.get_rng_state()
    first = sd.grid(columns)
    assert torch.equal(torch.get_rng_state(), before)  # training goes on as without a grid
    torch.manual_seed(99)
    assert sd.grid(columns).tobytes() == first.tobytes()
    assert sd.grid(columns, seed=8).tobytes() != first.tobytes()
    fewer = sd.grid(columns, CAPTIONS[:1])
    assert same(tiles(fewer, 1, 2)[0], tiles(first, 2, 2)[0])


def test_unet_is_left_as_it_was_and_the_vae_is_dropped(sd: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    coders: list[weakref.ref[ImageCoder]] = []
    load = sd.base.vae

    def vae(device: torch.device) -> ImageCoder:
        coder = load(device)
        coders.append(weakref.ref(coder))
        return coder

    monkeypatch.setattr(sd.base, "vae", vae)
    latents, text = torch.randn(1, 4, 8, 8), sd.texts[""].hidden[None]
    before = sd.unet(latents, 10, text).sample
    sd.grid({"base": None, "L1": sd.user(1)})
    after = sd.unet(latents, 10, text).sample
    assert torch.equal(before, after)
    assert not after.requires_grad
    assert not sd.unet.training
    gc.collect()
    assert [coder() for coder in coders] == [None]


def test_half_precision_unet(sd: Scene) -> None:
    unet = sd.base.unet(torch.bfloat16)
    adapter = PSAAdapter(
        AdapterConfig(
            hidden_sizes=tuple(site.hidden_size for site in sd.sites),
            cross_attention_dim=24,
            embedding_dim=6,
            encoder=EncoderSpec(kind="attributes", name="attributes-1"),
        )
    )
    policy = Policy(unet, sd.base.noise_scheduler(), adapter)
    columns = {"base": None, "L1": sd.user(1)}
    half = draw_grid(sd.base, policy, columns, CAPTIONS, sd.texts, SETTINGS, CPU, 7, RESOLUTION)
    difference = np.abs(tiles(half, 2, 2).astype(float) - tiles(sd.grid(columns), 2, 2))
    assert 0 < difference.mean() < 12


def test_layout_has_room_for_long_labels_and_prompts(sd: Scene) -> None:
    """Labels and prompts are cut rather than drawn over a picture or over the edge."""
    long = "an extraordinarily long description of a harbour without any end " * 12
    sd.texts[long] = sd.texts[CAPTIONS[0]]
    sheet = sd.grid({"base": None, "L" + "o" * 80: None}, (CAPTIONS[0], long))
    plain = sd.grid({"base": None, "b": None}, (CAPTIONS[0], CAPTIONS[0]))
    assert same(tiles(sheet, 2, 2)[0], tiles(plain, 2, 2)[0])
    pixels = np.asarray(sheet)
    assert sheet.width == 20 + 200 + 10 + 2 * (192 + 10) - 10 + 20
    for edge in (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:], pixels[:, 222:228]):
        assert (edge == 255).all()
    assert (pixels[:, 20:220] < 128).any()


def test_large_pictures_are_shrunk(sd: Scene) -> None:
    sheet = sd.grid({"base": None}, CAPTIONS[:1], resolution=512, config=ValidationSection(grid_steps=1))
    assert sheet.width == 20 + 200 + 10 + 384 + 20
