"""The frozen base model: a diffusers folder or a single-file checkpoint, opened without any hub."""

from .coder import ImageCoder
from .model import BaseModel, open_base
from .text import TextEmbedding, TextEncoder

__all__ = ["BaseModel", "ImageCoder", "TextEmbedding", "TextEncoder", "open_base"]
