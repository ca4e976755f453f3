"""Draws the pictures of the nodes' help pages, each node as Nodes 2.0 shows it in the graph of an example, and those of
the examples themselves.
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

import PIL.Image
from example_pictures import draw_examples, draw_stills, make_room
from frontend import NEWEST, load_page, open_chromium, open_page
from playwright.sync_api import Page, expect
from studio import COMFYUI

from comfyui_psa.adapter import FAMILIES
from comfyui_psa.profiles import Profile, ProfileStore, profiles_folder
from comfyui_psa.training.comfyui import PACK, ComfyUIServer, prepare_base
from comfyui_psa.training.synthetic import write_release_adapter

EXAMPLE = PACK / "example_workflows" / "psa_explain.json"
MARGIN = 16  # pixels around a node
FILES = (
    "psa_embeddings/mine.safetensors",
    "psa_compiled/my_profile.safetensors",
    "checkpoints/v1-5-pruned-emaonly-fp16.safetensors",
    "checkpoints/sd_xl_base_1.0.safetensors",
    "loras/add_detail.safetensors",
    "controlnet/control_v11p_sd15_canny_fp16.safetensors",
)
ADAPTERS = {"psa_sd15.bin": "sd1", "psa_sdxl.bin": "sdxl"}
MORE = (
    "PSAUserProfile",
    "PSALoadEmbedding",
    "PSAExplain",
    "PSAProfileToPrompt",
    "PSAStrictestProfile",
    "PSASafetyLevels",
    "PSAMixProfiles",
    "PSABatchProfiles",
    "PSARepeatLatent",
    "PSACompareSheet",
    "PSACompileProfile",
    "PSALoadCompiledProfile",
)  # nodes that the example has not


def main() -> None:
    """Write ``web/docs/<NodeId>.webp`` for every node of the pack, and ``example_workflows/<name>.jpg``."""
    with tempfile.TemporaryDirectory() as folder:
        base = prepare_base(Path(folder))
        store = ProfileStore(profiles_folder(base / "user"))
        store.activate(store.create(Profile(name="Evening", age=12, overrides={"Violence": "allow"})).id)
        _install(base)
        with ComfyUIServer(COMFYUI, base, *NEWEST) as server, open_chromium() as chromium:
            page = open_page(chromium, server.url, nodes2=True)
            draw(page)
            load_page(page, server.url, nodes2=False)
            make_room(page)
            draw_stills(page)
            draw_examples(page, server)


def _install(base: Path) -> None:
    """Put files into a ComfyUI of the names that are shown: adapters of random numbers, and otherwise empty ones."""
    models = base / "models"
    for name in FILES:
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        (models / name).touch()
    (base / "input").mkdir()
    explained = PIL.Image.open(PACK / "docs" / "images" / "explain.png")
    side = explained.height  # the second of its pictures is of a house
    explained.crop((side, 0, 2 * side, side)).save(base / "input" / "example.png")
    for file, name in ADAPTERS.items():
        (family,) = (family for family in FAMILIES if family.name == name)
        path = models / "psa_adapters" / file
        write_release_adapter(path, family.hidden_sizes, family.cross_attention_dim, 3584)
    stand_in = Path(__file__).with_name("ipadapter_stand_in.py")
    (base / "custom_nodes" / "ComfyUI_IPAdapter_plus.py").symlink_to(stand_in)


def draw(page: Page) -> None:
    workflow = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
    nodes: dict[str, str] = page.evaluate(
        """(more) => {
            for (const [place, type] of more.entries()) {
                const node = LiteGraph.createNode(type);
                node.pos = [-500, 500 * place];
                app.graph.add(node);
            }
            const ours = app.graph.nodes.filter((node) => node.type.startsWith('PSA'));
            return Object.fromEntries(ours.reverse().map((node) => [node.type, String(node.id)]));
        }""",
        MORE,
    )
    for node_type, node_id in nodes.items():
        page.evaluate(
            """(id) => {
                const node = app.graph.nodes.find((node) => String(node.id) === id);
                app.canvas.deselectAll();
                app.canvas.ds.scale = 1.5;
                app.canvas.ds.offset = [200 - node.pos[0], 120 - node.pos[1]];
                app.canvas.setDirty(true, true);
            }""",
            node_id,
        )
        element = page.locator(f'[data-node-id="{node_id}"]')
        expect(element).to_be_in_viewport(ratio=1)
        box = element.bounding_box()
        assert box is not None
        clip = {"x": box["x"] - MARGIN, "y": box["y"] - MARGIN}
        clip |= {"width": box["width"] + 2 * MARGIN, "height": box["height"] + 2 * MARGIN}
        picture = PIL.Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
        picture.save(PACK / "web" / "docs" / f"{node_type}.webp", quality=85)


if __name__ == "__main__":
    main()
