"""The pack's nodes and their schemas, by their ids."""

from __future__ import annotations

import asyncio

from comfyui_psa.nodes import PSAExtension

# When tests are collected: later, a browser's event loop may run in this thread, and `asyncio.run` fails.
NODES = {node.GET_SCHEMA().node_id: node for node in asyncio.run(PSAExtension().get_node_list())}
SCHEMAS = {name: node.GET_SCHEMA() for name, node in NODES.items()}
