"""What people share, and what lies about on their machine: a reference to a profile, and nothing that it says."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import PIL.Image
import pytest
import requests
from examples import example
from frontend import add_card, load_page, open_tab, queue
from playwright.sync_api import Page, Request, WebSocket, expect
from prompts import MARKERS

from comfyui_psa.profiles import Profile, ProfileStore
from comfyui_psa.profiles.wording import WORDS
from comfyui_psa.training.comfyui import ComfyUIServer

BANNED_WORD = WORDS["Self-Harm"][-1]  # of somebody who is twelve


@pytest.fixture
def page(empty_page: Page) -> Page:
    return empty_page


@contextmanager
def everything_sent(page: Page) -> Iterator[list[bytes]]:
    """Collect addresses and bodies of requests, and both ways of the socket, but for the store's own routes."""
    seen: list[bytes] = []
    finished: list[Request] = []

    def note(frame: str | bytes) -> None:
        seen.append(frame.encode() if isinstance(frame, str) else frame)

    def listen(socket: WebSocket) -> None:
        socket.on("framereceived", note)
        socket.on("framesent", note)

    def remember(request: Request) -> None:
        finished.append(request)

    page.on("websocket", listen)
    page.on("requestfinished", remember)
    yield seen
    page.remove_listener("websocket", listen)
    page.remove_listener("requestfinished", remember)
    for request in finished:
        if "/psa/" not in request.url:
            seen.append(request.url.encode() + b" " + (request.post_data_buffer or b""))


def names_somebody(content: bytes) -> list[str]:
    return [marker for marker in (*MARKERS.values(), BANNED_WORD) if marker.encode() in content]


def graph_that_saves_everything(page: Page) -> None:
    """First steps under the active profile: a picture as PNG and WebP, its latent, and the model."""
    page.evaluate(
        """async (workflow) => {
            await app.loadGraphData(workflow);
            const find = (type) => app.graph.nodes.find((node) => node.type === type);
            const widget = (node, name) => node.widgets.find((widget) => widget.name === name);
            const add = (type, from, slot) => {
                const node = LiteGraph.createNode(type);
                app.graph.add(node);
                from.connect(slot, node, 0);
                return node;
            };
            widget(find('EmptyLatentImage'), 'batch_size').value = 1;
            widget(find('KSampler'), 'steps').value = 1;
            add('SaveLatent', find('KSampler'), 0);
            add('SaveAnimatedWEBP', find('VAEDecode'), 0);
            add('ModelSave', find('PSAApply'), 0);
            const user = LiteGraph.createNode('PSAUserProfile');
            app.graph.add(user);
            app.graph.remove(find('PSASafetyLevel'));
            user.connect(0, find('PSAEncodeProfile'), 'profile');
            const words = LiteGraph.createNode('PSAProfileToPrompt');
            app.graph.add(words);
            find('PSALoadMiniature').connect(1, words, 'clip');
            user.connect(0, words, 'profile');
            words.connect(0, find('KSampler'), 'negative');
        }""",
        example("psa_first_steps"),
    )


def run_command(page: Page, command: str, answer: str | None = None) -> None:
    """Run a command of the menu, and answer its question for a name."""
    page.evaluate("(command) => void app.extensionManager.command.execute(command)", command)
    if answer is not None:
        field = page.get_by_role("dialog").get_by_role("textbox")
        field.fill(answer)
        field.press("Enter")
        expect(field).to_have_count(0)


def download_picture(page: Page, path: Path) -> bytes:
    """Save the picture of Save Image as the frontend's menu does; return the file and its texts, uncompressed."""
    page.wait_for_function("() => Object.values(app.nodeOutputs).some((output) => output.images?.length)")
    with page.expect_download() as download:
        page.evaluate(
            """() => {
                const outputs = Object.values(app.nodeOutputs).flatMap((output) => output.images ?? []);
                const image = outputs.find((image) => image.filename.endsWith('.png'));
                const link = document.createElement('a');
                link.href = app.api.apiURL(`/view?${new URLSearchParams(image)}`);
                link.download = image.filename;
                link.click();
            }"""
        )
    download.value.save_as(path)
    info = PIL.Image.open(path).info
    assert "workflow" in info
    return path.read_bytes() + repr(info).encode()


