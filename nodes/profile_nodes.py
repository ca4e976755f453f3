"""Safety Level, User Safety Profile, and what becomes of them: an embedding, or words. Load Safety Embedding."""

from __future__ import annotations

from comfy.sd import CLIP
from comfy_api.latest import io

from ..adapter import PSAAdapter
from ..profiles import (
    ACTIVE,
    Audience,
    EncoderError,
    Profile,
    ProfileError,
    find_level,
    levels,
    load_embedding,
    private_fingerprint,
    wording,
)
from .accounts import REFUSED
from .encode import encode_profile
from .folders import EMBEDDINGS, check_file, file_fingerprint, file_names, find_file, missing_file, profile_store
from .schema import Adapter, Embedding, UserProfile, node_schema

_FROM = "From User Safety Profile, Safety Level or Strictest Safety Profile."


class PSASafetyLevel(io.ComfyNode):
    """Offers the six levels of the paper as profiles."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """One choice: L0 to L5."""
        return node_schema(
            ["PSA", "safety preset", "strictness", "safety level"],
            node_id="PSASafetyLevel",
            display_name="Safety Level",
            description="A ready-made profile, from L0 (nothing banned) to L5 (everything banned). The people "
            "behind the levels are synthetic.",
            inputs=[
                io.Combo.Input(
                    "level",
                    options=[level.label for level in levels()],
                    default=levels()[3].label,
                    tooltip="Whose boundaries to follow: one of the six people of the paper. A shared workflow "
                    "contains this choice.",
                )
            ],
            outputs=[UserProfile.Output("profile", display_name="profile", tooltip="For Encode Safety Profile.")],
        )

    @classmethod
    def validate_inputs(cls, level: str | None) -> bool | str:
        """Accept a level by its id, so that workflows outlive a change of the labels; a linked one is None here."""
        try:
            if level is not None:
                find_level(level)
        except ProfileError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, level: str) -> io.NodeOutput:
        """Return the level's profile."""
        return io.NodeOutput(find_level(level).profile)


class PSAUserProfile(io.ComfyNode):
    """Refers to a profile in the private store; only the reference is in the workflow."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """One choice: the active profile, one by its random id, or a level."""
        return node_schema(
            ["PSA", "user profile", "safety profile", "my profile", "boundaries"],
            node_id="PSAUserProfile",
            display_name="User Safety Profile",
            description="Your profile, or another one stored on this machine. The workflow holds only a "
            'reference; with "active" whoever opens it gets their own boundaries. Make profiles in the tab Safety '
            "Profiles.",
            inputs=[
                io.Combo.Input(
                    "profile_id",
                    options=[ACTIVE, *_profile_ids(), *(level.id for level in levels())],
                    default=ACTIVE,
                    tooltip='"active" is the active profile of whoever runs the workflow; the others are random ids '
                    "of profiles on this machine, and the levels L0 to L5.",
                )
            ],
            outputs=[UserProfile.Output("profile", display_name="profile", tooltip="For Encode Safety Profile.")],
        )

    @classmethod
    def validate_inputs(cls, profile_id: str | None) -> bool | str:
        """Accept a reference to a readable profile; anything else stops the prompt before it runs.

        A linked reference is None here; it is resolved when the node runs.
        """
        try:
            if profile_id is not None:
                _profile(profile_id)
        except ProfileError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, profile_id: str | None) -> str | float:
        """Change when the profile does. ComfyUI saves this into images: it tells nothing of the profile."""
        if profile_id is None:
            return float("nan")  # linked: unknown until it runs, so it always runs
        if _is_level(profile_id):
            return profile_id
        try:
            stored = profile_store().resolve(profile_id)
        except ProfileError:
            return float("nan")
        # Not of the content: others who see it could try what gives the same.
        return private_fingerprint(f"{stored.id} {stored.revision}")

    @classmethod
    def execute(cls, profile_id: str) -> io.NodeOutput:
        """Read the profile."""
        return io.NodeOutput(_profile(profile_id))


def _profile(reference: str) -> Profile:
    if reference.startswith(REFUSED):
        raise ProfileError(reference.removeprefix(REFUSED))
    return find_level(reference).profile if _is_level(reference) else profile_store().resolve(reference).profile


def _is_level(reference: str) -> bool:
    return any(reference == level.id for level in levels())


def _profile_ids() -> list[str]:
    try:
        return [entry.id for entry in profile_store().entries()]
    except ProfileError:
        return []


class PSAStrictestProfile(io.ComfyNode):
    """Several people in front of one screen."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Two profiles in; one out."""
        return node_schema(
            ["PSA", "audience", "union", "combine profiles", "strictest"],
            node_id="PSAStrictestProfile",
            display_name="Strictest Safety Profile",
            description="For two people who look at the same pictures: what one of them bans is banned. For more, put "
            "one behind the other.",
            # All required: one that is muted has to be an error.
            inputs=[
                UserProfile.Input(
                    f"profile_{number}",
                    tooltip="From User Safety Profile, Safety Level or another Strictest Safety Profile.",
                )
                for number in (1, 2)
            ],
            outputs=[UserProfile.Output("profile", display_name="profile", tooltip="For Encode Safety Profile.")],
        )

    @classmethod
    def execute(cls, profile_1: Profile, profile_2: Profile) -> io.NodeOutput:
        """Return their audience."""
        return io.NodeOutput(Audience.of(profile_1, profile_2))


