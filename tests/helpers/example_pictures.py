"""Draws the pictures of those examples that the miniature runs: the graph with its results, or the result alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import PIL.Image
from frontend import load_workflow, run
from playwright.sync_api import Page

from comfyui_psa.training.comfyui import PACK, ComfyUIServer

FOLDER = PACK / "example_workflows"
GRAPHS = ("psa_first_steps", "psa_levels", "psa_explain", "psa_compiled")
OVERLAYS = ("Comfy.Minimap.Visible", "Comfy.Graph.CanvasInfo", "Comfy.Graph.CanvasMenu")
WIDTH = 820  # of a graph, in pixels
EXPLAINED = 288  # of a picture in the README
GAP = 16
FIT = """() => {
    const boxes = app.graph.nodes.map((node) => node.boundingRect);
    const left = Math.min(...boxes.map((box) => box[0])), top = Math.min(...boxes.map((box) => box[1]));
    const right = Math.max(...boxes.map((box) => box[0] + box[2]));
    const bottom = Math.max(...boxes.map((box) => box[1] + box[3]));
    const canvas = app.canvas.canvas.getBoundingClientRect();
    const margin = 20, beside = 80, above = 100;  // what ComfyUI shows around the canvas
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


def draw_examples(page: Page, server: ComfyUIServer) -> None:
    """Run the examples in the classic canvas of a page, and write their pictures and those of the README."""
    page.set_viewport_size({"width": 1900, "height": 1200})
    page.evaluate("(names) => names.forEach((name) => app.extensionManager.setting.set(name, false))", OVERLAYS)
    for name in GRAPHS:
        pictures = _run(page, server, name)
        page.wait_for_function(PICTURES_ARE_THERE)
        clip: dict[str, Any] = page.evaluate(FIT)
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        shown = PIL.Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")  # type: ignore[arg-type]
        size = (WIDTH, round(shown.height * WIDTH / shown.width))
        shown.resize(size, PIL.Image.Resampling.LANCZOS).save(FOLDER / f"{name}.jpg", quality=80)
        if name == "psa_explain":
            _draw_explained(pictures)
    for name in ("psa_one_batch", "psa_mix"):
        (sheet,) = _run(page, server, name)
        _save_result(sheet, name)
    pairs = _run(page, server, "psa_regions")
    together = PIL.Image.new("RGB", (2 * pairs[0].width + GAP, 2 * pairs[0].height + GAP), "white")
    for number, pair in enumerate(pairs):
        together.paste(pair, (number % 2 * (pair.width + GAP), number // 2 * (pair.height + GAP)))
    _save_result(together, "psa_regions")


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


def _save(image: PIL.Image.Image, path: Path) -> None:
    image.quantize(256).save(path, optimize=True)
