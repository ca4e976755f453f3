"""Draws the pictures of the examples: the graph, with its results where the miniature runs it, or the result alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import PIL.Image
from frontend import load_workflow, run, unmute
from playwright.sync_api import Page, expect

from comfyui_psa.training.comfyui import PACK, ComfyUIServer

FOLDER = PACK / "example_workflows"
STILLS = {"psa_sd15": 16, "psa_sdxl": 70, "psa_beside_others": 16, "psa_beside_ipadapter": 16}  # layers of a checkpoint
GRAPHS = ("psa_first_steps", "psa_levels", "psa_explain", "psa_compiled")
OVERLAYS = ("Comfy.Minimap.Visible", "Comfy.Graph.CanvasInfo", "Comfy.Graph.CanvasMenu")
WIDTH, README_WIDTH = 820, 1640  # of a graph, in pixels
EXPLAINED = 288  # of a picture in the README
GAP = 16
FIT = """() => {
    const boxes = app.graph.nodes.map((node) => node.boundingRect);
    const left = Math.min(...boxes.map((box) => box[0])), top = Math.min(...boxes.map((box) => box[1]));
    const right = Math.max(...boxes.map((box) => box[0] + box[2]));
    const bottom = Math.max(...boxes.map((box) => box[1] + box[3]));
    const canvas = app.canvas.canvas.getBoundingClientRect();
    const margin = 20, beside = 80, above = 120;  // what ComfyUI shows around the canvas
    const scale = Math.min(
        (canvas.width - 2 * beside) / (right - left), (canvas.height - 2 * above) / (bottom - top));
    app.canvas.deselectAll();
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [beside / scale - left, above / scale - top];
    app.canvas.setDirty(true, true);
    app.canvas.draw(true, true);
    return {
        x: canvas.left + beside - margin, y: canvas.top + above - margin,
        width: (right - left) * scale + 2 * margin, height: (bottom - top) * scale + 2 * margin,
    };
}"""
PICTURES_ARE_THERE = """() => app.graph.nodes.every((node) =>
    !['PreviewImage', 'SaveImage'].includes(node.type) || node.imgs?.every((image) => image.complete))"""


def make_room(page: Page) -> None:
    """Let a page show graphs, in its classic canvas, and nothing in front of them."""
    page.set_viewport_size({"width": 1900, "height": 1200})
    page.evaluate("(names) => names.forEach((name) => app.extensionManager.setting.set(name, false))", OVERLAYS)


def draw_examples(page: Page, server: ComfyUIServer) -> None:
    """Run the examples of the miniature, and write their pictures and what the README shows of them."""
    for name in GRAPHS:
        pictures = _run(page, server, name)
        if unmute(page):
            run(page, server)
        page.wait_for_function(PICTURES_ARE_THERE)
        _graph(page, WIDTH).save(FOLDER / f"{name}.jpg", quality=80)
        if name == "psa_explain":
            _draw_explained(pictures)
            _draw_words(page, server)
    for name in ("psa_one_batch", "psa_mix", "psa_audience", "psa_schedule"):
        (sheet,) = _run(page, server, name)
        _save_result(sheet, name)
    pairs = _run(page, server, "psa_regions")
    together = PIL.Image.new("RGB", (2 * pairs[0].width + GAP, 2 * pairs[0].height + GAP), "white")
    for number, pair in enumerate(pairs):
        together.paste(pair, (number % 2 * (pair.width + GAP), number // 2 * (pair.height + GAP)))
    _save_result(together, "psa_regions")


def draw_stills(page: Page) -> None:
    """Write the pictures of examples with a checkpoint, which do not run here, and of the README's graph."""
    for name, layers in STILLS.items():
        load_workflow(page, json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))
        expect(page.get_by_text(f"{layers} cross-attention layers")).to_be_visible()
        _graph(page, WIDTH).save(FOLDER / f"{name}.jpg", quality=80)
        if name == "psa_sd15":
            page.evaluate("() => app.graph.remove(app.graph.nodes.find((node) => node.type === 'MarkdownNote'))")
            # The colours of sockets are in few pixels: other ways to choose 256 colours leave them out.
            graph = _graph(page, README_WIDTH).quantize(
                256, PIL.Image.Quantize.FASTOCTREE, dither=PIL.Image.Dither.NONE
            )
            graph.save(PACK / "docs" / "images" / "graph.png", optimize=True)


def _graph(page: Page, width: int) -> PIL.Image.Image:
    expect(page.get_by_text("Node definitions updated")).to_have_count(0, timeout=20_000)
    clip: dict[str, Any] = page.evaluate(FIT)
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    shown = PIL.Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")  # type: ignore[arg-type]
    return shown.resize((width, round(shown.height * width / shown.width)), PIL.Image.Resampling.LANCZOS)


def _run(page: Page, server: ComfyUIServer, name: str) -> list[PIL.Image.Image]:
    load_workflow(page, json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))
    return run(page, server)


def _save_result(image: PIL.Image.Image, name: str) -> None:
    image.resize((WIDTH, round(image.height * WIDTH / image.width)), PIL.Image.Resampling.LANCZOS).save(
        FOLDER / f"{name}.jpg", quality=85
    )


def _draw_explained(pictures: list[PIL.Image.Image]) -> None:
    """Without PSA, with it, and where they differ: the first of the four pictures of each row."""
    sheet = PIL.Image.new("RGB", (3 * EXPLAINED, EXPLAINED))
    for place, picture in enumerate(pictures[:12:4]):
        larger = picture.resize((EXPLAINED, EXPLAINED), PIL.Image.Resampling.BICUBIC)
        sheet.paste(larger, (place * EXPLAINED, 0))
    _save(sheet, PACK / "docs" / "images" / "explain.png")


def _draw_words(page: Page, server: ComfyUIServer) -> None:
    """What Explain PSA says of the words of the prompt in the graph that is open."""
    page.evaluate(
        """() => {
            const find = (type) => app.graph.nodes.find((node) => node.type === type);
            const prompt = app.graph.nodes.find((node) => node.type === 'CLIPTextEncode' && node.widgets[0].value);
            const [words, preview] = ['PSAExplain', 'PreviewImage'].map((type) => LiteGraph.createNode(type));
            for (const node of [words, preview]) app.graph.add(node);
            words.widgets.find((widget) => widget.name === 'text').value = prompt.widgets[0].value;
            find('PSAApply').connect(0, words, 0);
            find('PSALoadMiniature').connect(1, words, 1);
            words.connect(0, preview, 0);
        }"""
    )
    _save(run(page, server)[-1], PACK / "docs" / "images" / "words.png")


def _save(image: PIL.Image.Image, path: Path) -> None:
    image.quantize(256).save(path, optimize=True)
