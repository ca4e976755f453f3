"""ComfyUI nodes and the patch on a ComfyUI model; the only room that imports comfy."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import adapter_nodes, explain, miniature, profile_nodes
from .folders import register_folders


class PSAExtension(ComfyExtension):
    """What ComfyUI loads: the folders and the nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Register the model folders, then return all nodes."""
        register_folders()
        return [*adapter_nodes.NODES, *profile_nodes.NODES, *miniature.NODES, *explain.NODES]
