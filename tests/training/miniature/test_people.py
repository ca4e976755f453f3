"""People of the drawn world: who trains, who is unseen, and what their pairs are."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from rich.progress import Progress

from comfyui_psa.profiles import CATEGORIES
from comfyui_psa.training.data.categories import HARMLESS
from comfyui_psa.training.data.pairs import open_pairs
from comfyui_psa.training.data.users import distinct_users
from comfyui_psa.training.errors import DataError
from comfyui_psa.training.miniature.cases import draw_cases, noise
from comfyui_psa.training.miniature.drawing import glyph_colour
from comfyui_psa.training.miniature.kept import case_key
from comfyui_psa.training.miniature.pairs import Style, draw_folder, draw_pairs
from comfyui_psa.training.miniature.people import (
    GROUPS,
    banned,
    group,
    held_out,
    training_people,
    unseen_people,
    with_set,
)
from comfyui_psa.training.miniature.world import GLYPHS

SEED = 5


def attributes(person) -> tuple:
    return person.religion, person.physical_condition, person.mental_condition


def test_training_people_have_nothing_that_is_held_out() -> None:
    out = held_out(SEED)
    people = training_people(800, SEED)
    assert len(out.sets) == 30
    assert len(out.combinations) == 28
    assert not any(banned(person) in out.sets or attributes(person) in out.combinations for person in people)
    # All other sets occur, and each group is large enough to be learned.
    assert len({banned(person) for person in people}) > 85
    assert all(count > 40 for count in Counter(map(group, people)).values())


@pytest.mark.parametrize("kind", GROUPS)
def test_unseen_people_are_new_in_their_attributes_and_in_their_sets(kind: str) -> None:
    out = held_out(SEED)
    people = unseen_people(120, SEED, kind)
    assert {group(person) for person in people} == {kind}
    assert all(attributes(person) in out.combinations for person in people)
    if kind == "some":
        assert {banned(person) for person in people} <= out.sets
        assert len({banned(person) for person in people}) > 20


def test_pairs_prefer_what_each_person_allows() -> None:
    people = training_people(60, SEED)
    kinds = Counter()
    for pair in draw_pairs(people, 600, SEED):
        if pair.category is None:
            kinds["harmless"] += 1
            assert not pair.chosen.glyphs
            assert pair.chosen.object in pair.caption
            assert pair.rejected.glyphs or pair.rejected.object != pair.chosen.object
            continue
        kinds[pair.mention] += 1
        if pair.category in banned(people[pair.person]):
            as_asked, other = pair.rejected, pair.chosen
            kinds["banned"] += 1
        else:
            as_asked, other = pair.chosen, pair.rejected
            kinds["twice"] += len(other.glyphs) == 2
        assert as_asked.glyphs == (pair.category,)
        assert other in (as_asked.without_glyphs(), as_asked.with_twin_glyphs())
        assert not (pair.category in banned(people[pair.person]) and other.glyphs)
    assert all(kinds[kind] > 60 for kind in ("harmless", "named", "implied", "banned"))
    allowed = 600 - kinds["harmless"] - kinds["banned"]
    assert 0.1 < kinds["twice"] / allowed < 0.3


def test_pairs_of_first_phrases_leave_the_second_ones_for_asking() -> None:
    people = training_people(12, SEED)
    second = tuple(glyph.implied[1] for glyph in GLYPHS.values())

    def told(first_phrases: bool) -> list[bool]:
        pairs = draw_pairs(people, 400, SEED, first_phrases)
        return [any(phrase in pair.caption for phrase in second) for pair in pairs if pair.mention == "implied"]

    assert 0.4 < np.mean(told(False)) < 0.6
    assert not any(told(True))
    asked = [case for case in draw_cases(40, 400, SEED) if case.mention == "implied"]
    assert {case.phrase for case in asked} == {0, 1}
    assert all((case.phrase == 1) == any(phrase in case.caption for phrase in second) for case in asked)


def test_the_data_loader_reads_what_is_drawn(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    with Progress(disable=True) as progress:
        draw_folder(folder, 40, 12, SEED, Style(), progress)
        with pytest.raises(DataError, match="is not empty"):
            draw_folder(folder, 40, 12, SEED, Style(), progress)
    people = training_people(12, SEED)
    pairs = list(open_pairs(folder))
    assert len(pairs) == 40
    users = distinct_users(pairs)
    assert {name: banned(person) for name, person in users.items()} == {
        f"{number:07d}": banned(person) for number, person in enumerate(people, start=1) if f"{number:07d}" in users
    }
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert HARMLESS in {row["category"] for row in rows} <= {*CATEGORIES, HARMLESS}
    row = next(row for row in rows if row["category"] != HARMLESS)
    glyph = glyph_colour(row["category"])
    shows = {
        side: bool((np.abs(np.asarray(PIL.Image.open(folder / row[side])).astype(int) - glyph).max(-1) < 30).any())
        for side in ("chosen", "rejected")
    }
    bans = row["category"] in banned(users[row["user_data"]["User_ID"]])
    assert shows == {"chosen": not bans, "rejected": bans}


def test_static_pairs_are_of_people_who_ban_everything(tmp_path: Path) -> None:
    with Progress(disable=True) as progress:
        draw_folder(tmp_path / "pairs", 20, 6, SEED, Style(static=True), progress)
    users = distinct_users(open_pairs(tmp_path / "pairs"))
    assert {banned(person) for person in users.values()} == {frozenset(CATEGORIES)}


def test_every_cell_has_as_many_cases_and_asks_what_it_says() -> None:
    cases = draw_cases(6, 400, SEED)
    counts = Counter((case.group, case.unseen, case.cell) for case in cases)
    assert set(counts.values()) == {6}
    assert len(counts) == 2 * (3 + 5 + 3)
    training = {person.model_dump_json() for person in training_people(400, SEED)}
    for case in cases:
        assert group(case.person) == case.group
        assert case.object in case.caption
        assert (case.person.model_dump_json() in training) != case.unseen
        assert case.cell.startswith("banned") == (case.category in banned(case.person))


def test_another_trial_asks_other_unseen_people_for_other_things() -> None:
    reported, again = (draw_cases(6, 400, SEED, trial) for trial in (0, 1))
    assert [case.cell for case in again] == [case.cell for case in reported]
    strangers, others = (
        {case.person.model_dump_json() for case in cases if case.unseen} for cases in (reported, again)
    )
    assert len(strangers & others) < len(others) / 8  # a few happen to be alike
    assert {banned(case.person) for case in again if case.unseen and case.group == "some"} <= held_out(SEED).sets
    assert not {case.number for case in reported} & {case.number for case in again}
    assert len({case.caption for case in reported} & {case.caption for case in again}) < len(again) / 2


def test_what_was_counted_is_kept_for_its_person_prompt_and_noise_alone() -> None:
    case = draw_cases(2, 40, 2025)[-1]
    someone = with_set(case.person, frozenset({"Hate"}))
    others = [
        replace(case, person=someone),
        replace(case, caption="a cat at night"),
        replace(case, number=case.number + 1),
    ]
    assert case_key(replace(case)) == case_key(case)
    assert len({case_key(case), *map(case_key, others)}) == 4


def test_noise_belongs_to_the_case() -> None:
    cases = draw_cases(2, 100, SEED)
    assert (noise(cases)[[3]] == noise([cases[3]])).all()
    assert (noise(cases)[0] != noise(cases)[1]).any()
