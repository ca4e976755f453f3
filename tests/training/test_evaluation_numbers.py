"""From single pictures to means, intervals and curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from evaluation_testing import (
    PROGRAMMATIC,
    assessed,
    cell,
    draw_picture,
    reasons,
    row,
    small_evaluation,
    write_evaluation,
)
from scipy.stats import binomtest, kendalltau

from comfyui_psa.profiles import CATEGORIES
from comfyui_psa.training.evaluation.gallery import Shown
from comfyui_psa.training.evaluation.tables import Cell, Table, tabulate


def shown(label: str = "PSA", **changes: Any) -> Shown:
    picture = row("x.png", label, **{"category": "Hate", "content": "named", "banned": ("Hate",), **changes})
    return Shown(picture, Path("x.png"), label, None)


def means(table: Table, **where: Any) -> dict[tuple[str, str], float]:
    return {
        (one.people, one.asked): share.value
        for one, share in table.items()
        if all(getattr(one, name) == value for name, value in where.items())
    }


def test_pictures_count_in_the_cells_of_their_people_and_of_everyone() -> None:
    everything, nothing = tuple(CATEGORIES), ()
    pictures = [
        shown(prompt_id="1"),
        shown(prompt_id="2", content="implied"),
        shown(prompt_id="3", banned=nothing, user="n"),
        shown(prompt_id="4", banned=everything, user="e", category="harmless", content=None),
        shown(prompt_id="5", level="L3", user="L3", banned=("Shocking",), seen=None),
    ]
    table = tabulate(pictures, [1.0, 0.0, 1.0, 0.0, None], proportions=True)
    assert means(table, seen="unseen") == {
        ("bans some", "banned, named"): 1,
        ("bans some", "banned, implied"): 0,
        ("bans some", "banned"): 0.5,
        ("bans some", "sensitive"): 0.5,
        ("bans some", "all"): 0.5,
        ("bans nothing", "allowed, named"): 1,
        ("bans nothing", "allowed"): 1,
        ("bans nothing", "sensitive"): 1,
        ("bans nothing", "all"): 1,
        ("bans everything", "harmless"): 0,
        ("bans everything", "all"): 0,
        ("everyone", "banned, named"): 1,
        ("everyone", "banned, implied"): 0,
        ("everyone", "banned"): 0.5,
        ("everyone", "allowed, named"): 1,
        ("everyone", "allowed"): 1,
        ("everyone", "sensitive"): 2 / 3,
        ("everyone", "harmless"): 0,
        ("everyone", "all"): 0.5,
    }
    # A value of None is nowhere, not even in a count.
    assert means(table, seen="") == {}


def test_runs_are_apart_and_together() -> None:
    pictures = [shown(run=run, prompt_id=str(number)) for run in range(2) for number in range(10)]
    table = tabulate(pictures, [1.0] * 10 + [0.0, 1.0] * 5, proportions=True)
    together = table[Cell("PSA", "everyone", "unseen", "all")]
    assert (together.value, together.runs, together.pictures) == (0.75, (1.0, 0.5), 20)
    assert [table[Cell("PSA", "everyone", "unseen", "all", run)].value for run in range(2)] == [1.0, 0.5]


def width(pictures: Sequence[Shown], values: Sequence[float]) -> float:
    share = tabulate(pictures, values, proportions=True)[Cell("PSA", "everyone", "unseen", "all")]
    return share.high - share.low


def test_shared_prompts_and_shared_sets_of_bans_make_intervals_wider() -> None:
    sets = [(a, b) for a in CATEGORIES for b in CATEGORIES if a < b][:20]
    by_prompt = [number % 20 < 10 for number in range(200)]
    own = [shown(prompt_id=str(number), banned=("Hate",)) for number in range(200)]
    prompts = [shown(prompt_id=str(number % 20), banned=("Hate",), user=str(number)) for number in range(200)]
    bans = [shown(prompt_id=str(number), banned=sets[number % 20], user=str(number)) for number in range(200)]
    assert width(prompts, by_prompt) > 2 * width(own, by_prompt)
    assert width(bans, by_prompt) > 2 * width(own, by_prompt)
    # Few sets cannot be drawn again: their prompts are.
    few = [shown(prompt_id=str(number), banned=sets[number % 5], user=str(number)) for number in range(200)]
    assert width(few, by_prompt) == pytest.approx(width(own, by_prompt))


def test_an_interval_is_never_nothing_where_all_prompts_are_alike() -> None:
    half = [shown(prompt_id=str(number // 2)) for number in range(20)]
    share = tabulate(half, [0.0, 1.0] * 10, proportions=True)[Cell("PSA", "everyone", "unseen", "all")]
    wilson = binomtest(5, 10).proportion_ci(method="wilson")
    assert (share.value, share.low, share.high) == (0.5, pytest.approx(wilson.low), pytest.approx(wilson.high))
    for value in (0, 1):
        exact = binomtest(10 * value, 10).proportion_ci()
        share = tabulate(half, [float(value)] * 20, proportions=True)[Cell("PSA", "everyone", "unseen", "all")]
        assert (share.low, share.high) == (pytest.approx(exact.low), pytest.approx(exact.high))


def strengths_evaluation(folder: Path) -> Path:
    """PSA at three strengths: of ten banned signs the base has all, then 8, 2 and 0; of the objects 10, 10, 8, 4."""
    rows = []
    for method, strength, signs, things in (
        ("base", 1.0, 10, 10),
        ("PSA", 0.5, 8, 10),
        ("PSA", 1.0, 2, 8),
        ("PSA", 2.0, 0, 4),
    ):
        for number in range(10):
            image = f"{method}-{strength}-{number}.png"
            draw_picture(
                folder / image,
                ("Violence",) if number < signs else (),
                "house" if number < things else "tree",
                seed=number,
            )
            rows.append(
                row(
                    image,
                    method,
                    strength=strength,
                    banned=("Violence",),
                    category="Violence",
                    content="named",
                    prompt_id=str(number),
                    adapter="PSA 1" if method == "PSA" else None,
                )
            )
    return write_evaluation(folder, rows)


def test_a_curve_over_strength_begins_with_the_base(tmp_path: Path) -> None:
    results = assessed(strengths_evaluation(tmp_path), judges=[PROGRAMMATIC])
    (curve,) = [one for one in results["calibration"] if one["quality"] == "expected objects there"]
    assert (curve["method"], curve["over"]) == ("PSA", "strength")
    assert [(point["name"], point["safety"], point["quality"]) for point in curve["points"]] == [
        ("0 (base)", pytest.approx(0), 1),
        ("0.5", pytest.approx(0.2), 1),
        ("1", pytest.approx(0.8), 0.8),
        ("2", pytest.approx(1), 0.4),
    ]
    area = 0.2 * 1 + 0.6 * 0.9 + 0.2 * 0.6
    assert curve["area"]["value"] == pytest.approx(area)
    assert curve["mean_quality"]["value"] == pytest.approx(area)
    assert curve["area"]["low"] < area < curve["area"]["high"]
    assert curve["monotonicity"]["value"] == pytest.approx(1)
    assert curve["violations"] == 0
    # One name in the manifest, a column for each strength in the report.
    assert list(results["methods"]) == ["base", "PSA, strength 0.5", "PSA, strength 1", "PSA, strength 2"]


def test_the_base_is_like_itself(tmp_path: Path) -> None:
    rows = []
    for method, strength in (("base", 1.0), ("PSA", 0.5), ("PSA", 1.0)):
        for number, category in enumerate(("Hate", "harmless")):
            image = f"{method}-{strength}-{number}.png"
            draw_picture(
                tmp_path / image, ("Hate",) if method == "base" and category == "Hate" else (), seed=int(2 * strength)
            )
            rows.append(
                row(
                    image,
                    method,
                    strength=strength,
                    banned=("Hate",),
                    category=category,
                    prompt_id=str(number),
                    adapter="PSA 1" if method == "PSA" else None,
                )
            )
    results = assessed(write_evaluation(tmp_path, rows), judges=[PROGRAMMATIC])
    (curve,) = [one for one in results["calibration"] if one["quality"] == "SSIM to the base"]
    assert [point["name"] for point in curve["points"]] == ["0 (base)", "0.5", "1"]
    # Strength 1 was drawn with the base's scene, strength 0.5 with another one.
    assert curve["points"][0]["quality"] == 1
    assert curve["points"][1]["quality"] < 0.95
    assert curve["points"][2]["quality"] == pytest.approx(1, abs=1e-3)


def test_steps_that_are_less_safe_are_counted(tmp_path: Path) -> None:
    rows = []
    for level, safe in {"L0": 0, "L1": 6, "L2": 4, "L5": 9}.items():
        for number in range(10):
            draw_picture(tmp_path / f"{level}-{number}.png", () if number < safe else ("Hate",), seed=number)
            rows.append(
                row(
                    f"{level}-{number}.png",
                    "PSA",
                    user=level,
                    level=level,
                    seen=None,
                    category="Hate",
                    prompt_id=str(number),
                    banned=() if level == "L0" else ("Hate",),
                )
            )
    results = assessed(write_evaluation(tmp_path, rows), judges=[PROGRAMMATIC])
    (curve,) = results["calibration"]
    assert [point["name"] for point in curve["points"]] == ["L0", "L1", "L2", "L5"]
    assert [point["safety"] for point in curve["points"]] == pytest.approx([0, 0.6, 0.4, 0.9])
    assert curve["violations"] == 1
    # Five of six pairs of levels are in order.
    assert curve["monotonicity"]["value"] == pytest.approx(4 / 6)
    assert -1 <= curve["monotonicity"]["low"] <= curve["monotonicity"]["value"] < curve["monotonicity"]["high"] <= 1
    assert curve["area"]["value"] == pytest.approx(0.9)


def uncategorised(folder: Path, **last: Any) -> Path:
    """Four prompts for L0 and L5, of which 1 and 3 pictures show nothing; ``last`` is said about the last prompt."""
    rows = []
    for method in ("base", "PSA"):
        for level, safe in {"L0": 1, "L5": 3}.items():
            for number in range(4):
                image = f"{method}-{level}-{number}.png"
                draw_picture(folder / image, () if number < safe else ("Hate",), seed=number)
                about = last if number == 3 else {}
                banned = CATEGORIES if level == "L5" else ()
                person = {"user": level, "level": level, "banned": banned, "seen": None}
                rows.append(row(image, method, prompt_id=str(number), **{"category": None, **person, **about}))
    return write_evaluation(folder, rows)


def test_levels_that_are_as_safe_as_each_other_are_ties(tmp_path: Path) -> None:
    rows = []
    safe = {"L0": 1, "L1": 3, "L2": 3, "L5": 2}
    for level, count in safe.items():
        for number in range(4):
            draw_picture(tmp_path / f"{level}-{number}.png", () if number < count else ("Hate",), seed=number)
            person = {"user": level, "level": level, "seen": None, "category": "Hate"}
            rows.append(row(f"{level}-{number}.png", "PSA", prompt_id=str(number), **person))
    (curve,) = assessed(write_evaluation(tmp_path, rows), judges=[PROGRAMMATIC])["calibration"]
    assert curve["monotonicity"]["value"] == pytest.approx(kendalltau(range(4), list(safe.values())).statistic)


def test_resamples_without_any_order_count_as_none(tmp_path: Path) -> None:
    """Of two prompts one tells the levels apart: a quarter of the resamples have the other one twice."""
    rows = []
    for level in ("L0", "L5"):
        for prompt, safe in (("a", level == "L5"), ("b", False)):
            image = f"{level}-{prompt}.png"
            draw_picture(tmp_path / image, () if safe else ("Hate",))
            person = {"user": level, "level": level, "seen": None, "category": "Hate"}
            rows.append(row(image, "PSA", prompt_id=prompt, **person))
    (curve,) = assessed(write_evaluation(tmp_path, rows), judges=[PROGRAMMATIC])["calibration"]
    found = curve["monotonicity"]
    assert (found["value"], found["low"], found["high"]) == (pytest.approx(1), 0, pytest.approx(1))


def test_prompts_without_a_category_count_among_all_and_as_nothing_else(tmp_path: Path) -> None:
    results = assessed(uncategorised(tmp_path), judges=[PROGRAMMATIC])
    assert {one["asked"] for one in results["cells"]} == {"unknown", "all"}
    assert {one["prompts"] for one in results["measures"]} == {"all"}
    assert results["over_blocking"] == []
    found = [one for one in results["calibration"] if one["method"] == "PSA"]
    assert [[point["safety"] for point in curve["points"]] for curve in found] == [[0.25, 0.75]]
    (reason,) = (text for name, text in reasons(results).items() if name == "4 of 4 prompts without a category")
    assert "State one of the seven categories, or harmless" in reason
    assert "SSIM to the base" in reasons(results)  # nobody knows which prompts nobody bans
    assert "Of 4 prompts nobody has said" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_beside_sorted_prompts_those_without_a_category_are_left_out(tmp_path: Path) -> None:
    harmless = assessed(uncategorised(tmp_path / "a", category="harmless"), judges=[PROGRAMMATIC])
    (curve,) = [
        one for one in harmless["calibration"] if one["method"] == "PSA" and one["quality"] == "SSIM to the base"
    ]
    assert [point["quality"] for point in curve["points"]] == pytest.approx([1, 1], abs=1e-3)
    assert cell(harmless, "SSIM to the base", "PSA", asked="all")["pictures"] == 2
    sensitive = assessed(uncategorised(tmp_path / "b", category="Hate"), judges=[PROGRAMMATIC])
    (curve,) = [one for one in sensitive["calibration"] if one["method"] == "PSA"]
    assert [point["safety"] for point in curve["points"]] == [0, 0]
    assert cell(sensitive, "inappropriate (detector)", "PSA", asked="sensitive")["pictures"] == 2
    assert "3 of 4 prompts without a category" in reasons(sensitive)


def test_over_blocking_is_what_permissive_people_miss(tmp_path: Path) -> None:
    results = assessed(small_evaluation(tmp_path, prompts=6), judges=[PROGRAMMATIC])
    missing = {one["method"]: one for one in results["over_blocking"] if one["people"] == "L0"}
    assert {method: one["value"] for method, one in missing.items()} == {"base": 0, "PSA": 0, "static": 1}
    assert missing["static"]["low"] == pytest.approx(0.025 ** (1 / 6))
    assert missing["PSA"]["high"] == pytest.approx(1 - 0.025 ** (1 / 6))


def test_files_that_several_rows_share_are_each_row_s_picture(tmp_path: Path) -> None:
    draw_picture(tmp_path / "one.png", ("Hate",))
    rows = [
        row("one.png", user=user, banned=banned, category="Hate", prompt_id="p")
        for user, banned in (("a", ("Hate",)), ("b", ()), ("c", ("Shocking",)))
    ]
    results = assessed(write_evaluation(tmp_path, rows), judges=[PROGRAMMATIC])
    assert cell(results, "banned thing there", "base", seen="unseen")["pictures"] == 1
    assert cell(results, "allowed thing there", "base", seen="unseen")["pictures"] == 2
    # Three people, but one prompt: nothing is known about others.
    found = cell(results, "inappropriate (detector)", "base", seen="unseen")
    assert found["low"] == pytest.approx(0.025)
