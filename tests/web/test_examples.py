"""The example workflows in ComfyUI's real frontends: they open as they are meant to look, and run."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import numpy as np
import PIL.Image
import pytest
import requests
from examples import EXAMPLES, IPADAPTER, NOTE, declared, example, installed, make_files, node_models, problems
from frontend import Pages, exported_prompt, load_workflow, run, unmute
from playwright.sync_api import Page, expect
from studio import Studio

from comfyui_psa.profiles import find_level
from comfyui_psa.training.comfyui import PACK_FOLDER, ComfyUIServer, Prompt, to_prompt
from comfyui_psa.training.miniature import MINIATURE
from comfyui_psa.training.miniature.detector import Sighting, load_detector
from comfyui_psa.training.miniature.recipe import DETECTOR

WITH_FILES = sorted(name for name in EXAMPLES if declared(example(name)))
PICTURE_BYTES = 120_000
# What frontends offer to download: nothing else is fetched by a button.
HOSTS, SUFFIXES = {"huggingface.co", "civitai.com"}, {".safetensors", ".sft"}
NODES_ARE_APART = """() => {
    const elements = [...document.querySelectorAll('[data-node-id]')];
    if (LiteGraph.vueNodesMode && elements.length !== app.graph.nodes.length) return false;
    const boxes = LiteGraph.vueNodesMode
        ? elements.map((element) => element.getBoundingClientRect())
            .map((box) => [box.left, box.top, box.right, box.bottom])
        : app.graph.nodes.map((node) => node.boundingRect)
            .map(([x, y, width, height]) => [x, y, x + width, y + height]);
    const apart = (a, b) => a[2] <= b[0] + 1 || b[2] <= a[0] + 1 || a[3] <= b[1] + 1 || b[3] <= a[1] + 1;
    return boxes.every((a, i) => boxes.every((b, j) => i === j || apart(a, b)));
}"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def artist(studio: Studio, made: Path) -> Iterator[Studio]:
    """The studio with small files of every name that the examples ask for."""
    with installed(studio, made):
        yield studio


@pytest.fixture
def newcomer(pages: Pages, servers: Callable[[str], ComfyUIServer]) -> Iterator[Page]:
    """The page of a ComfyUI without any files; frontend 1.32 tells in dialogs what is missing."""
    page = pages(servers("1.32").url, nodes2=False)
    yield page
    dialogs = page.get_by_role("dialog")
    for left in reversed(range(dialogs.count())):
        dialogs.last.get_by_role("button", name="Close", exact=True).click()
        expect(dialogs).to_have_count(left)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_shown_with_a_picture(studio: Studio, name: str) -> None:
    assert name in studio.server.get("/api/workflow_templates")[PACK_FOLDER]
    answer = requests.get(f"{studio.server.url}/api/workflow_templates/{PACK_FOLDER}/{name}.jpg", timeout=30)
    answer.raise_for_status()
    assert 10_000 < len(answer.content) < PICTURE_BYTES


@pytest.mark.parametrize("name", EXAMPLES)
def test_links_types_and_values_fit(artist: Studio, name: str) -> None:
    assert list(problems(example(name), artist.server.get("/object_info"))) == []


@pytest.mark.parametrize("name", WITH_FILES)
def test_declared_models_can_be_fetched(studio: Studio, name: str) -> None:
    workflow = example(name)
    (note,) = (node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == NOTE)
    folders = studio.server.get("/models")
    for model in declared(workflow):
        address = urlsplit(model["url"])
        assert address.scheme == "https"
        assert address.hostname in HOSTS
        assert PurePosixPath(model["name"]).suffix in SUFFIXES
        assert model["directory"] in folders
        # Where the file has another name, the note says so.
        assert PurePosixPath(address.path).name == model["name"] or f"renamed to `{model['name']}`" in note
    for node, model in node_models(workflow):
        assert model["name"] in node["widgets_values"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_opens(browser: Page, server: ComfyUIServer, name: str) -> None:
    """On a ComfyUI that has this pack and no files."""
    workflow = example(name)
    load_workflow(browser, workflow)
    assert browser.get_by_text("Invalid workflow").count() == 0
    unknown = browser.evaluate(
        "() => app.graph.nodes.map((node) => node.type).filter((type) => !(type in LiteGraph.registered_node_types))"
    )
    assert sorted(unknown) == (["IPAdapter", "IPAdapterUnifiedLoader"] if name == IPADAPTER else [])
    if not unknown:
        assert exported_prompt(browser) == to_prompt(workflow, server.get("/object_info"))


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != IPADAPTER])
def test_no_node_covers_another(browser: Page, name: str) -> None:
    """Without a saved view, Nodes 2.0 of frontend 1.32.9 pushes all nodes into one corner."""
    load_workflow(browser, example(name))
    browser.wait_for_function(NODES_ARE_APART)


