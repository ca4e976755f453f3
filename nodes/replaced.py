"""Nodes that replace cross-attention may bring prompts of their own (as some regional prompting does).

Such a node projects its prompts with the layer's own ``to_k``. An image's tokens, as IPAdapter has them, go through
layers of IPAdapter's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..adapter import AdapterError, Site
from .roles import Options


@contextmanager
def only_given_text(
    unet: nn.Module, sites: Sequence[Site], options: Options, given: Callable[[], Tensor | None]
) -> Iterator[None]:
    """Within the block, raise AdapterError if a replaced layer projects other text than what it was given last.

    Other threads, which may run the same layers, are not looked at.
    """
    replaced = options.get("patches_replace", {}).get("attn2", {})
    owner = threading.get_ident()

    def check(module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() == owner and args[0] is not given():
            raise AdapterError(
                "Another node replaces the cross-attention and reads prompts of its own there, which an adapter that "
                "acts on text cannot change, so the picture would not be protected. Remove that node, or use an "
                "adapter of another kind."
            )

    keys = [unet.get_submodule(f"{site.path}.to_k") for site in sites if _is_replaced(site, replaced)]
    handles = [key.register_forward_pre_hook(check) for key in keys]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def replaces(options: Options) -> bool:
    """Return whether any node replaces cross-attention."""
    return bool(options.get("patches_replace", {}).get("attn2"))


def _is_replaced(site: Site, replaced: Container[object]) -> bool:
    stage, block, depth = site.key
    return (stage, block) in replaced or (stage, block, depth) in replaced
