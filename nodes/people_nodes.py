"""Safety Levels, Mix and Batch Safety Profiles, Same Latent for Everyone: several people in a picture or a batch."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..adapter import PSAAdapter
from ..profiles import levels
from .encode import encode_profile
from .people import Group, Mixture, People, count
from .schema import Adapter, Embedding, node_schema


class PSASafetyLevels(io.ComfyNode):
    """Offers all levels of the paper at once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Adapter in; the embeddings of six people out."""
        return node_schema(
            ["PSA", "all levels", "compare levels", "safety presets"],
            node_id="PSASafetyLevels",
            display_name="Safety Levels",
            description="All six levels, L0 to L5, encoded for an adapter as Encode Safety Profile does it: a batch of "
            "six people, for comparing.",
            inputs=[Adapter.Input("adapter", tooltip="From Load PSA Adapter: it says which encoder to use.")],
            outputs=[
                Embedding.Output(
                    "embedding", display_name="embedding", tooltip="For Apply PSA and Same Latent for Everyone."
                )
            ],
        )

    @classmethod
    def execute(cls, adapter: PSAAdapter) -> io.NodeOutput:
        """Encode the levels' profiles."""
        return io.NodeOutput(Group(tuple(encode_profile(adapter, level.profile) for level in levels())))


class PSAMixProfiles(io.ComfyNode):
    """Two people who count as one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Two embeddings and their weights in; one out."""
        return node_schema(
            ["PSA", "interpolate", "blend profiles", "weighted", "slider"],
            node_id="PSAMixProfiles",
            display_name="Mix Safety Profiles",
            description="Something between two people: what Apply PSA does for the one and for the other, added with "
            "these weights. For more, put one behind the other. Whoever has to be protected from something belongs "
            "into Strictest Safety Profile instead.",
            # All required: one that is muted has to be an error.
            inputs=[
                field
                for number in (1, 2)
                for field in (
                    Embedding.Input(
                        f"embedding_{number}",
                        tooltip="From Encode Safety Profile, Load Safety Embedding or another of these nodes.",
                    ),
                    io.Float.Input(
                        f"weight_{number}",
                        default=0.5,
                        min=0.0,
                        max=1.0,
                        step=0.05,
                        tooltip="How much this one counts. Only the proportion of the two matters.",
                    ),
                )
            ],
            outputs=[Embedding.Output("embedding", display_name="embedding", tooltip="For Apply PSA.")],
        )

    @classmethod
    def execute(cls, embedding_1: People, weight_1: float, embedding_2: People, weight_2: float) -> io.NodeOutput:
        """Return their mixture."""
        return io.NodeOutput(Mixture((embedding_1, embedding_2), (weight_1, weight_2)))


class PSABatchProfiles(io.ComfyNode):
    """Several people, each with an image of their own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Two embeddings in; one out."""
        return node_schema(
            ["PSA", "batch", "compare", "one image per person"],
            node_id="PSABatchProfiles",
            display_name="Batch Safety Profiles",
            description="One batch for many people: every image belongs to one of them. The latent has to have as many "
            "images, or a multiple; Same Latent for Everyone makes it. For more, put one behind the other.",
            # All required: without one that is muted, images would be somebody else's.
            inputs=[
                Embedding.Input("embedding_1", tooltip="One person, or several (Safety Levels)."),
                Embedding.Input("embedding_2", tooltip="More people, behind the first."),
            ],
            outputs=[
                Embedding.Output(
                    "embedding", display_name="embedding", tooltip="For Apply PSA and Same Latent for Everyone."
                )
            ],
        )

    @classmethod
    def execute(cls, embedding_1: People, embedding_2: People) -> io.NodeOutput:
        """Return all of them, one behind the other."""
        return io.NodeOutput(Group((embedding_1, embedding_2)))


class PSARepeatLatent(io.ComfyNode):
    """The same start for everybody."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Latent and embedding in; latent out."""
        return node_schema(
            ["PSA", "repeat latent", "same noise", "same seed", "one batch for many"],
            node_id="PSARepeatLatent",
            display_name="Same Latent for Everyone",
            description="Repeats a latent once for each person of an embedding, with the same noise, so that images "
            "differ by the person alone.",
            inputs=[
                io.Latent.Input("latent", tooltip="One latent, or several: each is repeated for everybody in turn."),
                Embedding.Input("embedding", tooltip="The one that Apply PSA gets, from Batch Safety Profiles."),
            ],
            outputs=[
                io.Latent.Output(
                    "repeated",
                    display_name="LATENT",
                    tooltip="For a sampler. Everybody's images of the first latent, then those of the second.",
                )
            ],
        )

    @classmethod
    def execute(cls, latent: dict[str, Any], embedding: People) -> io.NodeOutput:
        """Repeat samples, mask and the numbers from which a sampler draws noise."""
        people, samples = count(embedding), latent["samples"]
        numbers = latent.get("batch_index") or range(len(samples))
        repeated = {
            **latent,
            "samples": samples.repeat_interleave(people, dim=0),
            "batch_index": [number for number in numbers for _ in range(people)],
        }
        if "noise_mask" in latent:
            repeated["noise_mask"] = _one_each(latent["noise_mask"], len(samples)).repeat_interleave(people, dim=0)
        return io.NodeOutput(repeated)


def _one_each(masks: Tensor, images: int) -> Tensor:
    """Return a mask for each image, as a sampler gives them out: again from the first one if there are fewer."""
    return masks[torch.arange(images) % len(masks)]


NODES: list[type[io.ComfyNode]] = [PSASafetyLevels, PSAMixProfiles, PSABatchProfiles, PSARepeatLatent]
