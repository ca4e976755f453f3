"""Image files to tensors: what a pair shares, where crops lie, and which files are refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from comfyui_psa.training.data.images import load_pair
from comfyui_psa.training.data.pairs import ImageSource, Pair
from comfyui_psa.training.errors import DataError

WIDE, TALL = (40, 32), (32, 40)


def pair_of(chosen: ImageSource, rejected: ImageSource, row: int = 0) -> Pair:
    return Pair(row, f"row {row + 1} of metadata.jsonl", "a caption", chosen, rejected, "0000001", {})


def coordinates(size: tuple[int, int], blue: int) -> np.ndarray:
    """Pixels that say where they are: red is the column, green the row."""
    width, height = size
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([columns, rows, np.full_like(rows, blue)], axis=-1).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def pixels_of(image: Tensor) -> np.ndarray:
    return ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def load_same(pixels: bytes) -> Tensor:
    """Load an image of 32 pixels as it is."""
    return load_pair(pair_of(pixels, pixels), 32, "center", flip=False, seed=0)[0]


@pytest.mark.parametrize("size", [WIDE, TALL])
def test_a_pair_shares_flip_and_crop(size: tuple[int, int]) -> None:
    chosen, rejected = encoded(coordinates(size, 0)), encoded(coordinates(size, 255))
    seen = set()
    for row in range(60):
        first, second, crop = load_pair(pair_of(chosen, rejected, row), 32, "random", flip=True, seed=3)
        top, left = crop.top_left
        mirrored = coordinates(size, 0)[:, ::-1] if crop.flipped else coordinates(size, 0)
        expected = mirrored[top : top + 32, left : left + 32]
        np.testing.assert_array_equal(pixels_of(first), expected)
        np.testing.assert_array_equal(pixels_of(second)[..., :2], expected[..., :2])
        assert set(np.unique(pixels_of(second)[..., 2])) == {255}
        assert crop.original_size == size[::-1]
        seen.add((crop.flipped, max(crop.top_left)))
    assert {flipped for flipped, _ in seen} == {False, True}
    assert {place for _, place in seen} == set(range(9))


def test_flip_and_crop_depend_on_seed_and_row_alone() -> None:
    one, other = encoded(coordinates(WIDE, 0)), encoded(coordinates((80, 64), 9))

    def draws(image: bytes, seed: int, flip: bool = True) -> list[tuple[bool, tuple[int, int]]]:
        pairs = [pair_of(image, image, row) for row in range(40)]
        crops = [load_pair(pair, 32, "random", flip, seed)[2] for pair in pairs]
        return [(crop.flipped, crop.top_left) for crop in crops]

    assert draws(one, 1) == draws(one, 1) == draws(other, 1)
    assert draws(one, 1) != draws(one, 2)
    assert [place for _, place in draws(one, 1)] == [place for _, place in draws(one, 1, flip=False)]
    assert not any(flipped for flipped, _ in draws(one, 1, flip=False))
    assert 10 < sum(flipped for flipped, _ in draws(one, 1)) < 30


def test_center_crop_is_in_the_middle() -> None:
    image = encoded(coordinates(WIDE, 0))
    found, _, crop = load_pair(pair_of(image, image), 32, "center", flip=False, seed=0)
    assert crop.top_left == (0, 4)
    np.testing.assert_array_equal(pixels_of(found), coordinates(WIDE, 0)[:, 4:36])


def test_images_of_different_shapes_share_the_relative_place() -> None:
    chosen, rejected = encoded(coordinates(WIDE, 0)), encoded(coordinates((96, 32), 0))
    for row in range(40):
        _, second, crop = load_pair(pair_of(chosen, rejected, row), 32, "random", flip=False, seed=0)
        _, left = crop.top_left
        # One of 9 places in the first, one of 65 in the second, at the same share.
        assert left * 65 // 9 <= pixels_of(second)[0, 0, 0] <= (left + 1) * 65 // 9


def test_the_short_side_is_resized_and_antialiased() -> None:
    stripes = np.zeros((96, 160, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    image = encoded(stripes)
    found, _, crop = load_pair(pair_of(image, image), 24, "center", flip=False, seed=0)
    assert found.shape == (3, 24, 24)
    assert crop.original_size == (96, 160)
    assert crop.top_left == (0, 8)  # 160 x 96 becomes 40 x 24
    assert float(found.abs().max()) < 0.1  # grey, where picking pixels would give black or white


def test_small_images_are_enlarged() -> None:
    image = encoded(np.full((5, 7, 3), 255, dtype=np.uint8))
    found, _, crop = load_pair(pair_of(image, image), 16, "center", flip=False, seed=0)
    assert torch.equal(found, torch.ones(3, 16, 16))
    assert crop.original_size == (5, 7)


def test_values_span_minus_one_to_one() -> None:
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[16:] = 255
    found = load_same(encoded(pixels))
    assert torch.equal(found[:, :16], -torch.ones(3, 16, 32))
    assert torch.equal(found[:, 16:], torch.ones(3, 16, 32))


def test_exif_turns_images_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    image = encoded(coordinates(WIDE, 0), exif=exif)
    found, _, crop = load_pair(pair_of(image, image), 32, "center", flip=False, seed=0)
    upright = np.rot90(coordinates(WIDE, 0), k=-1)
    assert crop.original_size == (40, 32)
    np.testing.assert_array_equal(pixels_of(found), upright[4:36])


def test_transparent_images_lie_on_white() -> None:
    pixels = np.zeros((32, 32, 4), dtype=np.uint8)
    pixels[..., 3] = np.arange(32) * 8
    found = pixels_of(load_same(encoded(pixels)))
    np.testing.assert_allclose(found[0, :, 0], 255 - np.arange(32) * 8, atol=1)


def test_palettes_and_greys_become_rgb() -> None:
    grey = np.arange(1024, dtype=np.uint32).reshape(32, 32)
    eight, sixteen = (grey // 4).astype(np.uint8), (grey // 4 * 257).astype(np.uint16)
    for pixels in (eight, sixteen):
        found = pixels_of(load_same(encoded(pixels)))
        np.testing.assert_array_equal(found, eight[..., None].repeat(3, axis=-1))
    file = io.BytesIO()
    Image.fromarray(eight).convert("P").save(file, "PNG", transparency=0)
    found = pixels_of(load_same(file.getvalue()))
    np.testing.assert_array_equal(found[..., 1], np.where(eight == 0, 255, eight))


def test_files_and_bytes_give_the_same(tmp_path: Path) -> None:
    content = encoded(coordinates(WIDE, 7))
    path = tmp_path / "image.png"
    path.write_bytes(content)
    from_bytes = load_pair(pair_of(content, content), 16, "random", flip=True, seed=1)
    from_files = load_pair(pair_of(path, path), 16, "random", flip=True, seed=1)
    assert torch.equal(from_bytes[0], from_files[0])
    assert from_bytes[2] == from_files[2]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, kind: str) -> None:
    whole, path = encoded(coordinates(WIDE, 0), kind), tmp_path / "cut.png"
    other = encoded(coordinates(WIDE, 0))
    for length in range(0, len(whole) // 2, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"^row 5 of metadata\.jsonl: .*cut\.png cannot be read"):
            load_pair(pair_of(other, path, 4), 16, "center", flip=False, seed=0)


def test_other_files_missing_files_and_unknown_pixels_are_named(tmp_path: Path) -> None:
    good = encoded(coordinates(WIDE, 0))
    with pytest.raises(DataError, match=r"^row 1 of .*no image file .*gone\.png"):
        load_pair(pair_of(tmp_path / "gone.png", good), 16, "center", flip=False, seed=0)
    with pytest.raises(DataError, match=r"^row 1 of metadata\.jsonl: the rejected image cannot be read"):
        load_pair(pair_of(good, b"no image"), 16, "center", flip=False, seed=0)
    with pytest.raises(DataError, match=r"cannot be read"):
        load_pair(pair_of(tmp_path, good), 16, "center", flip=False, seed=0)
    floating = encoded(np.zeros((32, 32), dtype=np.float32), "TIFF")
    with pytest.raises(DataError, match=r"32-bit numbers.* expected 8 or 16 bits"):
        load_pair(pair_of(floating, good), 16, "center", flip=False, seed=0)


def test_an_image_of_unreasonable_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    image = encoded(coordinates(WIDE, 0))
    with pytest.raises(DataError, match="decompression bomb"):
        load_pair(pair_of(image, image), 16, "center", flip=False, seed=0)
