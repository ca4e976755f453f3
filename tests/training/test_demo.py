"""The demo as ``make demo`` runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import PIL.Image

from comfyui_psa.training.comfyui import PACK


def test_the_demo_draws_every_level_on_one_sheet(tmp_path: Path) -> None:
    sheet = tmp_path / "sheets" / "levels.png"
    command = (sys.executable, "-m", "comfyui_psa.training", "demo")
    options = ("--comfyui", PACK / ".runtime" / "comfyui", "--output", sheet)
    result = subprocess.run((*command, *options), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Contact sheet" in result.stdout
    picture = PIL.Image.open(sheet).convert("RGB")
    tiles = {picture.crop((x, y, x + 256, y + 256)).tobytes() for x in (16, 288, 560) for y in (16, 354)}
    assert len(tiles) == 6
    assert all(len(set(tile)) > 50 for tile in tiles)


def test_a_folder_without_comfyui_is_refused_at_once(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "comfyui_psa.training", "demo", "--comfyui", tmp_path)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "There is no ComfyUI in" in result.stderr
    assert "Traceback" not in result.stderr
