"""ComfyUI with accounts (``--multi-user``): each has profiles of its own, and prompts run with their owner's."""

from __future__ import annotations

import io
import json
import stat
import uuid
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import requests
from studio import COMFYUI

from comfyui_psa.profiles import CATEGORIES
from comfyui_psa.training.comfyui import PACK, ComfyUIServer, Prompt, prepare_base, to_prompt
from comfyui_psa.training.errors import ComfyUIError

WORKFLOW = PACK / "example_workflows" / "psa_first_steps.json"
PROFILES = {"ann": {"overrides": dict.fromkeys(CATEGORIES, "ban")}, "bob": {"overrides": {}}}


@dataclass(frozen=True)
class Accounts:
    server: ComfyUIServer
    ids: dict[str, str]
    profiles: dict[str, str]

    def headers(self, name: str) -> dict[str, str]:
        return {"comfy-user": self.ids.get(name, name)}

    def ask(self, name: str, method: str, path: str, body: Any = None) -> requests.Response:
        url = f"{self.server.url}/psa{path}"
        return requests.request(method, url, json=body, headers=self.headers(name), timeout=60)


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Accounts]:
    """Three accounts, of which two have an active profile."""
    base = prepare_base(tmp_path_factory.mktemp("accounts"))
    with ComfyUIServer(COMFYUI, base, "--multi-user") as server:
        ids = {}
        for name in ("ann", "bob", "eve"):
            made = requests.post(f"{server.url}/users", json={"username": name}, timeout=60)
            ids[name] = made.json()
        found = Accounts(server, ids, {})
        for name, profile in PROFILES.items():
            made = found.ask(name, "POST", "/profiles", {"profile": profile}).json()
            found.profiles[name] = made["id"]
            assert found.ask(name, "POST", f"/profiles/{made['id']}/activate", {}).ok
        yield found


@pytest.fixture(scope="module")
def prompt(accounts: Accounts) -> Prompt:
    """The first example, with the profile of whoever queues it."""
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    found = to_prompt(workflow, accounts.server.get("/object_info"))
    (level,) = [node for node in found.values() if node["class_type"] == "PSASafetyLevel"]
    level.update({"class_type": "PSAUserProfile", "inputs": {"profile_id": "active"}})
    (sampler,) = [node for node in found.values() if node["class_type"] == "KSampler"]
    sampler["inputs"].update({"seed": 3, "steps": 4})
    (latent,) = [node for node in found.values() if node["class_type"] == "EmptyLatentImage"]
    latent["inputs"]["batch_size"] = 1
    return found


def with_profile(prompt: Prompt, reference: str) -> Prompt:
    changed = deepcopy(prompt)
    (node,) = [node for node in changed.values() if node["class_type"] == "PSAUserProfile"]
    node["inputs"]["profile_id"] = reference
    return changed


def draw(accounts: Accounts, name: str, prompt: Prompt) -> np.ndarray:
    (image,) = accounts.server.run(prompt, headers=accounts.headers(name))
    return np.asarray(PIL.Image.open(io.BytesIO(image.content)))


def test_everybody_sees_their_own_profiles_alone(accounts: Accounts) -> None:
    for name in accounts.ids:
        listed = [entry["id"] for entry in accounts.ask(name, "GET", "/profiles").json()["profiles"]]
        assert listed == ([accounts.profiles[name]] if name in PROFILES else [])
        options = requests.get(
            f"{accounts.server.url}/object_info/PSAUserProfile", headers=accounts.headers(name), timeout=60
        ).json()["PSAUserProfile"]["input"]["required"]["profile_id"][1]["options"]
        assert options == ["active", *listed, "L0", "L1", "L2", "L3", "L4", "L5"]


def test_nobody_reads_changes_or_activates_anothers(accounts: Accounts) -> None:
    place = f"/profiles/{accounts.profiles['ann']}"
    before = accounts.ask("ann", "GET", place).json()
    for method, path, body in (
        ("GET", place, None),
        ("PUT", place, {"revision": before["revision"], "profile": {}}),
        ("DELETE", place, None),
        ("POST", f"{place}/activate", {}),
        ("POST", f"{place}/restore", {}),
    ):
        assert accounts.ask("bob", method, path, body).status_code == 404, method
    assert accounts.ask("ann", "GET", place).json() == before


