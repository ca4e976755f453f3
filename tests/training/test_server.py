"""The whole graph in a real ComfyUI server, over its API: pictures, privacy, and failing closed."""

from __future__ import annotations

import dataclasses
import http.client
import io
import json
import re
from typing import Any

import numpy as np
import PIL.Image
import pytest
import requests
from prompts import MARKERS, base_prompt, psa_prompt
from studio import Studio

from comfyui_psa.profiles import StoredProfile, levels, private_fingerprint
from comfyui_psa.training.comfyui import PACK, Image, Prompt
from comfyui_psa.training.errors import ComfyUIError

PRIVATE_WORDS = (*MARKERS.values(), "elderly")


def pixels(image: Image) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(image.content)))


def run(studio: Studio, prompt: Prompt) -> Image:
    (image,) = studio.server.run(prompt)
    return image


def assert_private(text: str) -> None:
    found = [word for word in PRIVATE_WORDS if word in text]
    assert not found


def test_the_graph_follows_the_active_profile(studio: Studio) -> None:
    base = pixels(run(studio, base_prompt()))
    ours = pixels(run(studio, psa_prompt()))
    assert ours.shape == base.shape == (64, 64, 3)
    assert np.abs(ours.astype(int) - base.astype(int)).mean() > 1
    assert np.array_equal(pixels(run(studio, psa_prompt(strength=0.0))), base)
    assert np.array_equal(pixels(run(studio, base_prompt())), base)


def test_levels_give_different_pictures(studio: Studio) -> None:
    pictures = []
    for level in (levels()[0], levels()[5]):
        prompt = psa_prompt()
        prompt["6"] = {"class_type": "PSASafetyLevel", "inputs": {"level": level.label}}
        pictures.append(pixels(run(studio, prompt)))
    assert not np.array_equal(*pictures)


def test_a_gguf_file_is_a_language_model_too(studio: Studio) -> None:
    ours = pixels(run(studio, psa_prompt("Quantised.safetensors")))
    assert not np.array_equal(ours, pixels(run(studio, base_prompt())))


def test_a_released_adapter_with_a_released_embedding_needs_no_language_model(studio: Studio) -> None:
    prompt = psa_prompt("psa_adapter.bin")
    prompt["7"] = {"class_type": "PSALoadEmbedding", "inputs": {"embedding_name": "0000001.npy"}}
    del prompt["6"]
    assert not np.array_equal(pixels(run(studio, prompt)), pixels(run(studio, base_prompt())))


def test_a_compiled_profile_draws_the_same_without_adapter_and_language_model(studio: Studio) -> None:
    prompt = psa_prompt()
    inputs = {"adapter": ["5", 0], "embedding": ["7", 0], "file_name": "mine", "precision": "fp32"}
    switches = {"bans_only": False, "include_categories": False, "overwrite": False}
    prompt["12"] = {"class_type": "PSACompileProfile", "inputs": {**inputs, **switches}}
    theirs = run(studio, prompt)
    compiled = psa_prompt()
    compiled["7"] = {"class_type": "PSALoadCompiledProfile", "inputs": {"compiled_name": "mine.safetensors"}}
    for needless in ("5", "6"):
        del compiled[needless]
    del compiled["8"]["inputs"]["adapter"]
    ours = run(studio, compiled)
    assert np.array_equal(pixels(ours), pixels(theirs))
    assert not np.array_equal(pixels(ours), pixels(run(studio, base_prompt())))
    saved = PIL.Image.open(io.BytesIO(ours.content))
    assert json.loads(saved.info["prompt"])["7"]["inputs"] == {"compiled_name": "mine.safetensors"}
    content = (studio.server.base / "models" / "psa_compiled" / "mine.safetensors").read_bytes()
    for text in (json.dumps(saved.info), content.decode("latin-1")):
        assert_private(text)
        assert "Propaganda" not in text


def test_an_embedding_without_adapter_draws_nothing(studio: Studio) -> None:
    prompt = psa_prompt()
    del prompt["8"]["inputs"]["adapter"]
    with pytest.raises(ComfyUIError, match="no adapter for this embedding, so nobody would be protected"):
        run(studio, prompt)


def test_nothing_of_the_profile_leaves_the_store(studio: Studio) -> None:
    prompt = psa_prompt()
    image = run(studio, prompt)
    saved = PIL.Image.open(io.BytesIO(image.content))
    assert json.loads(saved.info["prompt"])["6"]["inputs"] == {"profile_id": "active"}
    assert_private(json.dumps(saved.info))
    history = studio.server.get("/history")
    newest = json.dumps(max(history.values(), key=lambda entry: entry["prompt"][0]))
    for text in (json.dumps(saved.info), newest):
        assert "Propaganda" not in text
        assert not re.search(r"(?<![0-9a-f.])87(?![0-9a-f])", text)  # the age, and no part of an id or a time
    assert_private(image.content.decode("latin-1"))
    assert_private(json.dumps(history))
    assert_private(json.dumps(studio.server.get("/object_info")))
    assert_private(studio.server.read_log())

    outside = [path for path in studio.server.base.rglob("*") if path.is_file() and "__psa" not in path.parts]
    small = [path for path in outside if path.stat().st_size < 10_000_000 and not path.is_relative_to(PACK)]
    assert any(path.suffix == ".png" for path in small)
    for path in small:
        assert_private(path.name)
        assert_private(path.read_bytes().decode("latin-1"))


