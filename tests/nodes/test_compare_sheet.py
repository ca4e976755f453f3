"""Compare Sheet as ComfyUI calls it: where pictures and labels are, what it refuses, and what it saves."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import PIL.Image
import pytest
import torch
from comfy.cli_args import args
from comfy_api.latest import io as comfy_io
from PIL import ImageFont
from schemas import NODES
from studio import COMFYUI
from torch import Tensor

from comfyui_psa.nodes import typefaces
from comfyui_psa.nodes.contact_sheet import SheetError
from comfyui_psa.training.comfyui import ComfyUIServer, Prompt, prepare_base
from comfyui_psa.training.lettering import font

HEIGHT, WIDTH = 160, 208
COLUMNS, ROWS = "Person 1\nPerson 2\nLevel 5", "a harbour at dawn\na fight in an alley"
LONG = "a very long label that says far more than anybody would want to read, " * 12
SCRIPTS = (
    "Ältere Dame, 12 €",
    "Лена и Οδυσσέας",
    "شخص",
    "אדם",
    "家族 ファミリー 가족",
    "क्षेत्र ไทย",
    "👩‍👧 ok",
    "a\x00\ud800\uffff",
)


@pytest.fixture(autouse=True)
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def node() -> Any:
    return NODES["PSACompareSheet"]


def pictures(count: int, height: int = HEIGHT, width: int = WIDTH, channels: int = 3) -> Tensor:
    """Noise: no place of one looks like another."""
    return torch.rand((count, height, width, channels), generator=torch.Generator().manual_seed(0))


def sheet_of(node: Any, images: Tensor, columns: str = COLUMNS, rows: str = ROWS) -> Tensor:
    (sheet,) = node.execute(images, columns, rows, "psa/compare").args
    assert sheet.shape[0] == 1
    return sheet[0]


def places(sheet: Tensor, images: Tensor) -> list[tuple[int, int]]:
    """The upper left corner of each picture, of which all pixels are there."""
    height, width = images.shape[1:3]
    found = []
    for image in images:
        ((y, x),) = (sheet == image[0, 0]).all(dim=-1).nonzero().tolist()
        assert torch.equal(sheet[y : y + height, x : x + width], image)
        found.append((y, x))
    return found


def is_paper(sheet: Tensor) -> Tensor:
    return (sheet == sheet[0, 0]).all(dim=-1)


def edges(sheet: Tensor) -> tuple[int, int, int, int]:
    """How much paper there is around everything: left, top, right, bottom."""
    drawn = ~is_paper(sheet)
    down, across = drawn.any(dim=1).nonzero().flatten(), drawn.any(dim=0).nonzero().flatten()
    height, width = drawn.shape
    return int(across[0]), int(down[0]), width - 1 - int(across[-1]), height - 1 - int(down[-1])


def test_every_picture_is_unchanged_in_its_row_and_column(node: Any) -> None:
    images = pictures(6)
    sheet = sheet_of(node, images)
    found = places(sheet, images)
    tops, lefts = sorted({y for y, _ in found}), sorted({x for _, x in found})
    assert found == [(y, x) for y in tops for x in lefts]
    assert (len(tops), len(lefts)) == (2, 3)
    (gap_across,) = {second - first - WIDTH for first, second in pairwise(lefts)}
    (gap_down,) = {second - first - HEIGHT for first, second in pairwise(tops)}
    assert gap_across == gap_down > 0


def test_the_paper_is_light_and_its_margins_are_even(node: Any) -> None:
    sheet = sheet_of(node, pictures(6))
    assert float(sheet[0, 0].min()) > 0.9
    left, top, right, bottom = edges(sheet)
    assert right == bottom > 10
    assert 0 <= left - right <= 3  # a letter has some air of its own
    assert 0 <= top - right <= 12  # as has the line that it stands in


def test_labels_change_pixels_outside_the_pictures_alone(node: Any) -> None:
    images = pictures(6)
    one, other = sheet_of(node, images), sheet_of(node, images, columns=COLUMNS.replace("Person 2", "Person 3"))
    assert one.shape == other.shape
    changed = (one != other).any(dim=-1).nonzero()
    assert len(changed) > 0
    y, x = places(one, images)[1]
    assert int(changed[:, 0].max()) < y
    assert x <= int(changed[:, 1].min()) < int(changed[:, 1].max()) < x + WIDTH
    assert places(other, images) == places(one, images)


def test_a_label_is_above_its_column_or_left_of_its_row(node: Any) -> None:
    images = pictures(6)
    ink = ~is_paper(sheet_of(node, images))
    found = places(sheet_of(node, images), images)
    for column in range(3):
        y, x = found[column]
        across = ink[:y, x : x + WIDTH].any(dim=0).nonzero().flatten()
        assert int(across[0] + across[-1]) == pytest.approx(WIDTH, abs=4), "in the middle"
    for row in range(2):
        y, x = found[3 * row]
        down = ink[y : y + HEIGHT, :x].any(dim=1).nonzero().flatten()
        assert int(down[0] + down[-1]) == pytest.approx(HEIGHT, abs=8), "in the middle"


def test_one_row_needs_no_label_and_empty_lines_are_none(node: Any) -> None:
    images = pictures(2)
    sheet = sheet_of(node, images, "\n Person 1 \n\nPerson 2\r\n", " \n")
    assert torch.equal(sheet, sheet_of(node, images, "Person 1\nPerson 2", ""))
    ((y, x), (other, _)) = places(sheet, images)
    assert y == other
    assert edges(sheet)[0] == edges(sheet)[2] == x


def test_type_grows_with_the_pictures(node: Any) -> None:
    def height_of_type(scale: int) -> int:
        images = pictures(1, 256 * scale, 256 * scale)
        sheet = sheet_of(node, images, "H", "")
        ((y, _),) = places(sheet, images)
        return int((~is_paper(sheet))[:y].any(dim=1).sum())

    assert height_of_type(1) >= 10
    assert height_of_type(4) == pytest.approx(4 * height_of_type(1), abs=4)


@pytest.mark.parametrize("size", [(8, 8), (64, 96), (96, 24), (24, 400), (256, 256)])
def test_long_labels_stay_in_their_place(node: Any, size: tuple[int, int]) -> None:
    images = pictures(4, *size)
    sheet = sheet_of(node, images, f"{LONG}\n{'m' * 200}", f"{LONG}\n{LONG}")
    ink, found = ~is_paper(sheet), places(sheet, images)
    height, width = size
    assert min(edges(sheet)) >= 12, "the margin"
    middle = (found[0][1] + width + found[1][1]) // 2
    assert not ink[:, middle - 1 : middle + 2].any(), "between the columns"
    middle = (found[0][0] + height + found[2][0]) // 2
    assert not ink[middle - 1 : middle + 1].any(), "between the rows"
    y, x = found[0]
    assert not ink[y : y + height, x - 4 : x].any(), "between labels and pictures"
    assert not ink[y - 2 : y, x:].any(), "between labels and pictures"


def test_what_is_cut_ends_with_a_sign(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    draw = PIL.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        PIL.ImageDraw.ImageDraw, "text", lambda self, *args, **kw: (drawn.append(args[1]), draw(self, *args, **kw))
    )
    sheet_of(node, pictures(2), f"{LONG}\nPerson 2", "")
    *rest, last, other = drawn
    assert last.endswith("…")
    assert LONG.startswith(" ".join([*rest, last[:-1]]))
    assert other == "Person 2"

    drawn.clear()
    sheet_of(node, pictures(2), "Person 1\nPerson 2", "somewhat longer than one line of this little sheet")
    assert drawn[:2] == ["Person 1", "Person 2"]
    assert len(drawn) > 3
    assert " ".join(drawn[2:]) == "somewhat longer than one line of this little sheet"


@pytest.mark.parametrize("label", SCRIPTS)
def test_any_script_can_be_written(node: Any, label: str) -> None:
    images = pictures(2)
    sheet = sheet_of(node, images, f"Person 1\n{label}", label)
    ((y, x), (_, other)) = places(sheet, images)
    ink = ~is_paper(sheet)
    assert ink[:y, other:].any()
    assert ink[y:, :x].any()


def test_letters_that_pillows_font_lacks_come_from_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a font that has them: one font for all labels, and for a label alone where that must be."""
    fonts = (ImageFont.load_default(16), font(16))
    monkeypatch.setattr(typefaces, "_fonts", lambda: fonts)
    own, other = (found.getname() for found in fonts)
    assert own != other

    def names(*texts: str) -> list[tuple[str | None, str | None]]:
        return [found.getname() for found in typefaces.fonts_for(texts)]

    assert names("Person 1", "Person 2") == [own, own]
    assert names("Person 1", "Ältere Dame") == [other, other]


