"""From a profile to an embedding, with the encoder that an adapter names."""

from __future__ import annotations

from ..adapter import EncoderSpec, PSAAdapter
from ..profiles import EncoderError, Profile, SafetyEmbedding, banned_categories
from ..profiles.encoders import (
    AttributesEncoder,
    CachedEncoder,
    Encoder,
    LanguageModelEncoder,
    find_language_model,
)
from .folders import embedding_cache, language_model_folders
from .model_host import ComfyHost


def encode_profile(adapter: PSAAdapter, profile: Profile) -> SafetyEmbedding:
    """Return the embedding of one user, ``[1, embedding_dim]``.

    Raises:
        EncoderError: the encoder is not on this machine, cannot be used, or gives another width than the
            adapter expects.
    """
    encoder = CachedEncoder(_encoder(adapter.config.encoder), embedding_cache())
    vectors = encoder.encode([profile])
    if vectors.shape[1] != adapter.config.embedding_dim:
        raise EncoderError(
            f"The encoder {encoder.identity} gives embeddings of {vectors.shape[1]} numbers, but the adapter expects "
            f"{adapter.config.embedding_dim}. Another model lies under the name {adapter.config.encoder.name}: "
            "replace it by the one that the adapter was trained with."
        )
    return SafetyEmbedding(vectors, encoder.identity, categories=banned_categories(profile))


def _encoder(spec: EncoderSpec) -> Encoder:
    if spec.kind == "attributes":
        if spec.name != AttributesEncoder.identity:
            raise EncoderError(
                f"The adapter was trained with the encoder {spec.name}; this version of ComfyUI-PSA has "
                f"{AttributesEncoder.identity}. Update ComfyUI-PSA."
            )
        return AttributesEncoder()
    if spec.template is None:
        raise EncoderError(
            "The adapter does not say with which prompt template its embeddings were made. Put the release's "
            "get_embeds.txt beside the adapter, or convert it: psa convert IN OUT --template FILE."
        )
    return LanguageModelEncoder(
        spec.name, spec.template, find_language_model(spec.name, language_model_folders()), ComfyHost()
    )
