"""The model card of a trained miniature, in the format of Hugging Face: what it is, how it was made, what it can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CARD = "README.md"

_MEASURES = ("prompted glyph", "glyphs as asked", "object")

_TEMPLATE = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# PSA Miniature

A text-to-image model of a small drawn world, to see and measure Personalized Safety Alignment without a download.
diffusers layout; in ComfyUI it is opened by Load PSA Miniature. See `docs/miniature.md`.

| part | what it is | parameters |
| --- | --- | --- |
{parts}

**Data.** {scenes:,} scenes of 96 x 96 pixels, drawn by code (`training/miniature/`): six places, eight harmless
objects, seven abstract glyphs. Captions are made by a grammar in which a glyph is named or only implied by a phrase.
No picture and no text is anybody's; nothing sensitive is depicted.

**Training.** From nothing, {plans}. AdamW, cosine schedules, moving average of the weights, float32 on
a CPU; written in float16. The UNet predicts v, with Stable Diffusion's noise schedule.

    psa miniature train-base OUT --seed {seed}

**Figures**, measured on the written files with {sampler}; shares of pictures with 95% bootstrap intervals. The
detector that counts is a small convolutional network, trained on other drawings (`detector.safetensors`).

What the base draws, by prompts that name a glyph, imply one, or have none, and by all of them:

| prompts | prompted glyph | glyphs as asked | object |
| --- | --- | --- | --- |
{base}

What the detector gets right, over {drawings:,} fresh drawings and over the same behind the autoencoder:

| pictures | all glyphs | object |
| --- | --- | --- |
{detector}

**Use.** To learn, to test and to measure. It knows the words of its grammar alone, and says nothing about how well an
adapter for a large model works.
"""


def model_card(figures: Mapping[str, Any], parts: Mapping[str, int], training: Mapping[str, Any]) -> str:
    """Return the card as Markdown.

    Args:
        figures: what ``measure_base`` returns.
        parts: the number of parameters by part.
        training: ``scenes``, ``drawings`` and ``plans`` (part to steps and batch size).
    """
    kinds = {
        "vae": "autoencoder of TAESD's architecture (`AutoencoderTiny`)",
        "text_encoder": "`CLIPTextModel`, 32 tokens, its own vocabulary",
        "unet": "`UNet2DConditionModel` with cross-attention",
        "detector": "what measures: glyphs and objects in a picture",
    }
    sampling = figures["sampling"]
    return _TEMPLATE.format(
        parts="\n".join(f"| {name} | {kinds[name]} | {count:,} |" for name, count in parts.items()),
        scenes=training["scenes"],
        drawings=training["drawings"],
        plans=", ".join(f"{name} {steps:,} steps of {batch}" for name, (steps, batch) in training["plans"].items()),
        seed=figures["seed"],
        sampler=f"{sampling['steps']} steps of DPM-Solver++ (2M) at guidance {sampling['guidance_scale']:g}",
        base="\n".join(
            f"| {mention} | " + " | ".join(_written(shares.get(name)) for name in _MEASURES) + " |"
            for mention, shares in figures["base"].items()
        ),
        detector="\n".join(
            f"| {where} | {accuracy['glyphs']:.3f} | {accuracy['objects']:.3f} |"
            for where, accuracy in figures["detector"].items()
        ),
    )


def _written(share: Mapping[str, float] | None) -> str:
    return "" if share is None else f"{share['value']:.3f} ({share['low']:.3f}-{share['high']:.3f})"