def test_a_machine_without_fonts_draws_boxes(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    only = ImageFont.load_default(16)
    assert isinstance(only, ImageFont.FreeTypeFont)
    monkeypatch.setattr(typefaces, "_fonts", lambda: (only,))
    images = pictures(1)
    sheet = sheet_of(node, images, "Лена", "")
    assert not is_paper(sheet)[: places(sheet, images)[0][0]].all()


def test_transparent_pictures_stay_transparent_on_opaque_paper(node: Any) -> None:
    images = pictures(2, channels=4)
    sheet = sheet_of(node, images, "Person 1\nPerson 2", "")
    places(sheet, images)
    assert sheet[0, 0].tolist() == [*sheet[0, 0, :3].tolist(), 1.0]


@pytest.mark.parametrize(
    ("count", "rows", "message"),
    [
        (5, ROWS, "got 5 images for 3 x 2 places .*Connect 6 images, row by row"),
        (7, ROWS, "got 7 images for 3 x 2 places"),
        (6, "", "got 6 images for 3 x 1 places .*without a label there it is one row.*Connect 3"),
    ],
)
def test_other_numbers_of_images_are_refused(node: Any, output: Path, count: int, rows: str, message: str) -> None:
    with pytest.raises(SheetError, match=message):
        sheet_of(node, pictures(count), rows=rows)
    assert not list(output.iterdir())


def test_a_sheet_without_columns_is_refused_before_it_runs(node: Any) -> None:
    assert node.validate_inputs(columns=COLUMNS) is True
    assert node.validate_inputs(columns=None) is True  # linked
    assert "one a line" in node.validate_inputs(columns=" \n")
    with pytest.raises(SheetError, match="no label in `columns`"):
        sheet_of(node, pictures(2), "\n")


@pytest.mark.parametrize("disabled", [False, True])
def test_it_is_saved_as_comfyui_saves_images(
    node: Any, output: Path, monkeypatch: pytest.MonkeyPatch, disabled: bool
) -> None:
    monkeypatch.setattr(args, "disable_metadata", disabled)
    prompt, workflow = {"1": {"class_type": "PSACompareSheet"}}, {"nodes": [{"id": 1}]}
    hidden = {comfy_io.Hidden.prompt: prompt, comfy_io.Hidden.extra_pnginfo: {"workflow": workflow}}
    images, called = pictures(6), node.PREPARE_CLASS_CLONE(hidden)
    first, second = (called.execute(images, COLUMNS, ROWS, "evening/sheet") for _ in range(2))
    shown = [dict(entry) for result in (first, second) for entry in result.ui.as_dict()["images"]]
    names = ["sheet_00001_.png", "sheet_00002_.png"]
    assert shown == [{"filename": name, "subfolder": "evening", "type": "output"} for name in names]
    saved = PIL.Image.open(output / "evening" / names[0])
    assert np.array_equal(np.asarray(saved), (first.args[0][0] * 255).byte().numpy())
    expected = {} if disabled else {"prompt": json.dumps(prompt), "workflow": json.dumps(workflow)}
    assert getattr(saved, "text", {}) == expected


def test_a_server_draws_and_saves_it(tmp_path: Path) -> None:
    """Two prompts, two people: colours instead of models."""

    def colour(value: int) -> dict[str, Any]:
        return {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 2, "color": value}}

    both = {"class_type": "ImageBatch", "inputs": {"image1": ["1", 0], "image2": ["2", 0]}}
    labels = {"columns": "Person 1\nPerson 2", "rows": "red\nblue", "filename_prefix": "psa/compare"}
    sheet = {"class_type": "PSACompareSheet", "inputs": {"images": ["3", 0], **labels}}
    prompt: Prompt = {"1": colour(0xFF0000), "2": colour(0x0000FF), "3": both, "4": sheet}
    prompt["5"] = {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}}
    with ComfyUIServer(COMFYUI, prepare_base(tmp_path)) as server:
        saved, preview = server.run(prompt, {"nodes": []})
    assert (tmp_path / "output" / "psa" / saved.name).read_bytes() == saved.content
    picture, handed_on = (PIL.Image.open(io.BytesIO(image.content)) for image in (saved, preview))
    assert np.array_equal(np.asarray(picture), np.asarray(handed_on))
    assert json.loads(picture.info["prompt"])["4"]["inputs"]["columns"] == "Person 1\nPerson 2"
    assert json.loads(picture.info["workflow"]) == {"nodes": []}
    pixels = np.asarray(picture).reshape(-1, 3)
    for wanted in ((255, 0, 0), (0, 0, 255)):
        assert int((pixels == wanted).all(axis=1).sum()) == 2 * 64 * 64