def test_what_people_share_holds_the_reference_alone(
    page: Page, server: ComfyUIServer, store: ProfileStore, tmp_path: Path
) -> None:
    store.activate(store.create(Profile(age=12, **MARKERS)).id)
    shared: dict[str, bytes] = {}
    with everything_sent(page) as sent:
        nodes2 = page.evaluate("() => app.extensionManager.setting.get('Comfy.VueNodes.Enabled')")
        load_page(page, server.url, nodes2)  # so that its socket is listened to
        tab = open_tab(page)
        tab.get_by_role("button", name=f"Edit {MARKERS['name']}").click()
        graph_that_saves_everything(page)
        card = page.locator(".psa-card").filter(has=page.get_by_role("meter"))
        expect(card).to_contain_text(MARKERS["name"])  # on the screen

        result = queue(page)
        assert "ok" in result, result
        run_command(page, "Comfy.SaveWorkflow", f"shared-{id(page)}")
        for name in ("Comfy.ExportWorkflow", "Comfy.ExportWorkflowAPI"):
            with page.expect_download() as download:
                run_command(page, name, "exported")
            download.value.save_as(tmp_path / name)
            shared[name] = (tmp_path / name).read_bytes()
        shared["downloaded picture"] = download_picture(page, tmp_path / "picture.png")
        shared["copied, pasted, undone"] = page.evaluate(
            """async () => {
                const states = [];
                const note = () => states.push(app.graph.serialize(), {...localStorage}, {...sessionStorage});
                app.canvas.selectItems(app.graph.nodes.filter((node) => node.type === 'PSAUserProfile'));
                app.canvas.copyToClipboard();
                app.canvas.pasteFromClipboard();
                note();
                const tracker = app.extensionManager.workflow.activeWorkflow.changeTracker;
                tracker.checkState();
                await tracker.undo();
                note();
                states.push(tracker.undoQueue, tracker.redoQueue, tracker.activeState);
                return JSON.stringify(states);
            }"""
        ).encode()
        page.evaluate(
            """() => {
                const node = app.graph.nodes.find((node) => node.type === 'PSAApply');
                node.widgets.find((widget) => widget.name === 'end_percent').value = 0;
            }"""
        )
        failed = queue(page)
        assert "would never act" in failed["error"]["exception_message"]
        shared["error report"] = json.dumps(failed).encode()
        page.keyboard.press("Escape")
    shared["network"] = b"\n".join(sent)
    assert b'"PSAUserProfile"' in shared["network"]
    shared["history"] = requests.get(f"{server.url}/history", timeout=30).content
    assert b"KSampler" in shared["history"]
    shared["log"] = server.read_log().encode()
    for what, content in shared.items():
        assert names_somebody(content) == [], what

    private = store.root.parent
    files = [path for path in server.base.rglob("*") if path.is_file() and private not in path.parents]
    assert {".png", ".webp", ".latent", ".safetensors", ".json"} <= {path.suffix for path in files}
    for path in files:
        content = path.read_bytes()
        assert names_somebody(content) == [], path
        if path.suffix == ".png":  # whose texts may be compressed
            assert names_somebody(repr(PIL.Image.open(io.BytesIO(content)).info).encode()) == [], path
    workflows = [path for path in files if path.name.startswith("shared-")]
    (user,) = [node for node in json.loads(workflows[-1].read_text())["nodes"] if node["type"] == "PSAUserProfile"]
    assert user["widgets_values"] == ["active"]


def test_a_shared_picture_runs_under_the_boundaries_of_whoever_opens_it(page: Page, store: ProfileStore) -> None:
    """The reference is what is in the file, and it follows the active profile from one person to the next."""
    stored = store.create(Profile(name="First", overrides={"Hate": "ban"}))
    store.activate(stored.id)
    open_tab(page)
    card = add_card(page)
    expect(card.get_by_role("meter")).to_have_attribute("aria-valuetext", "bans 1 of 7")
    workflow = page.evaluate("() => app.graph.serialize()")
    store.delete(stored.id)
    store.activate(store.create(Profile(name="Second", age=12)).id)
    page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
    expect(card.get_by_role("meter")).to_have_attribute("aria-valuetext", "bans 3 of 7")
