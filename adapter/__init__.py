"""The method in plain PyTorch: projection, user cross-attention, sites in a UNet, files.

Knows nothing of ComfyUI, diffusers or language models.
"""

from .adapter import PSAAdapter, UserEffect
from .algebra import joined, mixed, users_of
from .compiled import (
    COMPILED_SUFFIX,
    PRECISIONS,
    CompiledProfile,
    Precision,
    adapter_hash,
    compile_profile,
    load_compiled,
    save_compiled,
)
from .config import PAPER_CATEGORIES, AdapterConfig, EncoderSpec, GatedSpec, Kind, NullMode, TextSpec
from .constant import SiteVectors
from .errors import AdapterError
from .families import FAMILIES, Family, family_name
from .files import SUFFIXES, load_adapter, load_adapter_config, save_adapter
from .gated import SiteGate
from .release import TEMPLATE_NAME
from .sites import WORKS_WITH, BlockKey, Site, find_sites
from .text import TextGate, UserText

__all__ = [
    "COMPILED_SUFFIX",
    "FAMILIES",
    "PAPER_CATEGORIES",
    "PRECISIONS",
    "SUFFIXES",
    "TEMPLATE_NAME",
    "WORKS_WITH",
    "AdapterConfig",
    "AdapterError",
    "BlockKey",
    "CompiledProfile",
    "EncoderSpec",
    "Family",
    "GatedSpec",
    "Kind",
    "NullMode",
    "PSAAdapter",
    "Precision",
    "Site",
    "SiteGate",
    "SiteVectors",
    "TextGate",
    "TextSpec",
    "UserEffect",
    "UserText",
    "adapter_hash",
    "compile_profile",
    "family_name",
    "find_sites",
    "joined",
    "load_adapter",
    "load_adapter_config",
    "load_compiled",
    "mixed",
    "save_adapter",
    "save_compiled",
    "users_of",
]
