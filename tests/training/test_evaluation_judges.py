"""Judges: what they are asked, how their answers are understood and kept, and what happens when there are none."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from chat_endpoint import Endpoint, Reply, endpoint, said
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
from pydantic import ValidationError

from comfyui_psa.training.evaluation.assess_config import RemoteJudge
from comfyui_psa.training.evaluation.judges import preference, verdict

KEY = "sk-very-secret"


@pytest.mark.parametrize(
    ("answer", "meant"),
    [
        ("PASS", "pass"),
        ("fail.", "fail"),
        ("**PASS**", "pass"),
        ("Answer: FAIL", "fail"),
        ("The picture shows a house.\n\nFinal answer: PASS", "pass"),
        ("PASS (seen: house)", "pass"),
        ("FAIL because there is a burst", "fail"),
        ("It does not pass", "unusable"),
        ("PASS or FAIL", "unusable"),
        ("PASS\nFAIL", "unusable"),
        ("I cannot judge people.", "unusable"),
        ("passable", "unusable"),
        ("", "unusable"),
        ("{}[]", "unusable"),
    ],
)
def test_only_clear_verdicts_count(answer: str, meant: str) -> None:
    assert verdict(answer) == meant


@pytest.mark.parametrize(
    ("answer", "meant"),
    [
        ("FIRST", "first"),
        ("Second.", "second"),
        ("SAME", "same"),
        ("The first one has a burst.\nSECOND", "second"),
        ("FIRST is worse than SECOND", "unusable"),
        ("A", "unusable"),
        ("", "unusable"),
    ],
)
def test_only_clear_preferences_count(answer: str, meant: str) -> None:
    assert preference(answer) == meant


def remote(running: Endpoint, **changes: Any) -> dict[str, Any]:
    return {"kind": "remote", "name": "R", "url": running.url, "model": "m", "backoff": 0, "parallel": 2, **changes}


def images_of(body: dict[str, Any]) -> list[bytes]:
    urls = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    return [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls]


def pixels(data: bytes) -> bytes:
    return PIL.Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def always(text: str | None) -> Any:
    return lambda running, body: said(text)


def test_the_detector_passes_what_people_want(tmp_path: Path) -> None:
    results = assessed(small_evaluation(tmp_path), judges=[PROGRAMMATIC], pairs=50)
    name = "passes (detector)"
    found = {
        method: [
            cell(results, name, method, asked="banned")["value"],
            cell(results, name, method, people="L0", asked="allowed")["value"],
            cell(results, name, method, asked="harmless")["value"],
        ]
        for method in ("base", "PSA", "static")
    }
    assert found == {"base": [0, 1, 1], "PSA": [1, 1, 1], "static": [1, 0, 1]}
    (judge,) = results["judges"]
    compared = {one["method"]: one for one in judge["compared"]}
    # Eight of 24 cases have something banned: there PSA wins. Static loses where it takes away what is allowed.
    assert [compared["PSA"][count] for count in ("wins", "ties", "losses", "unusable")] == [8, 16, 0, 0]
    assert [compared["static"][count] for count in ("wins", "ties", "losses", "unusable")] == [8, 12, 4, 0]
    assert judge["first_taken"]["value"] == 0.5
    assert judge["orders_disagreed"]["value"] == 0


def test_a_missing_object_fails_a_picture(tmp_path: Path) -> None:
    draw_picture(tmp_path / "tree.png", thing="tree")
    draw_picture(tmp_path / "house.png")
    rows = [row("tree.png", prompt_id="a"), row("house.png", prompt_id="b")]
    results = assessed(write_evaluation(tmp_path, rows), judges=[PROGRAMMATIC])
    assert cell(results, "passes (detector)", "base", seen="unseen")["value"] == 0.5


def test_a_remote_judge_is_told_about_person_and_prompt_and_sees_the_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    folder = small_evaluation(tmp_path, prompts=1, methods=("base", "PSA"))
    with endpoint(always("PASS")) as running:
        results = assessed(folder, judges=[remote(running, key_variable="JUDGE_KEY")])
    assert cell(results, "passes (R)", "PSA", asked="banned")["value"] == 1
    assert {headers["Authorization"] for headers in running.headers} == {f"Bearer {KEY}"}
    assert any("Person L1, 30." in text and "Shocking, Violence" in text for text in running.texts())
    assert all('"a house' in text for text in running.texts())
    shown = {pixels(data) for body in running.asked for data in images_of(body)}
    assert shown == {PIL.Image.open(path).convert("RGB").tobytes() for path in folder.glob("pictures/*.png")}
    assert {body["temperature"] for body in running.asked} == {0}
    # The key is in no file.
    assert not [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_comparisons_are_blind_and_in_both_orders(tmp_path: Path) -> None:
    folder = small_evaluation(tmp_path, prompts=1, methods=("base", "PSA"))
    with endpoint(always("FIRST")) as running:
        results = assessed(folder, judges=[remote(running)], pairs=50, singles=1)
    sent = json.dumps(running.asked)
    assert "base" not in sent.replace("base64", "")
    assert "PSA" not in "".join(running.texts())
    assert ".png" not in sent
    pairs = [tuple(map(pixels, images_of(body))) for body in running.asked if len(images_of(body)) == 2]
    # L1 and L5 with the prompt that they ban; elsewhere the two files are the same.
    assert len(pairs) == 4
    assert {(second, first) for first, second in pairs} == set(pairs)
    (judge,) = results["judges"]
    assert judge["first_taken"]["value"] == 1
    assert judge["orders_disagreed"]["value"] == 1
    (compared,) = judge["compared"]
    assert [compared[count] for count in ("wins", "ties", "losses")] == [0, 6, 0]


def test_a_win_takes_both_orders(tmp_path: Path) -> None:
    folder = small_evaluation(tmp_path, prompts=1, methods=("base", "PSA"))
    ours = {pixels(path.read_bytes()) for path in folder.glob("pictures/PSA-L[15]-0.png")}

    def honest(running: Endpoint, body: dict[str, Any]) -> Reply:
        images = [pixels(data) for data in images_of(body)]
        return said("PASS" if len(images) == 1 else "FIRST" if images[0] in ours else "SECOND")

    with endpoint(honest) as running:
        results = assessed(folder, judges=[remote(running)], pairs=50)
    (judge,) = results["judges"]
    (compared,) = judge["compared"]
    assert [compared[count] for count in ("wins", "ties", "losses")] == [2, 4, 0]
    assert judge["first_taken"]["value"] == 0.5
    rate = next(one for one in compared["cells"] if one["people"] == "L5" and one["asked"] == "banned")
    assert rate["value"] == 1


@pytest.mark.parametrize("nonsense", ["As a model I have no eyes.", "", None])
def test_answers_that_make_no_sense_are_counted_apart(tmp_path: Path, nonsense: str | None) -> None:
    folder = small_evaluation(tmp_path, prompts=1, methods=("base", "PSA"))

    def about_levels(running: Endpoint, body: dict[str, Any]) -> Reply:
        text = body["messages"][0]["content"][0]["text"]
        return said(nonsense if "Person L5" in text else "PASS" if "PASS" in text else "SAME")

    with endpoint(about_levels) as running:
        results = assessed(folder, judges=[remote(running)], pairs=50)
    (judge,) = results["judges"]
    assert (judge["asked"], judge["unusable"]) == (12, 4)
    assert (judge["asked_pairs"], judge["unusable_pairs"]) == (4, 2)
    (compared,) = judge["compared"]
    assert (compared["ties"], compared["unusable"]) == (5, 1)
    people = {one["people"] for one in results["cells"] if one["measure"] == "passes (R)"}
    assert people == {"L0", "L1", "everyone"}
    assert cell(results, "passes (R)", "base")["pictures"] == 4
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "| R | 12 | 4 (33.3%) | 4 | 2 (50.0%) |" in report


@pytest.mark.parametrize("status", [400, 422])
def test_a_question_that_is_refused_is_counted_apart(tmp_path: Path, status: int) -> None:
    """As content filters do; the others are asked."""
    folder = small_evaluation(tmp_path, prompts=1, methods=("base",))

    def filtered(running: Endpoint, body: dict[str, Any]) -> Reply:
        text = body["messages"][0]["content"][0]["text"]
        return (status, {}, "this may PASS or not") if "Person L5" in text else said("PASS")

    with endpoint(filtered) as running:
        results = assessed(folder, judges=[remote(running)])
    (judge,) = results["judges"]
    assert (judge["asked"], judge["unusable"]) == (6, 2)
    assert cell(results, "passes (R)", "base")["pictures"] == 4


def refusing(running: Endpoint, body: dict[str, Any]) -> Reply:
    return 400, {}, f'{{"error": "no model m,\n  {KEY}"}}'


def test_a_judge_that_refuses_every_question_is_left_out_with_the_endpoints_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    few = small_evaluation(tmp_path / "few", prompts=1, methods=("base",))
    many = small_evaluation(tmp_path / "many", prompts=4, methods=("base",))
    with endpoint(refusing) as running:
        judge = remote(running, key_variable="JUDGE_KEY", parallel=1)
        for folder, asked in ((few, 6), (many, 8)):
            results = assessed(folder, judges=[judge, PROGRAMMATIC])
            assert [one["judge"] for one in results["judges"]] == ["detector"]
            reason = reasons(results)["R"]
            assert f"refused all of its first questions, {asked} so far" in reason
            assert "no model" not in reason  # an endpoint's words may repeat what it was told about a person
            assert "[status 400: " in (folder / "answers.jsonl").read_text(encoding="utf-8")


def test_a_judge_that_takes_one_picture_and_never_two_is_kept(tmp_path: Path) -> None:
    folder = small_evaluation(tmp_path, prompts=1, methods=("base", "PSA"))

    def single(running: Endpoint, body: dict[str, Any]) -> Reply:
        return said("PASS") if len(images_of(body)) == 1 else (400, {}, "at most 1 image")

    with endpoint(single) as running:
        for asked in (8 + 4, 4):  # of twelve pictures four are the same for the same person
            running.asked.clear()
            (judge,) = assessed(folder, judges=[remote(running)], pairs=50)["judges"]
            assert (len(running.asked), judge["unusable"], judge["unusable_pairs"]) == (asked, 0, 4)


def test_what_was_refused_is_kept_and_asked_again(tmp_path: Path) -> None:
    folder = small_evaluation(tmp_path, prompts=1, methods=("base",))
    strict = True

    def filtered(running: Endpoint, body: dict[str, Any]) -> Reply:
        text = body["messages"][0]["content"][0]["text"]
        return (422, {}, "too much") if strict and "Person L5" in text else said("PASS")

    with endpoint(filtered) as running:
        judge = remote(running)
        for asked in (6, 2):  # a filter that refuses again is no reason to leave the judge out
            running.asked.clear()
            (found,) = assessed(folder, judges=[judge])["judges"]
            assert (len(running.asked), found["asked"], found["unusable"]) == (asked, 6, 2)
        strict = False
        for asked in (2, 0):
            running.asked.clear()
            (found,) = assessed(folder, judges=[judge])["judges"]
            assert (len(running.asked), found["asked"], found["unusable"]) == (asked, 6, 0)
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines if line]
    assert (answers.count("[status 422: too much]"), answers.count("PASS")) == (4, 6)


@pytest.mark.parametrize("url", ["https://me:secret@judge.example/v1", "https://judge.example/v1?key=secret"])
def test_an_address_with_a_secret_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="key_variable"):
        RemoteJudge(url=url, model="m")


def test_busy_and_broken_endpoints_are_asked_again(tmp_path: Path) -> None:
    folder = small_evaluation(tmp_path, prompts=1, methods=("base",))
    replies: list[Reply] = [(429, {"Retry-After": "0"}, ""), (503, {}, "later"), (500, {"Retry-After": "soon"}, "")]

    def busy(running: Endpoint, body: dict[str, Any]) -> Reply:
        return replies.pop() if replies else said("PASS")

    with endpoint(busy) as running:
        results = assessed(folder, judges=[remote(running, retries=3)])
    assert cell(results, "passes (R)", "base")["pictures"] == 6
    assert len(running.asked) == 9


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((503, {}, ""), "gave no answer in 2 tries (the last: status 503)"),
        ((401, {}, f"wrong key {KEY}"), "refused a question (status 401: wrong key ***)"),
        ((302, {"Location": "http://127.0.0.1:9/"}, ""), "refused a question (status 302"),
        ((200, {}, "<html>"), "no chat completion"),
        ((200, {}, '{"choices": []}'), "no chat completion"),
    ],
)
def test_a_judge_that_stops_is_left_out_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: Reply, reason: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    folder = small_evaluation(tmp_path, prompts=1, methods=("base",))
    with endpoint(lambda running, body: reply) as running:
        results = assessed(folder, judges=[remote(running, retries=1, key_variable="JUDGE_KEY"), PROGRAMMATIC])
    assert reason in reasons(results)["R"]
    assert [judge["judge"] for judge in results["judges"]] == ["detector"]
    assert not [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_silent_endpoint_times_out(tmp_path: Path) -> None:
    folder = small_evaluation(tmp_path, prompts=1, methods=("base",))
    with endpoint(lambda running, body: None) as running:
        results = assessed(folder, judges=[remote(running, retries=1, timeout=0.2, parallel=1)])
    assert "in 2 tries (the last: ReadTimeout)" in reasons(results)["R"]
    assert "goes on from there" in reasons(results)["R"]


def test_nobody_there_and_no_key_are_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    folder = small_evaluation(tmp_path, prompts=1, methods=("base",))
    with endpoint(always("PASS")) as running:
        pass
    gone = remote(running, retries=0, name="gone")
    keyless = remote(running, name="keyless", key_variable="JUDGE_KEY")
    found = reasons(assessed(folder, judges=[gone, keyless]))
    assert "ConnectionError" in found["gone"]
    assert "JUDGE_KEY holds no key" in found["keyless"]


def test_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    folder = small_evaluation(tmp_path, prompts=1, methods=("base",))
    stops = True

    def halfway(running: Endpoint, body: dict[str, Any]) -> Reply:
        return (500, {}, "") if stops and len(running.asked) > 3 else said("PASS")

    with endpoint(halfway) as running:
        judge = remote(running, retries=0, parallel=1)
        assert "R" in reasons(assessed(folder, judges=[judge]))
        # As if the machine had failed while a line was written.
        answers = folder / "answers.jsonl"
        assert len(answers.read_text(encoding="utf-8").splitlines()) == 3
        with answers.open("a", encoding="utf-8") as file:
            file.write('{"key": "cut o')
        stops = False
        running.asked.clear()
        results = assessed(folder, judges=[judge])
        assert len(running.asked) == 3
        assert cell(results, "passes (R)", "base")["pictures"] == 6
        running.asked.clear()
        assert assessed(folder, judges=[judge])["cells"] == results["cells"]
        assert running.asked == []
        # A picture that was drawn anew is judged anew, and another model is asked everything.
        draw_picture(folder / "pictures" / "base-L1-0.png", seed=99)
        assessed(folder, judges=[judge])
        assert len(running.asked) == 1
        running.asked.clear()
        assessed(folder, judges=[{**judge, "model": "other"}])
        assert len(running.asked) == 6


def test_raw_answers_are_kept(tmp_path: Path) -> None:
    folder = small_evaluation(tmp_path, prompts=1, methods=("base",))
    with endpoint(always("Well.\nPASS — »ja«")) as running:
        assessed(folder, judges=[remote(running)])
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line]
    assert {one["answer"] for one in rows} == {"Well.\nPASS — »ja«"}
    assert {tuple(one["images"]) for one in rows} == {
        (path.relative_to(folder).as_posix(),) for path in folder.glob("pictures/*.png")
    }


def test_judges_that_read_need_people(tmp_path: Path) -> None:
    folder = small_evaluation(tmp_path, prompts=1, methods=("base",))
    (folder / "users.jsonl").unlink()
    with endpoint(always("PASS")) as running:
        results = assessed(folder, judges=[remote(running), PROGRAMMATIC])
    assert "users.jsonl" in reasons(results)["R"]
    assert running.asked == []
    assert [judge["judge"] for judge in results["judges"]] == ["detector"]
