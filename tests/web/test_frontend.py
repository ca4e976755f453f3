"""The pack in ComfyUI's real frontend, in a real Chromium, with the classic canvas and with Nodes 2.0."""

from __future__ import annotations

import requests
from languages import read_words
from playwright.sync_api import Page
from studio import Studio

NODES = {
    "PSALoadAdapter": "Load PSA Adapter",
    "PSALoadMiniature": "Load PSA Miniature",
    "PSASafetyLevel": "Safety Level",
    "PSAUserProfile": "User Safety Profile",
    "PSAStrictestProfile": "Strictest Safety Profile",
    "PSAEncodeProfile": "Encode Safety Profile",
    "PSAProfileToPrompt": "Safety Profile to Prompt",
    "PSALoadEmbedding": "Load Safety Embedding",
    "PSAApply": "Apply PSA",
    "PSAExplain": "Explain PSA: Words",
    "PSAExplainPicture": "Explain PSA: Picture",
    "PSASafetyLevels": "Safety Levels",
    "PSAMixProfiles": "Mix Safety Profiles",
    "PSABatchProfiles": "Batch Safety Profiles",
    "PSARepeatLatent": "Same Latent for Everyone",
    "PSACompareSheet": "Compare Sheet",
}


def test_all_nodes_can_be_made(page: Page) -> None:
    made = page.evaluate("(names) => names.map((name) => LiteGraph.createNode(name)?.title)", list(NODES))
    assert made == list(NODES.values())


def test_nodes_speak_comfyuis_language(page: Page, studio: Studio) -> None:
    """In German: frontend 1.32.9 loses the words of packs in languages that it ships itself."""
    assert page.context.browser
    german = read_words("de", "nodeDefs")
    requests.post(f"{studio.server.url}/settings", json={"Comfy.Locale": "de"}, timeout=30).raise_for_status()
    try:
        other = page.context.browser.new_page()
        other.goto(studio.server.url)
        other.wait_for_function("() => !!window.LiteGraph?.registered_node_types?.PSAApply", timeout=120_000)
        shown = other.evaluate(
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
        other.close()
    finally:
        requests.post(f"{studio.server.url}/settings", json={"Comfy.Locale": "en"}, timeout=30).raise_for_status()
    for part in ("display_name", "description"):
        assert shown[part] == german[f"PSAApply.{part}"]
    assert {name for name, _ in shown["slots"]} >= {"model", "adapter", "embedding"}
    for name, label in [*shown["slots"], *shown["widgets"]]:
        assert label == german[f"PSAApply.inputs.{name}.name"]


def test_a_shared_workflow_holds_the_reference_alone(page: Page, studio: Studio) -> None:
    saved = page.evaluate(
        """() => {
            app.graph.clear();
            app.graph.add(LiteGraph.createNode('PSAUserProfile'));
            return app.graph.serialize();
        }"""
    )
    (node,) = saved["nodes"]
    assert node["widgets_values"] == ["active"]