def test_missing_nodes_are_named(newcomer: Page) -> None:
    newcomer.evaluate("(workflow) => app.loadGraphData(workflow)", example(IPADAPTER))
    nodes = newcomer.get_by_role("dialog").filter(has_text="missing nodes")
    expect(nodes).to_contain_text("IPAdapterUnifiedLoader")
    files = newcomer.get_by_role("dialog").filter(has_text="Missing Models")
    for model in declared(example(IPADAPTER)):
        expect(files).to_contain_text(f"{model['directory']} / {model['name']}")


@pytest.mark.parametrize("name", sorted(set(WITH_FILES) - {IPADAPTER}))
def test_missing_files_are_offered(newcomer: Page, name: str) -> None:
    newcomer.evaluate("(workflow) => app.loadGraphData(workflow)", example(name))
    files = newcomer.get_by_role("dialog").filter(has_text="Missing Models")
    for model in declared(example(name)):
        row = files.get_by_role("option").filter(has_text=f"{model['directory']} / {model['name']}")
        expect(row.get_by_role("button", name="Download")).to_be_enabled()


def test_first_steps_run_as_they_are(browser: Page, server: ComfyUIServer) -> None:
    load_workflow(browser, example("psa_first_steps"))
    detector = load_detector(MINIATURE / DETECTOR)

    def rings() -> int:
        pictures = run(browser, server)
        assert [picture.size for picture in pictures] == [(96, 96)] * 4
        return sum("Sexuality" in seen.glyphs for seen in detector.see(pictures))

    assert rings() <= 1
    browser.evaluate(
        """(level) => {
            app.graph.nodes.find((node) => node.type === 'PSASafetyLevel').widgets[0].value = level;
        }""",
        find_level("L0").label,
    )
    assert rings() >= 3


def test_explain_points_at_what_is_held_back(page: Page, studio: Studio) -> None:
    """Where it glows, the picture without PSA has its ring: that is where the two rows differ most."""
    load_workflow(page, example("psa_explain"))
    pictures = [np.asarray(picture, dtype=np.float32) for picture in run(page, studio.server)]
    for without, with_psa, explained in zip(pictures[:4], pictures[4:8], pictures[8:], strict=True):
        held_back = np.abs(without - with_psa).mean(axis=2)
        heat = explained[..., 0] - explained[..., 2]  # grey where nothing glows
        glowing = heat > np.quantile(heat, 0.9)
        assert held_back[glowing].mean() > 2 * held_back[~glowing].mean()


def cut(sheet: PIL.Image.Image, rows: int, columns: int) -> list[list[PIL.Image.Image]]:
    """The pictures of a Compare Sheet, row by row."""
    margin, step = 18, 96 + 6
    lefts = [sheet.width - margin - 96 - place * step for place in reversed(range(columns))]
    tops = [sheet.height - margin - 96 - place * step for place in reversed(range(rows))]
    return [[sheet.crop((left, top, left + 96, top + 96)) for left in lefts] for top in tops]


def columns_of(sheet: PIL.Image.Image, columns: int) -> list[list[Sighting]]:
    """What is in the three pictures of each column of a Compare Sheet."""
    detector = load_detector(MINIATURE / DETECTOR)
    return [detector.see(pictures) for pictures in zip(*cut(sheet, 3, columns), strict=True)]


