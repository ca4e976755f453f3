"""ComfyUI nodes and the patch on a ComfyUI model; the only room that imports comfy."""

from __future__ import annotations

import sys

from comfy_api.latest import ComfyExtension, io

from . import accounts, adapter_nodes, compare, compiled_nodes, explain, miniature, people_nodes, profile_nodes, routes
from .folders import register_folders


class PSAExtension(ComfyExtension):
    """What ComfyUI loads: the folders, the routes and the nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Register the model folders and, in a server, the routes; then return all nodes."""
        register_folders()
        # Not in on_load: ComfyUI 0.3.75 declares it, but does not call it.
        module = sys.modules.get("server")  # there if ComfyUI runs; importing it here would start half of one
        if module is not None:
            accounts.register(module.PromptServer.instance)
            routes.register(module.PromptServer.instance)
        rooms = (adapter_nodes, profile_nodes, compiled_nodes, people_nodes, miniature, explain, compare)
        return [node for room in rooms for node in room.NODES]
