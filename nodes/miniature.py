"""Load PSA Miniature: the small text-to-image model that comes with the pack, to try PSA without a download."""

from __future__ import annotations

from comfy_api.latest import io

from .folders import MINIATURE, file_fingerprint
from .miniature_files import FILES
from .miniature_model import load_miniature
from .schema import node_schema


class PSALoadMiniature(io.ComfyNode):
    """Loads the model in the pack's folder ``miniature``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """No inputs: there is one miniature."""
        return node_schema(
            ["PSA", "personalized safety", "miniature", "tiny model", "demo model", "load checkpoint"],
            node_id="PSALoadMiniature",
            display_name="Load PSA Miniature",
            description="Loads the small text-to-image model that comes with this pack. It draws a simple world in a "
            "second, also without a GPU, so that PSA can be tried without downloading a checkpoint.",
            inputs=[],
            outputs=[
                io.Model.Output("model", display_name="MODEL", tooltip="For Apply PSA or a sampler."),
                io.Clip.Output("clip", display_name="CLIP", tooltip="For CLIP Text Encode."),
                io.Vae.Output("vae", display_name="VAE", tooltip="For VAE Decode and VAE Encode."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls) -> str:
        """Change when a file of the miniature is replaced; else ComfyUI keeps what it has loaded."""
        return file_fingerprint(*(MINIATURE / name for name in FILES))

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Load the three models."""
        return io.NodeOutput(*load_miniature(MINIATURE))


NODES: list[type[io.ComfyNode]] = [PSALoadMiniature]
