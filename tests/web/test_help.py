"""The help pages of the nodes, with a picture of each."""

from __future__ import annotations

import PIL.Image
import pytest
from frontend import add_node
from playwright.sync_api import Page, expect
from schemas import SCHEMAS

from comfyui_psa.training.comfyui import PACK

DOCS = PACK / "web" / "docs"


@pytest.mark.parametrize("node", SCHEMAS)
def test_every_node_has_a_page_with_a_picture(node: str) -> None:
    text = (DOCS / f"{node}.md").read_text(encoding="utf-8")
    schema = SCHEMAS[node]
    assert text.startswith(f"# {schema.display_name}\n\n![The node {schema.display_name}]({node}.webp)\n")
    assert all(f"| `{given.id}` |" in text for given in schema.inputs)
    width, height = PIL.Image.open(DOCS / f"{node}.webp").size
    assert width > 300
    assert height > 100


def test_the_page_is_in_comfyuis_help(empty_page: Page) -> None:
    add_node(empty_page, "PSAApply")
    empty_page.get_by_test_id("info-button").click()
    picture = empty_page.get_by_role("img", name="The node Apply PSA")
    expect(picture).to_be_visible()
    assert picture.evaluate("(picture) => picture.decode().then(() => picture.naturalWidth)") > 300
