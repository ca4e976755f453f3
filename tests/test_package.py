"""The package as it is installed: what it requires, and what its files say of it."""

from __future__ import annotations

import json
import re
from importlib import metadata

from comfyui_psa.profiles import Profile
from comfyui_psa.training.comfyui import PACK


def test_the_command_line_needs_what_the_nodes_need() -> None:
    lines = (PACK / "requirements.txt").read_text(encoding="utf-8").splitlines()
    nodes = [line for line in lines if line and not line.startswith("#")]
    installed = [line for line in metadata.requires("personalized-safety-alignment") or [] if "extra ==" not in line]
    split = {re.split(r"[<>=!]", line)[0] for line in installed}
    assert {re.split(r"[<>=!]", line)[0] for line in nodes} <= split
    assert "torch" in split - {re.split(r"[<>=!]", line)[0] for line in nodes}


def test_artists_are_not_given_training_packages() -> None:
    text = (PACK / "requirements.txt").read_text(encoding="utf-8")
    assert not re.search(r"^(torch|diffusers|datasets|pytest|typer)\b", text, re.MULTILINE)


def test_the_exported_schema_is_the_profiles() -> None:
    exported = json.loads((PACK / "profiles" / "profile.schema.json").read_text(encoding="utf-8"))
    assert exported == Profile.model_json_schema()