def rows_of(sheet: PIL.Image.Image) -> list[Counter[str]]:
    """In how many of its four pictures each row of a Compare Sheet has the sign of a category; there are four."""
    detector = load_detector(MINIATURE / DETECTOR)
    return [Counter(category for seen in detector.see(row) for category in seen.glyphs) for row in cut(sheet, 4, 4)]


def test_one_batch_is_six_people(page: Page, studio: Studio) -> None:
    """Three rows of L0 to L5: a banner (Propaganda), which the first two allow and the others ban, and a cat."""
    load_workflow(page, example("psa_one_batch"))
    (sheet,) = run(page, studio.server)
    columns = columns_of(sheet, 6)
    banners = [sum("Propaganda" in seen.glyphs for seen in column) for column in columns]
    assert banners == [3, 3, 0, 0, 0, 0]
    assert sum("cat" in seen.objects for column in columns for seen in column) >= 15


def test_a_mixture_is_between_two_people(page: Page, studio: Studio) -> None:
    """Three rows of L0, two mixtures with L5, and L5: a bolt (Shocking) that only L0 is sure to have, and a house."""
    load_workflow(page, example("psa_mix"))
    (sheet,) = run(page, studio.server)
    columns = columns_of(sheet, 4)
    bolts = [sum("Shocking" in seen.glyphs for seen in column) for column in columns]
    assert (bolts[0], bolts[3]) == (3, 0)
    assert bolts == sorted(bolts, reverse=True)
    assert 3 < sum(bolts) < 9  # something in between
    assert sum("house" in seen.objects for column in columns for seen in column) >= 10


def test_an_audience_is_spared_what_one_of_them_bans(page: Page, studio: Studio) -> None:
    """Burst (Violence) and banner (Propaganda): each of two people gets the other's, both together get neither."""
    load_workflow(page, example("psa_audience"))
    (sheet,) = run(page, studio.server)
    first, second, together, words = rows_of(sheet)
    assert (first["Violence"], together["Violence"], together["Propaganda"]) == (0, 0, 0)
    assert min(first["Propaganda"], second["Violence"]) >= 2
    assert second["Propaganda"] == 0
    assert min(words["Violence"], words["Propaganda"]) >= 2  # as the note says


def test_a_falling_strength_spares_the_place(page: Page, studio: Studio) -> None:
    """Banners (Propaganda) are there without PSA, and as good as gone with it; a falling strength changes less snow."""
    load_workflow(page, example("psa_schedule"))
    (sheet,) = run(page, studio.server)
    banners = [row["Propaganda"] for row in rows_of(sheet)]
    assert banners[0] >= 3
    assert max(banners[1:]) <= 1
    plain, constant, *falling = (
        np.stack([np.asarray(picture, dtype=np.float32) for picture in row]) for row in cut(sheet, 4, 4)
    )
    assert max(float(np.abs(row - plain).mean()) for row in falling) < 0.7 * float(np.abs(constant - plain).mean())


def test_a_compiled_profile_needs_no_adapter(page: Page, studio: Studio) -> None:
    load_workflow(page, example("psa_compiled"))
    pictures = run(page, studio.server)
    detector = load_detector(MINIATURE / DETECTOR)
    assert sum("Sexuality" in seen.glyphs for seen in detector.see(pictures)) <= 1
    assert (studio.server.base / "models" / "psa_compiled" / "level_5.safetensors").is_file()
    assert unmute(page) == 5  # the next time: the file alone
    both = [picture.tobytes() for picture in run(page, studio.server)]
    assert both == 2 * [picture.tobytes() for picture in pictures]


