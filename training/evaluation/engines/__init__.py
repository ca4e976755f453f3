"""Who draws: models in this process, or a ComfyUI that runs somewhere."""

from .base import Engine, Order

__all__ = ["Engine", "Order"]
