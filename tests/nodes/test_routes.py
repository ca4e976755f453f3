"""The private store over HTTP: what the browser side can do, and what nobody else can."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from examples import example
from studio import COMFYUI, empty_store

from comfyui_psa.profiles import CATEGORIES, Profile, ProfileStore, StoredProfile, levels
from comfyui_psa.training.comfyui import ComfyUIServer, prepare_base, to_prompt

MARKER = "Zorblaxism"
PROFILE = {"name": "evening", "age": 12, "religion": MARKER, "overrides": {"Propaganda": "ban"}, "notes": MARKER}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUIServer]:
    with ComfyUIServer(COMFYUI, prepare_base(tmp_path_factory.mktemp("routes"))) as running:
        yield running


@pytest.fixture
def store(server: ComfyUIServer) -> Iterator[ProfileStore]:
    with empty_store(server) as store:
        yield store


def ask(server: ComfyUIServer, method: str, path: str, body: Any = None, **headers: str) -> requests.Response:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.request(method, f"{server.url}/psa{path}", json=body, headers=given, timeout=60)


def test_a_profile_is_made_read_changed_activated_and_deleted(server: ComfyUIServer, store: ProfileStore) -> None:
    made = ask(server, "POST", "/profiles", {"profile": PROFILE})
    assert made.status_code == 201
    assert store.read(made.json()["id"]).profile == Profile.model_validate(PROFILE)
    place = f"/profiles/{made.json()['id']}"
    assert ask(server, "GET", place).json() == made.json()

    changed = {"revision": made.json()["revision"], "profile": {**PROFILE, "age": 40}}
    saved = ask(server, "PUT", place, changed)
    assert saved.status_code == 200
    assert saved.json()["profile"]["age"] == 40
    late = ask(server, "PUT", place, changed)
    assert late.status_code == 409
    assert "changed by another program" in late.json()["error"]

    assert ask(server, "POST", f"{place}/activate", {}).status_code == 200
    assert store.active_id() == made.json()["id"]
    assert ask(server, "POST", f"{place}/restore", {}).json()["profile"]["age"] == 12

    assert ask(server, "DELETE", place).status_code == 200
    assert store.entries() == ()
    assert ask(server, "GET", place).status_code == 404
    undone = ask(server, "PUT", place, {"revision": None, "profile": PROFILE})
    assert undone.status_code == 201
    assert undone.json()["id"] == made.json()["id"]
    assert ask(server, "PUT", place, {"revision": None, "profile": PROFILE}).status_code == 409


def test_the_list_names_profiles_and_tells_nothing_of_them(server: ComfyUIServer, store: ProfileStore) -> None:
    first = store.create(Profile.model_validate(PROFILE))
    damaged = store.save(store.create(Profile()), Profile())
    (store.root / f"{damaged.id}.json").write_bytes(b"{")
    store.activate(first.id)
    answer = ask(server, "GET", "/profiles")
    assert MARKER not in answer.text
    found = {entry["id"]: entry for entry in answer.json()["profiles"]}
    assert found[first.id] == {
        "id": first.id,
        "name": "evening",
        "active": True,
        "problem": None,
        "restorable": False,
        "revision": first.revision,
    }
    assert "damaged" in found[damaged.id]["problem"]
    assert found[damaged.id]["restorable"]


def test_a_preview_says_what_follows_from_which_attribute_and_stores_nothing(
    server: ComfyUIServer, store: ProfileStore
) -> None:
    decisions = ask(server, "POST", "/preview", {"profile": PROFILE}).json()["decisions"]
    assert [decision["category"] for decision in decisions] == list(CATEGORIES)
    found = {decision["category"]: decision for decision in decisions}
    assert found["Violence"] == {"category": "Violence", "banned": True, "reasons": ["under 18"]}
    assert found["Propaganda"] == {"category": "Propaganda", "banned": True, "reasons": ["your own choice"]}
    assert not found["Hate"]["banned"]
    assert store.entries() == ()


def test_an_adapter_says_what_it_acts_on(server: ComfyUIServer) -> None:
    text, constant = (
        ask(server, "GET", f"/adapter?name=psa_miniature{kind}.safetensors").json() for kind in ("", "_constant")
    )
    assert text == {"base": "PSA Miniature", "kinds": ["text"], "layers": 0, "encoder": "attributes-1"}
    assert constant == {"base": "PSA Miniature", "kinds": ["constant"], "layers": 17, "encoder": "attributes-1"}
    for name in ("", "absent.safetensors", "../user/users.json", "%2e%2e%2fx.safetensors"):
        answer = ask(server, "GET", f"/adapter?name={name}")
        assert answer.status_code == 400
        assert "There is no adapter" in answer.json()["error"]


def test_presets_offer_the_levels_and_the_values_of_the_paper(server: ComfyUIServer) -> None:
    presets = ask(server, "GET", "/presets").json()
    assert [level["id"] for level in presets["levels"]] == [level.id for level in levels()]
    assert sum(decision["banned"] for decision in presets["levels"][5]["decisions"]) == len(CATEGORIES)
    assert presets["religions"] == ["Christianity", "Islam", "Buddhism", "None"]
    assert presets["max_age"] == 130


EVERYTHING = (
    ("GET", "/profiles", None),
    ("POST", "/profiles", {"profile": PROFILE}),
    ("GET", "/profiles/{id}", None),
    ("PUT", "/profiles/{id}", {"revision": "{revision}", "profile": PROFILE}),
    ("DELETE", "/profiles/{id}", None),
    ("POST", "/profiles/{id}/activate", {}),
    ("POST", "/profiles/{id}/restore", {}),
    ("POST", "/preview", {"profile": PROFILE}),
    ("GET", "/presets", None),
    ("GET", "/adapter?name=psa_miniature.safetensors", None),
)


def filled(stored: StoredProfile, value: Any) -> Any:
    text = json.dumps(value).replace("{id}", stored.id).replace("{revision}", stored.revision)
    return json.loads(text)


@pytest.mark.parametrize("prefix", ["", "/api"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://example.org"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Host": "rebound.example.org"},
        {"Host": "rebound.example.org:8188", "Origin": "http://rebound.example.org:8188"},
    ],
)
def test_another_page_can_neither_read_nor_write(
    server: ComfyUIServer, store: ProfileStore, headers: dict[str, str], prefix: str
) -> None:
    stored = store.create(Profile.model_validate(PROFILE))
    for method, path, body in EVERYTHING:
        url = f"{server.url}{prefix}/psa{filled(stored, path)}"
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = requests.request(method, url, json=filled(stored, body), headers=given, timeout=60)
        assert answer.status_code == 403, (method, path)
        assert MARKER not in answer.text
        assert "evening" not in answer.text
    assert [entry.id for entry in store.entries()] == [stored.id]
    assert store.read(stored.id) == stored
    assert store.active_id() is None


def test_the_own_page_is_let_in(server: ComfyUIServer, store: ProfileStore) -> None:
    for headers in (
        {"Origin": server.url, "Sec_Fetch_Site": "same-origin"},
        {"Host": "localhost:8188", "Origin": "http://localhost:8188"},
        {"Host": "192.168.0.7:8188", "Origin": "http://192.168.0.7:8188"},
    ):
        assert ask(server, "POST", "/profiles", {"profile": PROFILE}, **headers).status_code == 201
    assert len(store.entries()) == 3


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_form_can_send_is_refused(server: ComfyUIServer, store: ProfileStore, kind: str) -> None:
    stored = store.create(Profile())
    for method, path, body in EVERYTHING:
        if body is not None:
            url = f"{server.url}/psa{filled(stored, path)}"
            content = json.dumps(filled(stored, body)).encode()
            answer = requests.request(method, url, data=content, headers={"Content-Type": kind}, timeout=60)
            assert answer.status_code == 415, (method, path)
            assert "application/json" in answer.json()["error"]
    assert store.read(stored.id) == stored
    assert store.active_id() is None


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"profile": {"age": MARKER}}, 400, "age should be a whole number"),
        ({"profile": {MARKER: 1}}, 400, "it may only have the fields"),
        ({"profile": MARKER}, 400, "it should be an object"),
        ({}, 400, "Send a JSON object with profile."),
        ({"profile": {}, "id": "0123456789abcdef"}, 400, "Send a JSON object with profile."),
        ([MARKER], 400, "Send a JSON object with profile."),
        ({"profile": {"notes": MARKER * 10_000}}, 413, "at most 65536 bytes"),
    ],
)
def test_what_is_no_profile_is_refused_without_being_quoted(
    server: ComfyUIServer, store: ProfileStore, body: Any, status: int, message: str
) -> None:
    answer = ask(server, "POST", "/profiles", body)
    assert answer.status_code == status
    assert message in answer.json()["error"]
    assert MARKER not in answer.text
    assert store.entries() == ()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 30_000])
def test_what_is_no_json_is_refused(server: ComfyUIServer, store: ProfileStore, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = requests.post(f"{server.url}/psa/profiles", data=content, headers=headers, timeout=60)
    assert answer.status_code == 400
    assert store.entries() == ()


@pytest.mark.parametrize("profile_id", ["0123456789abcdef", "..%2F..%2Fsecret", "%2e%2e", "active", "a" * 3000])
def test_no_id_leads_out_of_the_store(server: ComfyUIServer, store: ProfileStore, profile_id: str) -> None:
    (store.root.parent / "secret.json").parent.mkdir(parents=True, exist_ok=True)
    (store.root.parent / "secret.json").write_text("{}", encoding="utf-8")
    for method, path, body in EVERYTHING:
        if "{id}" in path:
            assert ask(server, method, path.replace("{id}", profile_id), body).status_code == 404, (method, path)
    assert (store.root.parent / "secret.json").read_text(encoding="utf-8") == "{}"
    assert store.entries() == ()


def test_answers_are_kept_nowhere_and_the_log_says_nothing(server: ComfyUIServer, store: ProfileStore) -> None:
    stored = store.create(Profile.model_validate(PROFILE))
    answer = ask(server, "GET", f"/profiles/{stored.id}")
    assert MARKER in answer.text
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert MARKER not in server.read_log()


def test_a_store_that_cannot_be_read_is_an_error_and_no_empty_list(server: ComfyUIServer, store: ProfileStore) -> None:
    stored = store.create(Profile())
    hidden = store.root.with_name("hidden")
    store.root.rename(hidden)
    store.root.write_text("a file where the folder was", encoding="utf-8")
    try:
        answer = ask(server, "GET", "/profiles")
        assert answer.status_code == 500
        assert "cannot be read" in answer.json()["error"]
    finally:
        store.root.unlink()
        hidden.rename(store.root)
    assert store.read(stored.id) == stored


REBOUND = {"Host": "rebound.example.org:8188", "Origin": "http://rebound.example.org:8188"}


def test_a_prompt_of_another_page_reads_no_profile(server: ComfyUIServer, store: ProfileStore) -> None:
    """ComfyUI takes it, as host and origin agree: a page gave its own name this machine's address."""
    store.activate(store.create(Profile(overrides={"Hate": "ban"})).id)
    prompt = to_prompt(example("psa_first_steps"), server.get("/object_info"))
    (node,) = (node for node in prompt.values() if node["class_type"] == "PSASafetyLevel")
    (sampler,) = (node for node in prompt.values() if node["class_type"] == "KSampler")
    sampler["inputs"]["steps"] = 1
    for reference in ("active", ["1", 0]):
        node |= {"class_type": "PSAUserProfile", "inputs": {"profile_id": reference}}
        answer = requests.post(f"{server.url}/prompt", json={"prompt": prompt}, headers=REBOUND, timeout=60)
        assert answer.status_code == 400
        assert "does not know the name rebound.example.org" in answer.text
    node["inputs"] = {"profile_id": "active"}
    own = {"Origin": server.url}
    assert requests.post(f"{server.url}/prompt", json={"prompt": prompt}, headers=own, timeout=60).status_code == 200
    program = {"Host": "comfyui:8188"}
    assert (
        requests.post(f"{server.url}/prompt", json={"prompt": prompt}, headers=program, timeout=60).status_code == 200
    )


def test_names_that_the_owner_gives_this_computer_are_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSA_HOSTS", "studio.example.org, other.example.org")
    with ComfyUIServer(COMFYUI, prepare_base(tmp_path)) as running:
        for host, status in (("studio.example.org", 200), ("rebound.example.org", 403)):
            assert ask(running, "GET", "/profiles", Host=host).status_code == status
