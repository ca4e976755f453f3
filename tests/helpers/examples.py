"""The example workflows: what their files say, whether it fits a ComfyUI, and small files of the names they ask for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import comfy.cldm.cldm
import comfy.model_detection
import comfy.ops
import PIL.Image
import torch
from prompts import CHECKPOINT
from safetensors.torch import save_file
from studio import Studio

from comfyui_psa.training.comfyui import PACK
from comfyui_psa.training.synthetic import SMALL_SD15, random_weights, unet_shapes

FOLDER = PACK / "example_workflows"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.json"))
IPADAPTER = "psa_beside_ipadapter"  # its nodes are another pack's
NOTE = "MarkdownNote"
MUTED = 2

Workflow = dict[str, Any]
Model = dict[str, str]


def example(name: str) -> Workflow:
    content: Workflow = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return content


def node_models(workflow: Workflow) -> list[tuple[dict[str, Any], Model]]:
    """The models that nodes declare, with their node."""
    return [(node, model) for node in workflow["nodes"] for model in node["properties"].get("models", [])]


def declared(workflow: Workflow) -> list[Model]:
    """All models that the workflow declares: those of nodes, and its own."""
    return [model for _, model in node_models(workflow)] + workflow.get("models", [])


def problems(workflow: Workflow, object_info: Mapping[str, Any]) -> Iterator[str]:
    """Everything that does not fit: links without ends, of two types, inputs without a link and without a value."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, source, slot, target, place, kind in workflow["links"]:
        given, taken = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
        if number not in given["links"] or number != taken["link"]:
            yield f"link {number} is not at both of its ends"
        info = object_info[nodes[target]["type"]]["input"]
        wanted = {**info.get("required", {}), **info.get("optional", {})}[taken["name"]][0]
        if not kind == object_info[nodes[source]["type"]]["output"][slot] == wanted:
            yield f"link {number} is {kind}, goes into {wanted}"
    numbers = {link[0] for link in workflow["links"]}
    for node in workflow["nodes"]:
        ends = [entry["link"] for entry in node.get("inputs", [])]
        ends += [number for entry in node.get("outputs", []) for number in entry["links"] or []]
        if not {end for end in ends if end} <= numbers:
            yield f"node {node['id']} has links that are not there"
        if node["type"] != NOTE and node["mode"] != MUTED:  # its file may come later
            yield from _missing_inputs(node, object_info[node["type"]]["input"])


def _missing_inputs(node: dict[str, Any], info: Mapping[str, Any]) -> Iterator[str]:
    linked = {entry["name"] for entry in node["inputs"] if entry["link"]}
    values = iter(node.get("widgets_values", []))
    for name, (kind, *rest) in {**info.get("required", {}), **info.get("optional", {})}.items():
        options = rest[0] if rest else {}
        if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
            value = next(values)
            if options.get("control_after_generate"):
                next(values)
            choices = kind if isinstance(kind, list) else options.get("options")
            low, high = options.get("min", value), options.get("max", value)
            if value not in (choices or [value]) or (kind in ("INT", "FLOAT") and not low <= value <= high):
                yield f"{name} of node {node['id']} cannot be {value}"
        elif name in info.get("required", {}) and name not in linked:
            yield f"{name} of node {node['id']} has no link"


@contextmanager
def installed(studio: Studio, made: Path) -> Iterator[None]:
    """Put small files of the names that the examples ask for into the studio's ComfyUI, as if they were the real ones.

    The checkpoint called SDXL is SD1.5's shape as well: SDXL's text encoders alone have 0.8 billion weights.
    """
    base = studio.server.base
    models = base / "models"
    files = {
        "models/checkpoints/v1-5-pruned-emaonly-fp16.safetensors": models / "checkpoints" / CHECKPOINT,
        "models/checkpoints/sd_xl_base_1.0.safetensors": models / "checkpoints" / CHECKPOINT,
        "models/loras/add_detail.safetensors": made / "lora.safetensors",
        "models/controlnet/control_v11p_sd15_canny_fp16.safetensors": made / "controlnet.safetensors",
        "models/psa_adapters/psa_sd15.bin": base / "psa_adapter.bin",
        "models/psa_adapters/psa_sdxl.bin": base / "psa_adapter.bin",
        "models/psa_adapters/get_embeds.txt": base / "get_embeds.txt",
        "models/LLM/Qwen2.5-7B-Instruct": models / "LLM" / "SmolLM2-135M-Instruct",
        "input/example.png": made / "picture.png",
    }
    with ExitStack() as stack:
        for name, file in files.items():
            path = base / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(file)
            stack.callback(path.unlink)
        yield


def make_files(folder: Path) -> Path:
    """Write a LoRA and a ControlNet for the small SD1.5, and a picture."""
    generator = torch.Generator().manual_seed(0)
    shapes = dict(unet_shapes(SMALL_SD15))
    changed = {
        f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": shape
        for name, shape in shapes.items()
        if name.endswith("attn2.to_v.weight")
    }
    changed["lora_te_text_model_encoder_layers_0_mlp_fc1"] = (3072, 768)
    lora = {}
    for name, (width_out, width_in) in changed.items():
        lora[f"{name}.lora_up.weight"] = torch.randn(width_out, 4, generator=generator) / 4
        lora[f"{name}.lora_down.weight"] = torch.randn(4, width_in, generator=generator) / 4
    save_file(lora, folder / "lora.safetensors")

    unet = random_weights(iter(shapes.items()), generator)
    config = comfy.model_detection.model_config_from_unet(unet, "", True).unet_config
    config = {name: value for name, value in config.items() if name not in ("out_channels", "transformer_depth_output")}
    network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, operations=comfy.ops.disable_weight_init)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    save_file({name: weight.half() for name, weight in network.state_dict().items()}, folder / "controlnet.safetensors")

    picture = PIL.Image.new("RGB", (128, 128), "navy")
    picture.paste("gold", (30, 40, 100, 90))
    picture.save(folder / "picture.png")
    return folder