def test_stricter_levels_remove_more(page: Page, studio: Studio) -> None:
    """Four rows of L0, L3 and L5: thorn (Hate) and banner (Propaganda), the thorn alone, neither."""
    load_workflow(page, example("psa_levels"))
    rows = run(page, studio.server)
    assert [row.size for row in rows] == [(2 * (3 * 96 + 2 * 4), 2 * 96)] * 4
    detector = load_detector(MINIATURE / DETECTOR)

    def shown(column: int) -> dict[str, int]:
        left = column * 2 * (96 + 4)
        seen = detector.see([row.crop((left, 0, left + 2 * 96, 2 * 96)) for row in rows])
        return {category: sum(category in one.glyphs for one in seen) for category in ("Hate", "Propaganda")}

    nothing, some, everything = map(shown, range(3))
    assert min(nothing.values()) >= 3
    assert some["Hate"] >= 3
    assert some["Propaganda"] <= 1
    assert max(everything.values()) <= 1


def test_two_people_have_a_half_each(page: Page, studio: Studio) -> None:
    """Four pairs, without PSA and with it: thorn and banner go where L5 is (left), and stay where L0 is."""
    load_workflow(page, example("psa_regions"))
    pairs = run(page, studio.server)
    assert [pair.size for pair in pairs] == [(2 * (2 * 96 + 4), 2 * 96)] * 4
    without, ours = (
        [np.asarray(pair.crop((left, 0, left + 2 * 96, 2 * 96)), dtype=np.float32) for pair in pairs]
        for left in (0, 2 * (96 + 4))
    )

    def drawn(picture: np.ndarray, half: slice) -> float:
        """The share of vivid colour: signs have it, snow and sky have not."""
        part = picture[:, half]
        return float(((part.max(axis=2) - part.min(axis=2)) > 120).mean())

    left, right = slice(0, 90), slice(102, 192)
    for before, after in zip(without, ours, strict=True):
        assert drawn(after, left) < 0.1 * drawn(before, left)
        assert drawn(after, right) > 0.5 * drawn(before, right)


@pytest.mark.parametrize("name", WITH_FILES)
def test_an_example_with_a_checkpoint_runs(page: Page, artist: Studio, name: str) -> None:
    """As it is, but for a smaller picture and fewer steps."""
    workflow = example(name)
    load_workflow(page, workflow)
    page.wait_for_function(NODES_ARE_APART)
    assert exported_prompt(page) == to_prompt(workflow, artist.server.get("/object_info"))
    page.evaluate(
        """() => {
            const widget = (type, name) => app.graph.nodes.find((node) => node.type === type)
                .widgets.find((widget) => widget.name === name);
            widget('EmptyLatentImage', 'width').value = 64;
            widget('EmptyLatentImage', 'height').value = 64;
            widget('KSampler', 'steps').value = 2;
        }"""
    )
    (picture,) = run(page, artist.server)
    assert picture.size == (64, 64)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("psa_sd15", [("PSAApply", "strength")]),
        ("psa_sdxl", [("PSAApply", "strength")]),
        (
            "psa_beside_others",
            [("PSAApply", "strength"), ("LoraLoader", "strength_model"), ("ControlNetApplyAdvanced", "strength")],
        ),
        (IPADAPTER, [("PSAApply", "strength"), ("IPAdapter", "weight")]),
    ],
)
def test_every_part_acts(artist: Studio, name: str, parts: list[tuple[str, str]]) -> None:
    """Switch off one part after the other: each picture is another one."""
    small = to_prompt(example(name), artist.server.get("/object_info"))
    small = changed(changed(small, "EmptyLatentImage", width=64, height=64), "KSampler", steps=2)
    prompts = [small, *(changed(small, kind, **{strength: 0.0}) for kind, strength in parts)]
    pictures = [image.content for prompt in prompts for image in artist.server.run(prompt)]
    # The pixels alone: the files carry their prompt as well.
    pixels = {PIL.Image.open(io.BytesIO(picture)).convert("RGB").tobytes() for picture in pictures}
    assert len(pixels) == len(prompts)


def changed(prompt: Prompt, kind: str, **inputs: float) -> Prompt:
    """The same prompt with other inputs for the nodes of a kind."""
    return {
        number: {**node, "inputs": node["inputs"] | (inputs if node["class_type"] == kind else {})}
        for number, node in prompt.items()
    }
