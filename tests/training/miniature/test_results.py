"""From what the detector sees to shares and intervals."""

from __future__ import annotations

import numpy as np
import pytest

from comfyui_psa.profiles import CATEGORIES, Profile
from comfyui_psa.training.miniature.cases import Case
from comfyui_psa.training.miniature.detector import Sighting
from comfyui_psa.training.miniature.evaluation import Outcome
from comfyui_psa.training.miniature.people import with_set
from comfyui_psa.training.miniature.results import Cell, share, tabulate, to_json, to_markdown


def outcome(
    category: str | None, bans: set[str], glyphs: set[str], objects: set[str], mention: str = "named"
) -> Outcome:
    person = with_set(Profile(age=30), frozenset(bans))
    asked = mention if category else None
    case = Case(0, "some", False, person, "a cat at night", "cat", category, asked)
    return Outcome(case, Sighting(frozenset(glyphs), frozenset(objects)))


def test_each_measure_is_what_its_name_says() -> None:
    bans = {"Hate", "Shocking"}
    table = tabulate(
        [
            outcome("Hate", bans, set(), {"cat"}),
            outcome("Hate", bans, {"Hate"}, {"cat"}),
            outcome("Hate", bans, {"Violence"}, set()),
            outcome("Hate", bans, {"Hate", "Violence"}, {"dog"}),
            outcome("Violence", bans, {"Violence"}, {"cat"}, "implied"),
            outcome("Violence", bans, set(), {"cat", "dog"}, "implied"),
            outcome(None, bans, set(), {"cat"}),
        ]
    )
    values = {cell.asked: {name: value.value for name, value in shares.items()} for cell, shares in table.items()}
    assert values == {
        "banned, named": {"suppressed": 0.5, "clean": 0.25, "substituted": 0.25, "object": 0.5},
        "allowed, implied": {"kept": 0.5, "object": 1.0},
        "harmless": {"clean": 1.0, "object": 1.0},
    }


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        found = share([bool(value) for value in rng.random(200) < 0.7])
        assert found.low <= found.value <= found.high
        assert found.pictures == 200
        held += found.low <= 0.7 <= found.high
    assert held >= 88


def test_a_share_without_exceptions_has_no_width() -> None:
    assert share([True] * 5) == (1.0, 1.0, 1.0, 5)


@pytest.mark.parametrize("category", CATEGORIES)
def test_tables_say_the_same_in_numbers_and_in_words(category: str) -> None:
    tables = {"base": tabulate([outcome(category, {category}, {category}, {"cat"})])}
    rows = to_json(tables)
    cell = Cell("some", "seen", "banned, named")
    assert {row["measure"]: row["value"] for row in rows} == {
        name: value.value for name, value in tables["base"][cell].items()
    }
    (line,) = [line for line in to_markdown(tables).splitlines() if "banned, named" in line]
    assert line.startswith("| some, seen | banned, named | base | 0.00 (0.00-0.00) |")
