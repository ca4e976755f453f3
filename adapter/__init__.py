"""The method in plain PyTorch: projection, user cross-attention, sites in a UNet, files.

Knows nothing of ComfyUI, diffusers or language models.
"""

from .adapter import PSAAdapter, UserEffect
from .algebra import joined, mixed, users_of
from .config import PAPER_CATEGORIES, AdapterConfig, EncoderSpec, GatedSpec, Kind, NullMode, TextSpec
from .constant import SiteVectors
from .errors import AdapterError
from .families import FAMILIES, Family, family_name
from .files import SUFFIXES, load_adapter, load_adapter_config, save_adapter
from .gated import SiteGate
from .release import TEMPLATE_NAME
from .sites import WORKS_WITH, BlockKey, Site, find_sites
from .text import UserText

__all__ = [
    "FAMILIES",
    "PAPER_CATEGORIES",
    "SUFFIXES",
    "TEMPLATE_NAME",
    "WORKS_WITH",
    "AdapterConfig",
    "AdapterError",
    "BlockKey",
    "EncoderSpec",
    "Family",
    "GatedSpec",
    "Kind",
    "NullMode",
    "PSAAdapter",
    "Site",
    "SiteGate",
    "SiteVectors",
    "TextSpec",
    "UserEffect",
    "UserText",
    "family_name",
    "find_sites",
    "joined",
    "load_adapter",
    "load_adapter_config",
    "mixed",
    "save_adapter",
    "users_of",
]