@pytest.mark.parametrize("name", ["", "nobody", "default", "__psa", "../ann"])
def test_who_has_no_account_gets_nothing(accounts: Accounts, prompt: Prompt, name: str) -> None:
    for method, path, body in (("GET", "/profiles", None), ("POST", "/profiles", {"profile": {}})):
        answer = accounts.ask(name, method, path, body)
        assert answer.status_code == 403
        assert "it is not known which of them asks" in answer.json()["error"]
    with pytest.raises(ComfyUIError, match="it is not known which of them asks"):
        draw(accounts, name, prompt)


def test_a_prompt_runs_with_the_profile_of_who_queued_it(accounts: Accounts, prompt: Prompt) -> None:
    """The same prompt by turns, so that nothing of the one before serves for the next."""
    pictures = {name: draw(accounts, name, prompt) for name in ("ann", "bob")}
    assert not np.array_equal(pictures["ann"], pictures["bob"])
    for name in ("ann", "bob", "ann"):
        again = deepcopy(prompt)
        (saver,) = [node for node in again.values() if node["class_type"] == "SaveImage"]
        saver["inputs"]["filename_prefix"] = uuid.uuid4().hex  # else nothing is saved again
        assert np.array_equal(draw(accounts, name, again), pictures[name])
        own = with_profile(again, accounts.profiles[name])
        assert np.array_equal(draw(accounts, name, own), pictures[name])


def test_nobody_runs_anothers_profile_and_who_has_none_gets_no_picture(accounts: Accounts, prompt: Prompt) -> None:
    with pytest.raises(ComfyUIError, match="There is no safety profile"):
        draw(accounts, "bob", with_profile(prompt, accounts.profiles["ann"]))
    with pytest.raises(ComfyUIError, match="No safety profile is active"):
        draw(accounts, "eve", prompt)


def test_what_comes_with_a_picture_opens_no_other_accounts_run(accounts: Accounts, prompt: Prompt) -> None:
    """A prompt from a picture's metadata carries the fingerprints of the run that drew it."""
    (image,) = accounts.server.run(prompt, headers=accounts.headers("ann"))
    anns = PIL.Image.open(io.BytesIO(image.content))
    carried = json.loads(anns.info["prompt"])
    (profile,) = [node for node in carried.values() if node["class_type"] == "PSAUserProfile"]
    assert profile["is_changed"]
    assert not np.array_equal(draw(accounts, "bob", carried), np.asarray(anns))
    assert np.array_equal(draw(accounts, "ann", carried), np.asarray(anns))


def test_an_id_that_is_sent_along_moves_no_prompt_to_another_account(accounts: Accounts, prompt: Prompt) -> None:
    prompt_id = str(uuid.uuid4())
    answers = {
        name: requests.post(
            f"{accounts.server.url}/prompt",
            json={"prompt": prompt, "prompt_id": prompt_id},
            headers=accounts.headers(name),
            timeout=60,
        ).json()
        for name in ("ann", "bob")
    }
    assert len({answers["ann"]["prompt_id"], answers["bob"]["prompt_id"], prompt_id}) == 3


def test_stores_lie_apart_and_only_the_server_reads_them(accounts: Accounts) -> None:
    private = accounts.server.base / "user" / "__psa"
    found = sorted(path for path in private.rglob("*.json"))
    assert [path.relative_to(private).parts[:2] for path in found] == sorted(
        ("accounts", accounts.ids[name]) for name in PROFILES
    )
    folders = [private, *(path for path in private.rglob("*") if path.is_dir())]
    assert {stat.S_IMODE(folder.stat().st_mode) & 0o077 for folder in folders} == {0}


def test_without_accounts_the_header_changes_nothing(tmp_path: Path) -> None:
    with ComfyUIServer(COMFYUI, prepare_base(tmp_path)) as server:
        for headers in ({}, {"comfy-user": "somebody"}):
            made = requests.post(f"{server.url}/psa/profiles", json={"profile": {}}, headers=headers, timeout=60)
            assert made.status_code == 201
        listed = requests.get(f"{server.url}/psa/profiles", timeout=60).json()["profiles"]
    assert len(listed) == 2
