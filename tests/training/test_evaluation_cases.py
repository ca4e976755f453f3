"""Who is asked for what: prompts and people from files, Sage, simulation and the miniature's world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluations import evaluation, write_jsonl
from pairs import CAPTIONS, read_metadata, write_metadata, write_sage_split

from comfyui_psa.profiles import CATEGORIES, Profile, banned_categories, simulate_users
from comfyui_psa.training.errors import DataError
from comfyui_psa.training.evaluation.cases import Case, read_cases
from comfyui_psa.training.evaluation.people import Person, write_people
from comfyui_psa.training.miniature import PEOPLE, SEED
from comfyui_psa.training.miniature import cases as miniature

NOBODY = {"users": {"levels": ()}, "prompts": {"file": None}}


def cases(tmp_path: Path, **changes: Any) -> list[Case]:
    return read_cases(evaluation(tmp_path, tmp_path / "run", **changes))


def prompts(tmp_path: Path, name: str, text: str, **section: Any) -> list[Case]:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return cases(tmp_path, prompts={"file": path, **section}, users={"levels": ("L1",)})


def test_prompts_come_from_jsonl_csv_and_toml_alike(tmp_path: Path) -> None:
    row = {"prompt_id": "a", "prompt": "a war, outside", "category": "violence", "content": "named", "seed": 7}
    text = json.dumps({**row, "expected": ["house", "tree"]}) + "\n\n"
    found = [
        prompts(tmp_path, "a.jsonl", text),
        prompts(
            tmp_path,
            "a.csv",
            'prompt_id,prompt,category,content,expected,seed\na,"a war, outside",Violence,named,"house, tree",7\n',
        ),
        prompts(
            tmp_path,
            "a.toml",
            '[[prompts]]\nprompt_id="a"\nprompt="a war, outside"\ncategory="Violence"\ncontent="named"\n'
            'expected=["house","tree"]\nseed=7\n',
        ),
    ]
    assert found[0] == found[1] == found[2]
    ((case,),) = (found[0],)
    assert case.asked.category == "Violence"
    assert case.asked.expected == ("house", "tree")
    assert case.seed == 7
    assert case.key == "L1|a|7"


def test_a_prompt_alone_is_enough(tmp_path: Path) -> None:
    found = prompts(tmp_path, "a.toml", 'prompts = ["one", "two"]')
    assert [(case.asked.prompt_id, case.asked.prompt, case.asked.category) for case in found] == [
        ("000001", "one", None),
        ("000002", "two", None),
    ]
    assert [case.asked.prompt for case in prompts(tmp_path, "a.toml", 'prompts = ["one", "two"]', limit=1)] == ["one"]
    (harmless,) = prompts(tmp_path, "h.jsonl", '{"prompt": "a", "category": "Harmless"}')
    assert harmless.asked.category == "harmless"
    assert prompts(tmp_path, "e.jsonl", '{"prompt": ""}')[0].asked.prompt == ""


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "a dog", r"a\.txt is no file of prompts: expected one of the endings"),
        ("a.jsonl", "", "holds no prompts"),
        ("a.jsonl", "a dog\n", r"Line 1 of .*a\.jsonl is no JSON"),
        ("a.jsonl", '{"text": "a dog"}\n', r"Prompt 1 of a\.jsonl has no text in the column `prompt`"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "category": "War"}\n', r"Prompt 2 of a\.jsonl .*War is none of"),
        ("a.jsonl", '{"prompt": "a", "content": "hinted"}\n', "content: Input should be 'named' or 'implied'"),
        ("a.jsonl", '{"prompt": "a", "colour": "red"}\n', "colour: Extra inputs are not permitted"),
        ("a.jsonl", '{"prompt": "a", "seed": -1}\n', "seed: Input should be greater than or equal to 0"),
        ("a.jsonl", '{"prompt_id": 1, "prompt": "a"}\n{"prompt_id": "1", "prompt": "b"}\n', 'have the prompt_id "1"'),
        ("a.toml", "title = 1", r"a\.toml has no prompts"),
    ],
)
def test_a_bad_file_of_prompts_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prompts(tmp_path, name, text)


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.csv", "gone.toml"])
def test_a_missing_file_of_prompts_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="There is no file"):
        cases(tmp_path, prompts={"file": tmp_path / name})


def test_everybody_asks_for_everything_with_the_same_seeds(tmp_path: Path) -> None:
    users = {"levels": ("L0", "L5"), "simulated": 2, "seed": 3}
    found = cases(tmp_path, users=users, sampling={"pictures": 3})
    assert len(found) == len({case.key for case in found}) == 2 * 4 * 3
    seeds = {}
    for case in found:
        seeds.setdefault(case.person.user, []).append((case.asked.prompt_id, case.seed))
    assert list(seeds) == ["L0", "L5", "simulated-0001", "simulated-0002"]
    assert all(list(asked) == seeds["L0"] for asked in seeds.values())
    assert len({seed for _, seed in seeds["L0"]}) == 6  # no two prompts are made of the same noise
    profiles = {case.person.user: case.person.profile for case in found}
    assert profiles["simulated-0002"] == simulate_users(2, 3)[1]
    again = cases(tmp_path, users=users, sampling={"pictures": 3})
    assert again == found
    others = cases(tmp_path, users=users, sampling={"pictures": 3, "seed": 1})
    assert {case.seed for case in others}.isdisjoint({case.seed for case in found})


def test_a_prompt_with_a_seed_goes_on_from_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "i2p.jsonl", [{"prompt": "a", "seed": 10}])
    found = cases(tmp_path, prompts={"file": path}, users={"levels": ("L0",)}, sampling={"pictures": 3})
    assert [case.seed for case in found] == [10, 11, 12]


def test_i2p_is_read_as_it_is_published(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    header = "prompt,categories,hard,sd_seed,sd_guidance_scale,lexica_url\n"
    rows = '"a war, outside","violence, hate",1,1579799523,7.5,https://a\nb,sexual,0,7,7,https://b\n'
    found = prompts(tmp_path, "i2p.csv", header + rows)
    assert [(case.asked.prompt, case.asked.category, case.seed) for case in found] == [
        ("a war, outside", None, 1579799523),
        ("b", None, 7),
    ]
    (said,) = caplog.messages
    assert said == "PSA: columns of i2p.csv that are not read: categories, hard, sd_guidance_scale, lexica_url"
    (own,) = prompts(tmp_path, "own.csv", "prompt,seed,sd_seed\na,3,7\n")
    assert own.seed == 3
    with pytest.raises(DataError, match=r"Prompt 1 of long\.csv cannot be used"):
        prompts(tmp_path, "long.csv", "prompt,seed\na,3,7\n")


def test_people_come_from_jsonl_and_from_the_releases_table(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "people.jsonl",
        [
            {"user": "anna", "profile": {"age": 35, "overrides": {"Hate": "ban"}}},
            {"user": 12, "profile": {"age": 9}, "seen": True},
        ],
    )
    found = cases(tmp_path, users={"levels": (), "file": path, "seen": False}, prompts={"limit": 1})
    assert [(case.person.user, case.person.seen, banned_categories(case.person.profile)) for case in found] == [
        ("anna", False, ("Hate",)),
        ("0000012", True, ("Violence", "Self-Harm", "Sexuality")),
    ]
    table = tmp_path / "users.csv"
    table.write_text("Age,Banned_Categories\n40,\"['Shocking']\"\n", encoding="utf-8")
    (case,) = cases(tmp_path, users={"levels": (), "file": table}, prompts={"limit": 1})
    assert (case.person.user, banned_categories(case.person.profile)) == ("0000001", ("Shocking",))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"user": "a"}], r"Line 1 of people\.jsonl is nobody"),
        ([{"user": "a", "profile": {"age": "old"}}], "is not a valid profile: age should be"),
        ([{"user": "../a", "profile": {"age": 3}}], "is no User_ID"),
        ([{"user": "a", "profile": {"age": 3}}, {"user": "a", "profile": {"age": 4}}], 'Two people are called "a"'),
        ([{"user": "L0", "profile": {"age": 3}}], 'A person is called "L0", as a level is'),
    ],
)
def test_bad_people_are_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    path = write_jsonl(tmp_path / "people.jsonl", rows)
    with pytest.raises(DataError, match=message):
        cases(tmp_path, users={"levels": ("L0",), "file": path})


def test_a_sage_split_gives_captions_or_people_with_their_prompts(tmp_path: Path) -> None:
    split = write_sage_split(tmp_path / "split", rows=6, users=4)
    crossed = cases(tmp_path, prompts={"file": None, "sage": split}, users={"levels": ("L0", "L5")})
    assert {case.asked.prompt for case in crossed} == set(CAPTIONS)
    assert len(crossed) == 2 * len(CAPTIONS)
    paired = cases(tmp_path, pairs={"sage": split, "seen": False}, **NOBODY)
    assert [(case.person.user, case.asked.prompt) for case in paired] == [
        (f"{row + 1:07d}", CAPTIONS[row])
        for row in range(4)  # the last two ask for the same again
    ]
    assert [case.person.profile.age for case in paired[:4]] == [user.age for user in simulate_users(4, 0)]
    assert {case.person.seen for case in paired} == {False}
    assert len(cases(tmp_path, pairs={"sage": split, "limit": 2}, **NOBODY)) == 2


def test_what_rows_of_sage_say_about_bans_decides_against_the_rules(tmp_path: Path) -> None:
    split = write_sage_split(tmp_path / "split", rows=2, users=2)
    lines = read_metadata(split)
    lines[1]["user_data"]["Banned_Categories"] = ["Propaganda"]
    write_metadata(split, lines)
    ruled, stated = cases(tmp_path, pairs={"sage": split}, **NOBODY)
    assert ruled.person.profile.overrides == {}
    assert banned_categories(stated.person.profile) == ("Propaganda",)


def test_several_splits_stand_in_one_evaluation(tmp_path: Path) -> None:
    seen = write_sage_split(tmp_path / "seen", rows=4, users=2)
    unseen = write_sage_split(tmp_path / "unseen", rows=8, users=4)
    table = [{"sage": seen, "seen": True}, {"sage": unseen, "seen": False}]
    with pytest.raises(DataError, match=r'"0000001" is in people of whom `seen` says different things'):
        cases_of(tmp_path, table)
    lines = [json.loads(line) for line in (unseen / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line["user_data"]["User_ID"] = f"{int(line['user_data']['User_ID']) + 100:07d}"
    write_jsonl(unseen / "metadata.jsonl", lines)
    found = cases_of(tmp_path, table)
    assert [(case.person.user, case.person.seen) for case in found] == [
        *[(f"{row % 2 + 1:07d}", True) for row in range(4)],
        *[(f"{row % 4 + 101:07d}", False) for row in range(4)],  # the other four rows ask for the same
    ]
    # A prompt is named after its text: another subset has the same names and seeds.
    ids = {case.asked.prompt: (case.asked.prompt_id, case.seed) for case in found}
    assert len(set(ids.values())) == len(ids) == 4
    assert all(ids[case.asked.prompt] == (case.asked.prompt_id, case.seed) for case in found)
    write_jsonl(unseen / "metadata.jsonl", lines[2:4])
    assert all(ids[case.asked.prompt] == (case.asked.prompt_id, case.seed) for case in cases_of(tmp_path, table[1:]))


def cases_of(tmp_path: Path, pairs: list[dict[str, Any]]) -> list[Case]:
    config = evaluation(tmp_path, tmp_path / "run", pairs={"miniature": 1}, **NOBODY)
    return read_cases(type(config).model_validate(config.model_dump(exclude_unset=True) | {"pairs": pairs}))


def test_a_line_separator_within_a_text_ends_no_line(tmp_path: Path) -> None:
    text = "a\u2028b\x85c"
    found = prompts(tmp_path, "a.jsonl", json.dumps({"prompt": text}, ensure_ascii=False) + "\n")
    found += prompts(tmp_path, "a.csv", f"prompt\r\n{text}\r\n")
    assert [case.asked.prompt for case in found] == [text, text]
    people = tmp_path / "people.jsonl"
    people.write_text(json.dumps({"user": "a", "profile": {"age": 35, "notes": text}}, ensure_ascii=False), "utf-8")
    assert len(cases(tmp_path, users={"levels": (), "file": people}, prompts={"limit": 1})) == 1


def test_the_miniatures_people_are_those_of_its_own_evaluation(tmp_path: Path) -> None:
    found = cases(tmp_path, pairs={"miniature": 2}, **NOBODY)
    expected = miniature.draw_cases(2, PEOPLE, SEED)
    assert [(c.person.profile, c.asked.prompt, c.asked.category, c.asked.content, c.asked.expected) for c in found] == [
        (c.person, c.caption, c.category or "harmless", c.mention, (c.object,)) for c in expected
    ]
    assert [case.seed for case in found] == [miniature.noise_seed(case) for case in expected]
    assert [case.person.seen for case in found] == [not case.unseen for case in expected]


def test_the_miniatures_prompts_take_turns(tmp_path: Path) -> None:
    found = cases(tmp_path, prompts={"file": None, "miniature": 32}, users={"levels": ("L0",)})
    kinds = [(case.asked.category, case.asked.content) for case in found]
    assert kinds[:16] == kinds[16:]
    assert len(set(kinds)) == 2 * len(CATEGORIES) + 1
    assert len({case.asked.prompt for case in found}) > 24
    assert all(case.asked.expected[0] in case.asked.prompt for case in found)


def test_what_is_written_about_people_leaves_out_what_is_theirs(tmp_path: Path) -> None:
    profile = Profile(name="Anna", notes="secret", age=35, overrides={"Hate": "ban"})
    write_people(tmp_path, [Person("a", profile, seen=True)])
    path = tmp_path / "users.jsonl"
    assert path.stat().st_mode & 0o077 == 0
    text = path.read_text(encoding="utf-8")
    assert "Anna" not in text
    assert "secret" not in text
    (row,) = map(json.loads, text.splitlines())
    assert (row["user"], row["bans"], row["seen"]) == ("a", ["Hate"], True)
    assert Profile.model_validate(row["profile"]).age == 35
    assert "Age: 35" in row["text"]
    assert "Must never be shown to this person: ['Hate']" in row["text"]
    assert "Summarise" not in row["text"]
