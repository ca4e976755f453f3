"""The pack in ComfyUI's real frontend, in a real Chromium, with the classic canvas and with Nodes 2.0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import requests
from languages import read_words
from playwright.sync_api import Browser, Page
from schemas import SCHEMAS

from comfyui_psa.training.comfyui import ComfyUIServer


def test_all_nodes_can_be_made(page: Page) -> None:
    made = page.evaluate("(names) => names.map((name) => LiteGraph.createNode(name)?.title)", list(SCHEMAS))
    assert made == [schema.display_name for schema in SCHEMAS.values()]


@pytest.mark.parametrize(("frontend", "language"), [("1.32", "de"), ("1.58", "fr"), ("1.58", "ja")])
def test_nodes_speak_comfyuis_language(
    servers: Callable[[str], ComfyUIServer], chromium: Browser, frontend: str, language: str
) -> None:
    """In the old frontend in German: 1.32.9 loses the words of packs in languages that it ships itself."""
    server, words = servers(frontend), read_words(language, "nodeDefs")
    requests.post(f"{server.url}/settings", json={"Comfy.Locale": language}, timeout=30).raise_for_status()
    try:
        page = chromium.new_page()
        page.goto(server.url)
        page.wait_for_function("() => !!window.LiteGraph?.registered_node_types?.PSAApply", timeout=120_000)
        shown = page.evaluate(
            """() => {
                const node = LiteGraph.createNode('PSAApply');
                return {
                    display_name: node.title,
                    description: node.constructor.nodeData.description,
                    slots: node.inputs.map((slot) => [slot.name, slot.localized_name]),
                    widgets: node.widgets.filter((widget) => widget.type !== 'psa-card')
                        .map((widget) => [widget.name, widget.label]),
                };
            }"""
        )
        page.close()
    finally:
        requests.post(f"{server.url}/settings", json={"Comfy.Locale": "en"}, timeout=30).raise_for_status()
    for part in ("display_name", "description"):
        assert shown[part] == words[f"PSAApply.{part}"]
    assert {name for name, _ in shown["slots"]} >= {"model", "adapter", "embedding"}
    for name, label in [*shown["slots"], *shown["widgets"]]:
        assert label == words[f"PSAApply.inputs.{name}.name"]


def test_a_shared_workflow_holds_the_reference_alone(page: Page) -> None:
    saved = page.evaluate(
        """() => {
            app.graph.clear();
            app.graph.add(LiteGraph.createNode('PSAUserProfile'));
            return app.graph.serialize();
        }"""
    )
    (node,) = saved["nodes"]
    assert node["widgets_values"] == ["active"]
