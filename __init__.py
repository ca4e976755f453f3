"""ComfyUI-PSA: Personalized Safety Alignment. The extension's entry point; everything else has its room.

ComfyUI loads this folder as a custom node pack; ``pip install -e .`` makes it the package ``comfyui_psa``.
The nodes are imported only when ComfyUI asks for them, so that the command line needs no ComfyUI.
"""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """Return the extension to ComfyUI's loader (V3 schema)."""
    from .nodes import PSAExtension

    return PSAExtension()
