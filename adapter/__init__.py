"""The method in plain PyTorch: projection, user cross-attention, sites in a UNet, files.

Knows nothing of ComfyUI, diffusers or language models.
"""

from .config import PAPER_CATEGORIES, AdapterConfig, EncoderSpec, NullMode
from .constant import PSAAdapter, SiteVectors, UserCrossAttention, UserProjection
from .errors import AdapterError
from .families import FAMILIES, Family, family_name
from .files import SUFFIXES, load_adapter, save_adapter
from .release import TEMPLATE_NAME
from .sites import WORKS_WITH, BlockKey, Site, find_sites

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
    "NullMode",
    "PSAAdapter",
    "Site",
    "SiteVectors",
    "UserCrossAttention",
    "UserProjection",
    "family_name",
    "find_sites",
    "load_adapter",
    "save_adapter",
]
