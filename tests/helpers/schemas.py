"""The schemas of the pack's nodes, by their ids."""

from __future__ import annotations

import asyncio

from comfyui_psa.nodes import PSAExtension

# When tests are collected: later, a browser's event loop may run in this thread.
SCHEMAS = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in asyncio.run(PSAExtension().get_node_list())}