class PSAEncodeProfile(io.ComfyNode):
    """Turns a profile into the embedding that an adapter understands."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Adapter and profile in; embedding out."""
        return node_schema(
            ["PSA", "encode profile", "user embedding", "safety embedding"],
            node_id="PSAEncodeProfile",
            display_name="Encode Safety Profile",
            description="Turns a profile into an embedding with the encoder that the adapter names: a language model "
            "from models/LLM, which is never downloaded by itself, or none at all. Results are kept on disk.",
            inputs=[
                Adapter.Input("adapter", tooltip="From Load PSA Adapter: it says which encoder to use."),
                UserProfile.Input("profile", tooltip=_FROM),
            ],
            outputs=[Embedding.Output("embedding", display_name="embedding", tooltip="For Apply PSA.")],
        )

    @classmethod
    def execute(cls, adapter: PSAAdapter, profile: Profile) -> io.NodeOutput:
        """Encode the profile."""
        return io.NodeOutput(encode_profile(adapter, profile))


class PSAProfileToPrompt(io.ComfyNode):
    """Puts a profile into words, for models that no adapter fits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """CLIP, profile and a negative prompt in; its conditioning out."""
        return node_schema(
            ["PSA", "profile as text", "negative prompt", "prompt engineering", "DiT", "Flux"],
            node_id="PSAProfileToPrompt",
            display_name="Safety Profile to Prompt",
            description="Puts what a profile bans into a negative prompt: for models that have no PSA adapter (SD3, "
            "Flux, ...). Weaker than an adapter: what a prompt asks for often shows anyway.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of your model."),
                UserProfile.Input("profile", tooltip=_FROM),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    tooltip="Your own negative prompt; what the profile bans is put behind it.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "negative", display_name="CONDITIONING", tooltip="For the negative input of a sampler."
                )
            ],
        )

    @classmethod
    def execute(cls, clip: CLIP, profile: Profile, text: str) -> io.NodeOutput:
        """Encode the words here: as text they would get into the error reports of nodes behind this one."""
        own = text.strip().rstrip(",")
        words = ", ".join(part for part in (own, wording(profile)) if part)
        return io.NodeOutput(clip.encode_from_tokens_scheduled(clip.tokenize(words)))


class PSALoadEmbedding(io.ComfyNode):
    """Reads an embedding that was made elsewhere."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """One choice: the files in models/psa_embeddings."""
        return node_schema(
            ["PSA", "load embedding", "user embedding", "safety embedding"],
            node_id="PSALoadEmbedding",
            display_name="Load Safety Embedding",
            description="Loads a user embedding from models/psa_embeddings, so that no language model is needed. "
            "An embedding tells of its user: share it with the same care as a profile.",
            inputs=[
                io.Combo.Input(
                    "embedding_name",
                    options=file_names(EMBEDDINGS),
                    tooltip="A .npy or .safetensors file in models/psa_embeddings: one user, or one per image.",
                )
            ],
            outputs=[Embedding.Output("embedding", display_name="embedding", tooltip="For Apply PSA.")],
        )

    @classmethod
    def validate_inputs(cls, embedding_name: str | None) -> bool | str:
        """Accept a file that exists; else say where it belongs."""
        return check_file("embedding", EMBEDDINGS, embedding_name)

    @classmethod
    def fingerprint_inputs(cls, embedding_name: str | None) -> str:
        """Change when the file is replaced."""
        return file_fingerprint(find_file(EMBEDDINGS, embedding_name) if embedding_name else None)

    @classmethod
    def execute(cls, embedding_name: str) -> io.NodeOutput:
        """Load the embedding."""
        path = find_file(EMBEDDINGS, embedding_name)
        if path is None:
            raise EncoderError(missing_file("embedding", EMBEDDINGS, embedding_name))
        return io.NodeOutput(load_embedding(path))


NODES: list[type[io.ComfyNode]] = [
    PSASafetyLevel,
    PSAUserProfile,
    PSAStrictestProfile,
    PSAEncodeProfile,
    PSAProfileToPrompt,
    PSALoadEmbedding,
]
