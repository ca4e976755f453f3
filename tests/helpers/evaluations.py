"""Evaluations of seconds: their configuration, the drawing itself, and what it left behind."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from rich.console import Console

from comfyui_psa.adapter import AdapterConfig, EncoderSpec, GatedSpec, PSAAdapter, TextSpec, find_sites, save_adapter
from comfyui_psa.profiles import default_template
from comfyui_psa.profiles.encoders.attributes import DIM
from comfyui_psa.training.base import open_base
from comfyui_psa.training.evaluation.config import EvaluationConfig
from comfyui_psa.training.evaluation.evaluate import evaluate
from comfyui_psa.training.evaluation.manifest import Picture, read_manifest

PROMPTS = ("a harbour at dawn", "a crowd in the street")
SMOLLM2_DIM = 576
ATTRIBUTES = EncoderSpec(kind="attributes", name="attributes-1")
BASE = {"name": "base", "kind": "base"}
Key = tuple[str, int, float, str]


def evaluation(
    base: Path, output: Path, methods: Sequence[Mapping[str, Any]] = (BASE,), **changes: Mapping[str, Any]
) -> EvaluationConfig:
    """Two prompts for L0 and L5, three steps in float32; ``changes`` are whole or partial sections."""
    prompts = output.with_name("prompts.jsonl")
    if not prompts.exists():
        write_jsonl(prompts, [{"prompt_id": f"p{i}", "prompt": text} for i, text in enumerate(PROMPTS)])
    sections: dict[str, dict[str, Any]] = {
        "model": {"base": base, "precision": "fp32", "device": "cpu"},
        "prompts": {"file": prompts},
        "users": {"levels": ("L0", "L5")},
        "sampling": {"steps": 3, "guidance_scale": 4.0, "batch_size": 4},
        "run": {"output": output},
    }
    for section, values in changes.items():
        sections[section] = {**sections.get(section, {}), **values}
    return EvaluationConfig.model_validate({**sections, "methods": list(methods)})


def draw(config: EvaluationConfig) -> str:
    """Draw in this process, and return what was said."""
    said = io.StringIO()
    evaluate(config, Console(file=said, width=300), "draw")
    return said.getvalue()


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pictures(folder: Path) -> dict[Key, Picture]:
    """The rows of a manifest; every one is there once."""
    rows = read_manifest(folder)
    found = {(row.method, row.run, row.strength, row.case): row for row in rows}
    assert len(found) == len(rows)
    return found


def pixels(folder: Path, picture: Picture) -> np.ndarray:
    """``[height, width, 3]`` as whole numbers."""
    return np.asarray(PIL.Image.open(folder / picture.image)).astype(int)


def drawn(folder: Path) -> dict[Key, np.ndarray]:
    """The pixels of all rows."""
    return {key: pixels(folder, row) for key, row in pictures(folder).items()}


def write_adapter(
    path: Path, base: Path, kinds: Sequence[str] = ("constant",), seed: int = 1, encoder: str | None = None
) -> Path:
    """An adapter for a base with random weights, for the encoder ``attributes`` or for SmolLM2 by its name."""
    model = open_base(base)
    sites = find_sites(model.empty_unet())
    constant = "constant" in kinds
    torch.manual_seed(seed)
    adapter = PSAAdapter(
        AdapterConfig(
            hidden_sizes=tuple(site.hidden_size for site in sites),
            cross_attention_dim=sites[0].cross_attention_dim,
            embedding_dim=SMOLLM2_DIM if encoder else DIM,
            constant=constant,
            gated=GatedSpec(num_tokens=2, token_dim=8, heads=2, head_dim=4) if "gated" in kinds else None,
            text=TextSpec(form="mlp", pooled_dim=model.pooled_dim) if "text" in kinds else None,
            null="zero_embedding" if constant else "none",
            encoder=EncoderSpec(kind="llm", name=encoder, template=default_template()) if encoder else ATTRIBUTES,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapter.zero_at_start():
            weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    save_adapter(adapter, path)
    return path
