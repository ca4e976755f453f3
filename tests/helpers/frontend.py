"""ComfyUI's real frontend in a real Chromium, and how people use this pack in it."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import PIL.Image
import requests
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from studio import COMFYUI

from comfyui_psa.training.comfyui import ComfyUIServer, Prompt

expect.set_options(timeout=30_000)  # a machine that does something else besides

# Options of ComfyUI for the newest frontend instead of its own (`make frontend`).
NEWEST = ("--front-end-root", str(COMFYUI.parent / "frontend"))

OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-sync",
    "--disable-component-update",
    "--no-first-run",
)


@contextmanager
def open_chromium() -> Iterator[Browser]:
    """Start the Chromium of this machine."""
    system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=system, args=list(OPTIONS))
        yield browser
        browser.close()


def open_page(chromium: Browser, url: str, nodes2: bool) -> Page:
    """Open ComfyUI at ``url``, with the classic canvas or with Nodes 2.0, as somebody who was never there."""
    page = chromium.new_page(viewport={"width": 1600, "height": 900})
    load_page(page, url, nodes2)
    return page


class Pages:
    """The page of a ComfyUI at a URL, in one of its renderers; each is opened once, and all but the last one sleep."""

    def __init__(self, chromium: Browser) -> None:
        self._chromium = chromium
        self._opened: dict[tuple[str, bool], Page] = {}
        self._awake: Page | None = None

    def __call__(self, url: str, nodes2: bool) -> Page:
        if (url, nodes2) not in self._opened:
            self._opened[url, nodes2] = open_page(self._chromium, url, nodes2)
        page = self._opened[url, nodes2]
        if page is not self._awake:
            if self._awake is not None:
                _set_state(self._awake, "frozen")  # ComfyUI draws all the time
            _set_state(page, "active")
            self._awake = page
        return page


def _set_state(page: Page, state: str) -> None:
    session = page.context.new_cdp_session(page)
    session.send("Page.setWebLifecycleState", {"state": state})
    session.detach()


def load_page(page: Page, url: str, nodes2: bool) -> None:
    """Load ComfyUI into a page, and wait until it is there."""
    settings = {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": nodes2}
    requests.post(f"{url}/settings", json=settings, timeout=30).raise_for_status()
    page.goto(url)
    page.wait_for_function(
        "() => !!(window.app?.extensionManager && window.LiteGraph?.registered_node_types?.PSAApply)", timeout=120_000
    )


def load_workflow(page: Page, workflow: Mapping[str, Any]) -> None:
    """Open a workflow, without the dialogs that name what is missing."""
    silent = {"showMissingModelsDialog": False, "showMissingNodesDialog": False, "silentAssetErrors": True}
    page.evaluate(
        "([workflow, silent]) => app.loadGraphData(workflow, true, true, null, silent)", [dict(workflow), silent]
    )


def exported_prompt(page: Page) -> Prompt:
    """What the open graph would queue."""
    exported = page.evaluate("async () => (await app.graphToPrompt()).output")
    return {number: {"class_type": node["class_type"], "inputs": node["inputs"]} for number, node in exported.items()}


def queue(page: Page) -> dict[str, Any]:
    """Queue the graph as the button does, and return its success ("ok") or its error once the history holds it.

    ComfyUI tells of a success first, writes its history then, and says last that no node is executing.
    """
    result: dict[str, Any] = page.evaluate(
        """() => new Promise((resolve) => {
            let result;
            app.api.addEventListener('execution_success', (event) => { result = {ok: event.detail}; }, {once: true});
            app.api.addEventListener('execution_error', (event) => { result = {error: event.detail}; }, {once: true});
            app.api.addEventListener('executing', function ended(event) {
                if (result === undefined || event.detail) return;
                app.api.removeEventListener('executing', ended);
                resolve(result);
            });
            app.queuePrompt(0, 1);
        })"""
    )
    return result


def unmute(page: Page) -> int:
    """Let the muted nodes of the graph run as well, and look for new files, as Ctrl+M and R do; return how many."""
    number: int = page.evaluate(
        """async () => {
            await app.refreshComboInNodes();
            const muted = app.graph.nodes.filter((node) => node.mode === LiteGraph.NEVER);
            muted.forEach((node) => { node.mode = LiteGraph.ALWAYS; });
            app.canvas.setDirty(true, true);
            return muted.length;
        }"""
    )
    return number


def run(page: Page, server: ComfyUIServer) -> list[PIL.Image.Image]:
    """Queue the graph, and return the pictures that it saves or previews, node by node."""
    result = queue(page)
    assert "ok" in result, result
    outputs = server.get("/history")[result["ok"]["prompt_id"]]["outputs"]
    found = [image for node in sorted(outputs, key=int) for image in outputs[node]["images"]]
    answers = [requests.get(f"{server.url}/view", image, timeout=30) for image in found]
    return [PIL.Image.open(io.BytesIO(answer.content)).convert("RGB") for answer in answers]


def open_tab(page: Page) -> Locator:
    page.get_by_role("button", name="Safety Profiles").first.click()
    tab = page.get_by_role("region", name="Safety Profiles")
    expect(tab).to_be_visible()
    expect(tab).not_to_have_attribute("aria-busy", "true")  # the list of before may name profiles that are gone
    return tab


def add_node(page: Page, node_type: str) -> None:
    """Put a node into the middle of the canvas, and select it."""
    page.evaluate(
        """(type) => {
            const node = LiteGraph.createNode(type);
            app.graph.add(node);
            app.canvas.centerOnNode(node);
            app.canvas.selectItems([node]);
        }""",
        node_type,
    )


def add_card(page: Page, reference: str = "active") -> Locator:
    page.evaluate(
        """(reference) => {
            const node = LiteGraph.createNode('PSAUserProfile');
            app.graph.add(node);
            node.widgets.find((widget) => widget.name === 'profile_id').value = reference;
            node.onConfigure({});
            app.canvas.centerOnNode(node);
        }""",
        reference,
    )
    return page.locator(".psa-card")


def banned(place: Locator) -> list[str]:
    return place.locator(".psa-banned .psa-word").all_inner_texts()


def violations(page: Page, *places: str) -> list[str]:
    """What axe-core finds wrong in these places of the page, by their CSS selectors, and contrast it cannot decide.

    What ComfyUI shows in front of a place hides it from axe, and says nothing about its colours.
    """
    found = Axe().run(page, context={"include": [[place] for place in places]}).response
    undecided = [check for check in found["incomplete"] if check["id"] == "color-contrast"]
    return [
        f"{check['id']}: {node['html'][:200]} {node['failureSummary']}"
        for check in (*found["violations"], *undecided)
        for node in check["nodes"]
        if "overlapped by another element" not in node["failureSummary"]
    ]