def test_the_saved_fingerprint_is_not_a_plain_hash_of_the_profile(studio: Studio) -> None:
    saved = PIL.Image.open(io.BytesIO(run(studio, psa_prompt()).content))
    (fingerprint,) = json.loads(saved.info["prompt"])["6"]["is_changed"]
    # The same function on the same profile in this process: without a secret it would be the same text.
    profile = studio.store.resolve("active").profile
    here = private_fingerprint(json.dumps(profile.model_dump(), sort_keys=True))
    assert len(fingerprint) == len(here) == 16
    assert fingerprint != here


def test_comfyui_serves_nothing_from_the_private_folder(studio: Studio) -> None:
    name = f"{studio.profile.id}.json"
    control = studio.server.base / "user" / "default" / "control.json"
    control.parent.mkdir(exist_ok=True)
    control.write_text("readable", encoding="utf-8")
    assert raw_get(studio, "/userdata/control.json") == (200, "readable")
    for path in (
        f"/userdata/..%2F__psa%2Fprofiles%2F{name}",
        f"/userdata/%2e%2e/__psa/profiles/{name}",
        "/userdata?dir=../__psa/profiles&recurse=true",
        f"/view?type=output&filename={name}&subfolder=../user/__psa/profiles",
        f"/extensions/ComfyUI-PSA/../../user/__psa/profiles/{name}",
    ):
        status, text = raw_get(studio, path)
        assert status >= 400, path
        assert_private(text)


def raw_get(studio: Studio, path: str) -> tuple[int, str]:
    """Send a path as it stands; other clients tidy it up first."""
    connection = http.client.HTTPConnection(studio.server.url.removeprefix("http://"), timeout=30)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode("latin-1")
    finally:
        connection.close()


@pytest.mark.parametrize("profile_id", ["0123456789abcdef", "../../secrets", "", "Active"])
def test_an_unknown_profile_gives_an_error_and_no_image(studio: Studio, profile_id: str) -> None:
    before = sorted(studio.output.iterdir())
    prompt = psa_prompt()
    prompt["6"]["inputs"]["profile_id"] = profile_id
    with pytest.raises(ComfyUIError, match=r"There is no safety profile"):
        studio.server.run(prompt)
    assert sorted(studio.output.iterdir()) == before


@pytest.mark.parametrize(
    ("node", "inputs", "message"),
    [
        ("6", {"class_type": "PSASafetyLevel", "inputs": {"level": "L9 - unheard of"}}, "There is no safety level"),
        ("5", {"class_type": "PSALoadAdapter", "inputs": {"adapter_name": "gone.safetensors"}}, "There is no adapter"),
        ("7", {"class_type": "PSALoadEmbedding", "inputs": {"embedding_name": "gone.npy"}}, "There is no embedding"),
    ],
)
def test_a_missing_file_or_level_stops_the_prompt(
    studio: Studio, node: str, inputs: dict[str, Any], message: str
) -> None:
    before = sorted(studio.output.iterdir())
    with pytest.raises(ComfyUIError, match=message):
        studio.server.run(psa_prompt() | {node: inputs})
    assert sorted(studio.output.iterdir()) == before


def test_an_error_report_tells_nothing_of_the_profile(studio: Studio) -> None:
    before = sorted(studio.output.iterdir())
    with pytest.raises(ComfyUIError, match="hf download someone/Absent-7B") as error:
        studio.server.run(psa_prompt("Absent-7B.safetensors"))
    assert error.value.details["current_inputs"]["profile"] == ["Profile(private)"]
    assert_private(json.dumps(error.value.details))
    assert_private(studio.server.read_log())
    assert sorted(studio.output.iterdir()) == before


def test_editing_a_profile_runs_again_only_what_depends_on_it(studio: Studio) -> None:
    prompt = psa_prompt()
    run(studio, prompt)
    assert executed(studio, prompt) == set()

    stored: StoredProfile = studio.store.read(studio.profile.id)
    edited = studio.store.save(stored, stored.profile.model_copy(update={"age": 30}))
    assert executed(studio, prompt) == {"6", "7", "8", "9", "10", "11"}
    assert executed(studio, prompt) == set()

    studio.store.save(dataclasses.replace(edited), stored.profile)
    assert executed(studio, prompt) == {"6", "7", "8", "9", "10", "11"}


def executed(studio: Studio, prompt: Prompt) -> set[str]:
    """The nodes that ComfyUI did not take from its cache."""
    studio.server.run(prompt)
    newest = max(studio.server.get("/history").values(), key=lambda entry: entry["prompt"][0])
    (cached,) = [data["nodes"] for kind, data in newest["status"]["messages"] if kind == "execution_cached"]
    return set(prompt) - set(cached)


def test_every_node_explains_itself(studio: Studio) -> None:
    info = studio.server.get("/object_info")
    names = {
        "PSALoadAdapter": "Load PSA Adapter",
        "PSASafetyLevel": "Safety Level",
        "PSAUserProfile": "User Safety Profile",
        "PSAEncodeProfile": "Encode Safety Profile",
        "PSALoadEmbedding": "Load Safety Embedding",
        "PSAApply": "Apply PSA",
    }
    assert {node: info[node]["display_name"] for node in names} == names
    for node in names:
        assert info[node]["category"] == "PSA"
        assert info[node]["description"]
        assert all(info[node]["output_tooltips"])
        for group in ("required", "optional"):
            for _, options in info[node]["input"].get(group, {}).values():
                assert options["tooltip"]
        page = requests.get(f"{studio.server.url}/extensions/ComfyUI-PSA/docs/{node}.md", timeout=30)
        assert page.ok
        assert page.text.startswith(f"# {names[node]}")
