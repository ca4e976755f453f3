"""The pack in ComfyUI's real frontend, in a real Chromium, with the classic canvas and with Nodes 2.0."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import PIL.Image
import pytest
import requests
from languages import read_words
from playwright.sync_api import Page
from prompts import CHECKPOINT
from studio import Studio

from comfyui_psa.profiles import find_level
from comfyui_psa.training.comfyui import PACK, to_prompt
from comfyui_psa.training.miniature import MINIATURE
from comfyui_psa.training.miniature.detector import load_detector
from comfyui_psa.training.miniature.recipe import DETECTOR

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
}
EXAMPLES = ("psa_first_steps", "psa_explain", "psa_checkpoint")


def example(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((PACK / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    return content


def queue(page: Page) -> dict[str, Any]:
    """Queue the graph as the button does, and wait for success or an error."""
    result: dict[str, Any] = page.evaluate(
        """() => new Promise((resolve) => {
            app.api.addEventListener('execution_success', (event) => resolve({ok: event.detail}), {once: true});
            app.api.addEventListener('execution_error', (event) => resolve({error: event.detail}), {once: true});
            app.queuePrompt(0, 1);
        })"""
    )
    return result


def run(page: Page, studio: Studio) -> list[PIL.Image.Image]:
    """Queue the graph and return the pictures that it saves or previews, node by node."""
    result = queue(page)
    assert "ok" in result, result
    outputs = studio.server.get("/history")[result["ok"]["prompt_id"]]["outputs"]
    found = [image for node in sorted(outputs, key=int) for image in outputs[node]["images"]]
    answers = [requests.get(f"{studio.server.url}/view", image, timeout=30) for image in found]
    return [PIL.Image.open(io.BytesIO(answer.content)).convert("RGB") for answer in answers]


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


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_opens_and_is_the_prompt_that_we_queue(page: Page, studio: Studio, name: str) -> None:
    workflow = example(name)
    page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
    assert page.get_by_text("Invalid workflow").count() == 0
    exported = page.evaluate("async () => (await app.graphToPrompt()).output")
    ours = to_prompt(workflow, studio.server.get("/object_info"))
    theirs = {
        node_id: {"class_type": node["class_type"], "inputs": node["inputs"]} for node_id, node in exported.items()
    }
    assert theirs == ours


def test_first_steps_run_as_they_are(page: Page, studio: Studio) -> None:
    page.evaluate("(workflow) => app.loadGraphData(workflow)", example("psa_first_steps"))
    detector = load_detector(MINIATURE / DETECTOR)

    def rings() -> int:
        pictures = run(page, studio)
        assert [picture.size for picture in pictures] == [(96, 96)] * 4
        return sum("Sexuality" in seen.glyphs for seen in detector.see(pictures))

    assert rings() <= 1
    page.evaluate(
        """(level) => {
            app.graph.nodes.find((node) => node.type === 'PSASafetyLevel').widgets[0].value = level;
        }""",
        find_level("L0").label,
    )
    assert rings() >= 3


def test_explain_points_at_what_is_held_back(page: Page, studio: Studio) -> None:
    """Where it glows, the picture without PSA has its ring: that is where the two rows differ most."""
    page.evaluate("(workflow) => app.loadGraphData(workflow)", example("psa_explain"))
    pictures = [np.asarray(picture, dtype=np.float32) for picture in run(page, studio)]
    for without, with_psa, explained in zip(pictures[:4], pictures[4:8], pictures[8:], strict=True):
        held_back = np.abs(without - with_psa).mean(axis=2)
        heat = explained[..., 0] - explained[..., 2]  # grey where nothing glows
        glowing = heat > np.quantile(heat, 0.9)
        assert held_back[glowing].mean() > 2 * held_back[~glowing].mean()


def test_the_example_with_a_checkpoint_runs(page: Page, studio: Studio) -> None:
    page.evaluate("(workflow) => app.loadGraphData(workflow)", example("psa_checkpoint"))
    page.evaluate(
        """([checkpoint, adapter]) => {
            const widget = (type, name) => app.graph.nodes.find((node) => node.type === type)
                .widgets.find((widget) => widget.name === name);
            widget('CheckpointLoaderSimple', 'ckpt_name').value = checkpoint;
            widget('PSALoadAdapter', 'adapter_name').value = adapter;
            widget('EmptyLatentImage', 'width').value = 64;
            widget('EmptyLatentImage', 'height').value = 64;
            widget('KSampler', 'steps').value = 2;
        }""",
        [CHECKPOINT, "SmolLM2-135M-Instruct.safetensors"],
    )
    (picture,) = run(page, studio)
    assert picture.size == (64, 64)


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
