"""Explain PSA: what a person's boundaries change in a prompt, and where in a picture. They cost nothing elsewhere."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io
from torch import Tensor

from ..adapter import AdapterError
from .explanation import changes_in_picture, changes_of_words, in_words, overlay
from .patch import UserPatch, patches_of
from .schema import node_schema
from .word_sheet import draw_words

_ALIASES = ["PSA", "personalized safety", "explain", "why", "heatmap", "attribution"]


class PSAExplain(io.ComfyNode):
    """Says which words of a prompt a person's boundaries change."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Patched model, text encoder and prompt in; a picture and a text out."""
        return node_schema(
            _ALIASES,
            node_id="PSAExplain",
            display_name="Explain PSA: Words",
            description="Shows how much Apply PSA changes each word of a prompt for this person. Only adapters that "
            "act on text change words; no sampling is needed.",
            inputs=[
                io.Model.Input("model", tooltip="From Apply PSA, with the strength that you use."),
                io.Clip.Input("clip", tooltip="The text encoder that the prompt goes through."),
                io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip="The prompt."),
            ],
            outputs=[
                io.Image.Output("sheet", display_name="IMAGE", tooltip="The words, shaded by how much they change."),
                io.String.Output("summary", display_name="STRING", tooltip="The same in words and numbers."),
            ],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, clip: CLIP, text: str) -> io.NodeOutput:
        """Encode the prompt and compare it with the person's."""
        people = changes_of_words(clip, text, _patches(model))
        return io.NodeOutput(draw_words(people), in_words(people))


class PSAExplainPicture(io.ComfyNode):
    """Shows where in a picture a person's boundaries act."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Patched model, prompt and picture in; the picture with an overlay out."""
        return node_schema(
            _ALIASES,
            node_id="PSAExplainPicture",
            display_name="Explain PSA: Picture",
            description="Shows where in a picture Apply PSA changes what the model draws: it lets the model look at "
            "the picture again, with and without PSA, at three noise levels. Costs six calls of the model.",
            inputs=[
                io.Model.Input("model", tooltip="From Apply PSA, with the strength that you use."),
                io.Conditioning.Input("positive", tooltip="The prompt, as the sampler gets it."),
                io.Latent.Input("latent", tooltip="The picture as the sampler gives it."),
                io.Image.Input("image", tooltip="The same picture, decoded."),
            ],
            outputs=[
                io.Image.Output("overlay", display_name="IMAGE", tooltip="Bright and orange where PSA acts most."),
            ],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, positive: Any, latent: dict[str, Any], image: Tensor) -> io.NodeOutput:
        """Compare what the model sees in the picture with and without PSA."""
        samples: Tensor = latent["samples"]
        if len(samples) != len(image):
            raise AdapterError(
                f"Explain PSA got {len(samples)} latents and {len(image)} images. Connect the sampler's LATENT and the "
                "image that VAE Decode makes of it."
            )
        return io.NodeOutput(overlay(image, changes_in_picture(model, _patches(model), positive, samples)))


def _patches(model: ModelPatcher) -> list[UserPatch]:
    found = patches_of(model)
    if not found:
        raise AdapterError(
            "Explain PSA got a model on which PSA does not act. Connect the output of Apply PSA, with a strength above "
            "0."
        )
    return found


NODES: list[type[io.ComfyNode]] = [PSAExplain, PSAExplainPicture]
