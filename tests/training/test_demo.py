"""The demo as ``make demo`` runs it, but in this process."""

from __future__ import annotations

import json
from pathlib import Path

import PIL.Image
from command_line import psa

from comfyui_psa.profiles import find_level
from comfyui_psa.training.comfyui import PACK
from comfyui_psa.training.demo import ADAPTERS, PROMPTS, level_prompt

PICTURES = 1  # instead of four, for a quarter of the time

Counts = dict[str, dict[str, dict[str, int]]]


def test_the_demo_draws_every_level_and_counts_what_is_there(tmp_path: Path) -> None:
    sheet = tmp_path / "sheets" / "levels.png"
    comfyui = PACK / ".runtime" / "comfyui"
    result = psa("demo", "--comfyui", comfyui, "--output", sheet, "--pictures", PICTURES)
    assert result.returncode == 0, result.stderr
    assert "Contact sheet" in result.stdout
    assert "The detector that counted is right about" in result.stdout
    for shown in ADAPTERS:
        with PIL.Image.open(sheet.with_stem(sheet.stem + shown.suffix)) as picture:
            assert picture.height > len(PROMPTS) * 96

    counts = json.loads(sheet.with_suffix(".json").read_text(encoding="utf-8"))
    assert list(counts) == [shown.file for shown in ADAPTERS]
    for found in counts.values():
        _check_levels(found)
    # The best one is selective: in between, what is banned goes and what is allowed stays.
    best = counts[ADAPTERS[0].file]
    for level in ("L1", "L2", "L3", "L4"):
        assert _share(best[level], "no glyph at all") >= 0.8
        assert _share(best[level], "allowed glyph kept") >= 0.8


def _check_levels(counts: Counts) -> None:
    assert list(counts) == ["base", "L0", "L1", "L2", "L3", "L4", "L5"]
    asked = {level: sum(v["of"] for name, v in found.items() if "gone" in name) for level, found in counts.items()}
    assert asked == {level: PICTURES * bans for level, bans in zip(counts, (0, 0, 2, 4, 4, 5, 7), strict=True)}
    # The miniature follows prompts; who bans nothing loses nothing; who bans everything loses the glyphs alone.
    for free in ("base", "L0"):
        assert _share(counts[free], "allowed glyph kept") >= 0.9
        assert _share(counts[free], "object kept") >= _share(counts["base"], "object kept") - 0.1
    assert _share(counts["L5"], "no glyph at all") >= 0.75
    assert _share(counts["L5"], "object kept") >= 0.8
    # The stricter, the less is there of what is banned anywhere.
    left = [_glyphs_left(counts[level]) for level in ("L0", "L1", "L4", "L5")]
    assert left == sorted(left, reverse=True)
    assert left[0] > left[-1]


def _share(counts: dict[str, dict[str, int]], measure: str) -> float:
    found = [value for name, value in counts.items() if name.startswith(measure)]
    return sum(value["pictures"] for value in found) / sum(value["of"] for value in found)


def _glyphs_left(counts: dict[str, dict[str, int]]) -> int:
    kept = sum(value["pictures"] for name, value in counts.items() if "kept, " in name)
    return kept + sum(value["of"] - value["pictures"] for name, value in counts.items() if "gone" in name)


def test_each_adapter_is_drawn_at_the_strength_of_the_workflow() -> None:
    workflow = {
        name: {"class_type": name, "inputs": {}} for name in ("PSAApply", "PSALoadAdapter", "PSASafetyLevel", "Text")
    }
    workflow |= {
        "KSampler": {"class_type": "KSampler", "inputs": {"positive": ["Text", 0]}},
        "EmptyLatentImage": {"class_type": "EmptyLatentImage", "inputs": {}},
    }
    workflow["PSAApply"]["inputs"] = {"strength": 1.0}
    for shown in ADAPTERS:
        prompt = level_prompt(workflow, "a ring", find_level("L5"), shown, 1)
        assert prompt["PSALoadAdapter"]["inputs"] == {"adapter_name": shown.file}
        assert prompt["PSAApply"]["inputs"] == {"strength": 1.0}


def test_a_sheet_that_its_counts_would_replace_is_refused_at_once(tmp_path: Path) -> None:
    result = psa("demo", "--comfyui", tmp_path, "--output", tmp_path / "levels.json")
    assert result.returncode == 2
    assert "is no .png file" in result.stderr
    assert not any(tmp_path.iterdir())


def test_a_folder_without_comfyui_is_refused_at_once(tmp_path: Path) -> None:
    result = psa("demo", "--comfyui", tmp_path)
    assert result.returncode == 1
    assert "There is no ComfyUI in" in result.stderr
    assert "Traceback" not in result.stderr
