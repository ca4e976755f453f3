"""Encoders: from profiles to user embeddings. Knows language models, and nothing of UNets."""

from .attributes import AttributesEncoder
from .base import Encoder
from .cache import CachedEncoder
from .llm import CPUHost, LanguageModelEncoder, LanguageModelFiles, ModelHost, find_language_model, llm_identity

__all__ = [
    "AttributesEncoder",
    "CPUHost",
    "CachedEncoder",
    "Encoder",
    "LanguageModelEncoder",
    "LanguageModelFiles",
    "ModelHost",
    "find_language_model",
    "llm_identity",
]
