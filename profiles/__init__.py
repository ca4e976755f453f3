"""Who the user is: schema, rules, levels, private store, and encoders from a profile to an embedding.

Knows nothing of UNets or ComfyUI. The encoders, which need transformers, are in ``profiles.encoders``.
"""

from .embedding import SafetyEmbedding, load_embedding, save_embedding
from .errors import ConflictError, EncoderError, ProfileError, StoreError, UnknownProfileError
from .levels import Level, find_level, levels
from .policy import Decision, banned_categories, bans_alone, decide
from .schema import CATEGORIES, Audience, Category, Profile, parse_profile
from .simulate import simulate_users, user_row
from .store import ACTIVE, ProfileStore, StoredProfile, embeddings_folder, private_fingerprint, profiles_folder
from .template import default_template, fill_template
from .wording import wording

__all__ = [
    "ACTIVE",
    "CATEGORIES",
    "Audience",
    "Category",
    "ConflictError",
    "Decision",
    "EncoderError",
    "Level",
    "Profile",
    "ProfileError",
    "ProfileStore",
    "SafetyEmbedding",
    "StoreError",
    "StoredProfile",
    "UnknownProfileError",
    "banned_categories",
    "bans_alone",
    "decide",
    "default_template",
    "embeddings_folder",
    "fill_template",
    "find_level",
    "levels",
    "load_embedding",
    "parse_profile",
    "private_fingerprint",
    "profiles_folder",
    "save_embedding",
    "simulate_users",
    "user_row",
    "wording",
]
