"""Load PSA Adapter and Apply PSA: the two ends of the graph."""

from __future__ import annotations

from collections.abc import Sequence

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..adapter import TEMPLATE_NAME, AdapterError, NullMode, PSAAdapter, load_adapter
from .apply import apply_psa
from .curve import CONSTANT, SHAPES, Curve, points_of
from .folders import ADAPTERS, check_file, file_fingerprint, file_names, find_file, missing_file
from .people import People
from .regions import Region
from .schema import Adapter, Embedding, Floats, advanced_combo, node_schema

AS_TRAINED = "as trained"
_UNCONDITIONAL: dict[str, NullMode | None] = {
    AS_TRAINED: None,
    "zero embedding": "zero_embedding",
    "none": "none",
}


class PSALoadAdapter(io.ComfyNode):
    """Reads an adapter file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """One choice: the files in models/psa_adapters."""
        return node_schema(
            ["PSA", "personalized safety", "safety adapter", "load adapter"],
            node_id="PSALoadAdapter",
            display_name="Load PSA Adapter",
            description="Loads a Personalized Safety Alignment adapter from models/psa_adapters: our "
            "safetensors format, or the published psa_adapter.bin.",
            inputs=[
                io.Combo.Input(
                    "adapter_name",
                    options=file_names(ADAPTERS),
                    tooltip="A file in models/psa_adapters. It has to fit the checkpoint's family (SD1.x, SDXL, ...).",
                )
            ],
            outputs=[
                Adapter.Output("adapter", display_name="adapter", tooltip="For Encode Safety Profile and Apply PSA.")
            ],
        )

    @classmethod
    def validate_inputs(cls, adapter_name: str | None) -> bool | str:
        """Accept a file that exists; else say where it belongs."""
        return check_file("adapter", ADAPTERS, adapter_name)

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str | None) -> str:
        """Change when the file, or a template beside it, is replaced."""
        path = find_file(ADAPTERS, adapter_name) if adapter_name else None
        return file_fingerprint(path, path and path.with_name(TEMPLATE_NAME))

    @classmethod
    def execute(cls, adapter_name: str) -> io.NodeOutput:
        """Load the adapter."""
        path = find_file(ADAPTERS, adapter_name)
        if path is None:
            raise AdapterError(missing_file("adapter", ADAPTERS, adapter_name))
        return io.NodeOutput(load_adapter(path))


class PSAApply(io.ComfyNode):
    """Patches a model so that it follows a person's boundaries."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Model, adapter and embedding in; model out."""
        return node_schema(
            ["PSA", "personalized safety", "safety", "alignment", "apply adapter"],
            node_id="PSAApply",
            display_name="Apply PSA",
            description="Makes generation follow a person's boundaries. Works beside LoRA, IPAdapter and "
            "ControlNet; chain two of them to add them up. Strength 0 is exactly the base model.",
            inputs=[
                io.Model.Input("model", tooltip="The model to patch: a UNet of the adapter's family."),
                Adapter.Input(
                    "adapter",
                    optional=True,
                    tooltip="From Load PSA Adapter. Leave it empty for a compiled profile, which needs none.",
                ),
                Embedding.Input(
                    "embedding",
                    tooltip="From Encode Safety Profile, Load Safety Embedding or Load Compiled Profile: one, or one "
                    "per image.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="1 is the adapter as trained, 0 exactly the base model; more suppresses and changes more.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the noise schedule PSA begins to act: 0 is pure noise. With denoise below 1 a "
                    "run starts later than 0.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the noise schedule PSA stops to act: 1 is after the last step.",
                ),
                advanced_combo(
                    "unconditional",
                    options=list(_UNCONDITIONAL),
                    default=AS_TRAINED,
                    optional=True,
                    tooltip="What the negative half gets: what the adapter was trained with, the projection of a zero "
                    "embedding (the paper), or nothing.",
                ),
                # Behind the others: saved workflows know widgets by their places.
                advanced_combo(
                    "schedule",
                    options=list(SHAPES),
                    default=CONSTANT,
                    optional=True,
                    tooltip="The strength over the run: the same all the time, or falling to 0 on the way from "
                    "start_percent to end_percent, in a straight line or gently at both ends.",
                ),
                Floats.Input(
                    "strengths",
                    optional=True,
                    tooltip="A list of numbers instead of schedule, spread evenly from start_percent to end_percent: "
                    "1 is the strength above, 0 the base model.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the picture PSA acts: white is fully, black not at all. One mask, or one per "
                    "image, of the picture's shape. Without one it acts everywhere.",
                ),
            ],
            outputs=[io.Model.Output("patched_model", display_name="MODEL", tooltip="For a sampler.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        embedding: People,
        strength: float,
        start_percent: float,
        end_percent: float,
        adapter: PSAAdapter | None = None,
        unconditional: str = AS_TRAINED,
        schedule: str = CONSTANT,
        strengths: Sequence[float] | float | None = None,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        """Patch a clone of the model."""
        null, curve = _UNCONDITIONAL[unconditional], Curve(schedule, points_of(strengths))
        region = None if mask is None else Region(mask)
        return io.NodeOutput(
            apply_psa(model, adapter, embedding, strength, start_percent, end_percent, null, curve, region)
        )


NODES: list[type[io.ComfyNode]] = [PSALoadAdapter, PSAApply]
