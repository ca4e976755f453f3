"""What belongs together: people, the encoder that made their embeddings, and the adapter that acts for them."""

from __future__ import annotations

from ..adapter import AdapterError, CompiledProfile, EncoderSpec, PSAAdapter, adapter_hash
from ..profiles import EncoderError, SafetyEmbedding
from ..profiles.encoders import llm_identity
from .people import People, everyone


def check_together(people: People, adapter: PSAAdapter | None) -> None:
    """Raise unless one adapter acts for all of these people; without one, all of them have to be compiled.

    Raises:
        AdapterError: the adapter is missing, or a compiled profile is of another one.
        EncoderError: an embedding is from another encoder than the adapter's.
    """
    embeddings = [person for person in everyone(people) if isinstance(person, SafetyEmbedding)]
    compiled = [person for person in everyone(people) if isinstance(person, CompiledProfile)]
    for embedding in embeddings:
        if adapter is None:
            raise AdapterError(
                "There is no adapter for this embedding, so nobody would be protected. Connect Load PSA Adapter, or a "
                "compiled profile (Load Compiled Profile), which needs none."
            )
        check_encoder(adapter, embedding)
    if not compiled:
        return
    expected = compiled[0].spec.adapter if adapter is None else adapter_hash(adapter)
    for profile in compiled:
        if profile.spec.adapter != expected:
            other = compiled[0].source if adapter is None else "the connected one"
            raise AdapterError(
                f"{profile.source} was compiled with another adapter than {other}. Compile the profile again with the "
                "same adapter; if only compiled profiles are connected, none is needed here."
            )


def check_encoder(adapter: PSAAdapter, embedding: SafetyEmbedding) -> None:
    """Raise EncoderError if the embedding names another encoder than the adapter was trained with."""
    expected = encoder_identity(adapter.config.encoder)
    if embedding.encoder and expected and embedding.encoder != expected:
        raise EncoderError(
            f"The embedding comes from the encoder {embedding.encoder}, but the adapter was trained with {expected}. "
            "Encode the profile again with this adapter (Encode Safety Profile)."
        )


def encoder_identity(spec: EncoderSpec) -> str | None:
    """Return the identity of the encoder that an adapter names; None if its template is not known."""
    if spec.kind == "attributes":
        return spec.name
    return None if spec.template is None else llm_identity(spec.name, spec.template)
