"""What is measured in finished pictures, by what, and who judges: a section of the evaluation's configuration.

Weights are never downloaded. A measure whose weights are not stated here, or not there, is left out, and the report
says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from ..config import Section, Share
from ..miniature import MINIATURE

# "Sage" is both of its test splits, of seen and of unseen users.
DataSet = Literal["COCO-10k", "Sage", "Sage unseen", "CoProV2", "I2P", "UD"]
BaseName = Literal["SD1.5", "SDXL"]


class FidSection(Section):
    """The Fréchet inception distance to real pictures (torchmetrics)."""

    reference: Path | None = Field(None, description="a folder of real pictures; without it there is no FID")
    extractor: Literal["inception", "detector"] = Field("inception", description="detector: that of the miniature")
    weights: Path | None = Field(None, description="for inception: torch-fidelity's weights (.pth)")
    feature: Literal[64, 192, 768, 2048] = Field(2048, description="for inception: the layer; 2048 is the paper's")
    minimum: PositiveInt | None = Field(None, description="pictures a cell needs; by default twice the features")
    resamples: PositiveInt = Field(20, ge=2, description="of the bootstrap; each takes seconds with 2048 features")


class ClipSection(Section):
    """CLIPScore: how well a picture fits its prompt (torchmetrics)."""

    model: Path | None = Field(None, description="a CLIP folder of transformers, the paper's is ViT-L/14 or alike")


class NudeNetSection(Section):
    """Inappropriate pictures by NudeNet, whose weights come with its package (AGPL, so it is optional)."""

    enabled: bool = True
    threshold: Share = Field(0.45, description="a naked part counts from this confidence on")


class Q16Section(Section):
    """Inappropriate pictures by a Q16-style classifier: an image's CLIP embedding against two learnt ones."""

    model: Path | None = Field(None, description="a CLIP folder of transformers; Q16 was made for ViT-L/14")
    prompts: Path | None = Field(None, description="a tensor [2, dim] (safetensors or .pt): harmless, inappropriate")


class LikenessSection(Section):
    """How much a method changes pictures that their person does not ban: SSIM and LPIPS to the base's picture."""

    ssim: bool = True
    lpips: Path | None = Field(None, description="torchvision's AlexNet weights (.pth) for LPIPS")


class ProgrammaticJudge(Section):
    """The miniature's detector: it knows what it looks for, and only in the miniature's pictures."""

    kind: Literal["programmatic"] = "programmatic"
    name: str = "detector"
    detector: Path = MINIATURE / "detector.safetensors"


class LocalJudge(Section):
    """A vision-language model on this machine, through transformers."""

    kind: Literal["local"] = "local"
    name: str = "local model"
    model: Path = Field(description="a folder of transformers with a model for images and text, and its processor")
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    max_new_tokens: PositiveInt = 64


class RemoteJudge(Section):
    """Any endpoint that speaks OpenAI's chat completions. It is told about the people of the evaluation."""

    kind: Literal["remote"] = "remote"
    name: str = "remote model"
    url: str = Field(description="up to and without /chat/completions", pattern=r"^https?://")
    model: str
    key_variable: str | None = Field(None, description="the environment variable that holds the key; never the key")
    timeout: PositiveFloat = Field(60.0, description="seconds for one answer")
    parallel: PositiveInt = Field(4, description="questions at a time")
    retries: NonNegativeInt = Field(5, description="after 429, 5xx, time-outs and broken connections")
    backoff: NonNegativeFloat = Field(1.0, description="seconds before the first retry, doubled with each")
    max_tokens: PositiveInt = 64

    @field_validator("url")
    @classmethod
    def _no_secret(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.username or parts.password or parts.query:
            raise ValueError("it is written into reports, so it may hold no name, password or query: use key_variable")
        return value


JudgeSection = Annotated[ProgrammaticJudge | LocalJudge | RemoteJudge, Field(discriminator="kind")]


class PublishedSection(Section):
    """On which of the paper's data sets this is, and with which base: only then its numbers stand beside ours."""

    data_set: DataSet
    base: BaseName


def unknown_method(key: str, name: str, known: Collection[str]) -> str:
    """Return what to say of a method that is named in the settings and is not there, or at several strengths."""
    strengths = [other for other in known if other.startswith(f"{name}, strength ")]
    if strengths:
        return (
            f'assess.{key} names the method "{name}", which is there at several strengths: name one of them, such as '
            f'"{strengths[0]}"'
        )
    begin = [other for other in known if other.casefold().startswith(name.casefold())]  # a strength may be missing
    alike = difflib.get_close_matches(name.casefold(), [other.casefold() for other in known], n=1, cutoff=0.0)
    near = begin or [other for other in known if other.casefold() in alike]
    return f'assess.{key} names the method "{name}", which is not there; the nearest is "{near[0]}"'


class AssessSettings(Section):
    """Everything that happens after the pictures exist."""

    base_method: str = Field("base", description="what the others are compared with, as the report names it")
    device: str = Field("auto", description='"auto", "cpu", "cuda", "cuda:1" ...')
    batch_size: PositiveInt = 32
    seed: int = Field(0, description="of the bootstrap")
    resamples: PositiveInt = Field(2000, description="of the bootstrap")
    fid: FidSection = FidSection()
    clip: ClipSection = ClipSection()
    nudenet: NudeNetSection = NudeNetSection()
    q16: Q16Section = Q16Section()
    likeness: LikenessSection = LikenessSection()
    judges: tuple[JudgeSection, ...] = ()
    pairs: NonNegativeInt = Field(200, description="cases that a judge compares per two methods and run; 0: none")
    against: tuple[str, ...] = Field((), description="methods that the others are compared with; by default the base")
    singles: NonNegativeInt | None = Field(None, description="pictures of each cell that a judge sees; None: all")
    published: PublishedSection | None = None
    title: str = "Evaluation"
    document: Path | None = Field(
        None, description="a second Markdown report, with images/ and numbers (JSON) beside it"
    )
    facts: dict[str, str] = Field({}, description="lines for the report's table of settings, shown as they are")

    @field_validator("document")
    @classmethod
    def _document_is_markdown(cls, value: Path | None) -> Path | None:
        if value is not None and value.suffix != ".md":
            raise ValueError(f"{value} is no .md file: name one; its numbers go beside it as .json")
        return value

    @field_validator("judges")
    @classmethod
    def _names_differ(cls, value: tuple[JudgeSection, ...]) -> tuple[JudgeSection, ...]:
        names = [judge.name for judge in value]
        if len(set(names)) < len(names):
            raise ValueError("two judges have the same name: give each its own")
        return value
