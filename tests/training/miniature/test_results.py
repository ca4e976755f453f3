"""From what the detector sees to shares and intervals."""

from __future__ import annotations

import numpy as np
import pytest

from comfyui_psa.profiles import CATEGORIES, Profile
from comfyui_psa.training.evaluation.statistics import share
from comfyui_psa.training.miniature.cases import Case
from comfyui_psa.training.miniature.detector import Sighting
from comfyui_psa.training.miniature.evaluation import Outcome
from comfyui_psa.training.miniature.people import with_set
from comfyui_psa.training.miniature.results import Cell, differences, tabulate, to_json, to_markdown


def outcome(
    category: str | None,
    bans: set[str],
    glyphs: set[str],
    objects: set[str],
    mention: str = "named",
    number: int = 0,
    group: str = "some",
) -> Outcome:
    person = with_set(Profile(age=30), frozenset(bans))
    asked = mention if category else None
    case = Case(number, group, False, person, "a cat at night", "cat", category, asked)
    return Outcome(case, Sighting(frozenset(glyphs), frozenset(objects)))


def test_each_measure_is_what_its_name_says() -> None:
    bans = {"Hate", "Shocking"}
    run = [
        outcome("Hate", bans, set(), {"cat"}),
        outcome("Hate", bans, {"Hate"}, {"cat"}),
        outcome("Hate", bans, {"Violence"}, set()),
        outcome("Hate", bans, {"Hate", "Violence"}, {"dog"}),
        outcome("Violence", bans, {"Violence"}, {"cat"}, "implied"),
        outcome("Violence", bans, set(), {"cat", "dog"}, "implied"),
        outcome(None, bans, set(), {"cat"}),
    ]
    table = tabulate([run])
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


def test_values_that_belong_together_tell_less() -> None:
    values = [bool(value) for value in np.random.default_rng(1).random(60) < 0.6]
    alone = share(values)
    threefold = share([value for value in values for _ in range(3)], [i for i in range(60) for _ in range(3)])
    assert threefold[:3] == pytest.approx(alone[:3])
    assert (alone.pictures, threefold.pictures) == (60, 180)
    independent = share([value for value in values for _ in range(3)])
    assert independent.high - independent.low < 0.7 * (alone.high - alone.low)


def test_a_share_without_exceptions_is_not_certain() -> None:
    found = share([True] * 300)
    # Clopper and Pearson's: 0.975 = 1 - low^300 at the other end.
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(0.025 ** (1 / 300))
    assert share([False] * 300)[:3] == pytest.approx((0, 0, 1 - found.low))


def test_runs_are_reported_together_and_one_by_one() -> None:
    base = [outcome("Hate", {"Hate"}, {"Hate"}, {"cat"}, number=i, group="everything") for i in range(4)]
    first = [outcome("Hate", {"Hate"}, set(), {"cat"}, number=i, group="everything") for i in range(4)]
    second = [outcome("Hate", {"Hate"}, set(), {"cat"} if i else set(), number=i, group="everything") for i in range(4)]
    cell = Cell("everything", "seen", "banned, named")
    found = tabulate([first, second])[cell]["object"]
    assert (found.value, found.pictures, found.runs) == (7 / 8, 8, (1.0, 0.75))
    above = differences([first, second], base)[cell]
    assert above["object"].value == -1 / 8
    assert above["clean"].value == 1


@pytest.mark.parametrize("category", CATEGORIES)
def test_tables_say_the_same_in_numbers_and_in_words(category: str) -> None:
    tables = {"base": tabulate([[outcome(category, {category}, {category}, {"cat"})]])}
    rows = to_json(tables)
    cell = Cell("some", "seen", "banned, named")
    assert {row["measure"]: row["value"] for row in rows} == {
        name: value.value for name, value in tables["base"][cell].items()
    }
    (line,) = [line for line in to_markdown(tables).splitlines() if "banned, named" in line]
    assert line.startswith("| some, seen | banned, named | base | 0.0 (0.0 to 97.5) |")
