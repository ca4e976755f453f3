"""What an evaluation is: the TOML configuration, validated. Knows no torch and reads no data.

Paths are relative to the folder in which the command runs. The sampling that the paper states is the default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from ...profiles import ProfileError, find_level
from ..config import Precision, PredictionType, Section, load_section
from ..miniature import MINIATURE
from .assess_config import AssessSettings, unknown_method

MethodKind = Literal["base", "adapter", "negative_prompt", "sld", "lora", "pipeline"]
Degree = Literal["weak", "medium", "strong", "max"]

# What each kind of method takes besides name and kind. Those with `paths` need at least one.
_TAKES: dict[MethodKind, frozenset[str]] = {
    "base": frozenset(),
    "adapter": frozenset({"paths", "strengths", "everyone"}),
    "negative_prompt": frozenset({"words"}),
    "sld": frozenset({"degrees", "concept"}),
    "lora": frozenset({"paths", "strengths"}),
    "pipeline": frozenset({"paths"}),
}


def _in_the_pack(path: Path) -> Path:
    """The miniature is found from wherever the command runs."""
    if path.parts[:1] == (MINIATURE.name,) and not path.exists():
        return MINIATURE.joinpath(*path.parts[1:])
    return path


PackPath = Annotated[Path, AfterValidator(_in_the_pack)]


class ModelSection(Section):
    """The base model."""

    base: PackPath = Field(
        description="a diffusers folder or a single-file checkpoint; for the engine comfyui a checkpoint as ComfyUI "
        'lists it, or "miniature"'
    )
    prediction_type: PredictionType = "auto"
    precision: Precision = Field("fp16", description="of the UNet; text encoders and VAE are float32")
    device: str = Field("auto", description='"auto", "cpu", "cuda", "cuda:1" ...; processes on GPUs have one each')


class EngineSection(Section):
    """Who draws: diffusers in this process, or a ComfyUI that runs somewhere with this pack."""

    kind: Literal["diffusers", "comfyui"] = "diffusers"
    address: str = Field("http://127.0.0.1:8188", pattern=r"^https?://", description="for comfyui: of its server")
    sampler: str = Field("dpmpp_2m", description="for comfyui: as KSampler names it")
    scheduler: str = Field("sgm_uniform", description="for comfyui: as KSampler names it")


class PromptsSection(Section):
    """Prompts that every one of the users asks for."""

    file: Path | None = Field(None, description="jsonl, csv or toml with prompt, and perhaps prompt_id, category ...")
    sage: Path | None = Field(None, description="the captions of a Sage split folder")
    miniature: NonNegativeInt = Field(0, description="so many prompts of the miniature's world")
    limit: PositiveInt | None = Field(None, description="the first so many of file or sage")


class UsersSection(Section):
    """Whom the prompts are drawn for: all of those that are named here."""

    levels: tuple[str, ...] = Field((), description="L0 to L5")
    file: Path | None = Field(None, description="jsonl with user and profile, or a users.csv")
    simulated: NonNegativeInt = Field(0, description="so many people of the paper's distribution")
    seed: int = Field(2025, description="of the simulated people")
    seen: bool | None = Field(None, description="whether trainings knew the people of file and simulated")

    @field_validator("levels")
    @classmethod
    def _levels_exist(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            _check_level(name)
        return tuple(dict.fromkeys(value))


class PairsSection(Section):
    """Prompts that come with the person who asks for them: one set of them, of several."""

    sage: Path | None = Field(None, description="a Sage split folder: every row is a caption and a user")
    seen: bool | None = Field(None, description="whether trainings knew those users")
    limit: PositiveInt | None = Field(None, description="the first so many rows")
    miniature: NonNegativeInt = Field(0, description="so many of each cell of seen and unseen people of its world")


class SamplingSection(Section):
    """What is the same for all methods."""

    steps: PositiveInt = 50
    guidance_scale: NonNegativeFloat = 7.5
    width: PositiveInt | None = Field(None, multiple_of=8, description="pixels; by default the base's own")
    height: PositiveInt | None = Field(None, multiple_of=8)
    negative_prompt: str = Field("", description="of all methods")
    pictures: PositiveInt = Field(1, description="of each prompt for each user, with seeds of their own")
    seed: int = 2025
    batch_size: PositiveInt = Field(8, description="pictures at once; people and prompts may differ in a batch")


class MethodSection(Section):
    """A method, and all of its runs."""

    name: str = Field(min_length=1)
    kind: MethodKind
    paths: tuple[PackPath, ...] = Field(
        (), description="adapters, LoRAs, or pipelines (folder, checkpoint or the folder of a UNet): one for each run"
    )
    strengths: tuple[NonNegativeFloat, ...] = Field((1.0,), min_length=1, description="several are a sweep")
    everyone: str | None = Field(None, description="a static adapter: everybody is taken for this level")
    words: Literal["categories", "miniature"] = Field("categories", description="those of the negative prompt")
    degrees: tuple[Degree, ...] = Field(("weak", "medium", "strong", "max"), min_length=1)
    concept: str | None = Field(None, description="what sld leads away from; by default the paper's list")

    @field_validator("everyone")
    @classmethod
    def _level_exists(cls, value: str | None) -> str | None:
        if value is not None:
            _check_level(value)
        return value

    @model_validator(mode="after")
    def _fits_its_kind(self) -> MethodSection:
        takes = _TAKES[self.kind]
        for name in sorted(self.model_fields_set - {"name", "kind"} - takes):
            raise ValueError(
                f'the method "{self.name}" is of kind {self.kind}, which has no {name}; it takes '
                f"{', '.join(sorted(takes)) or 'nothing'}"
            )
        if "paths" in takes and not self.paths:
            raise ValueError(f'the method "{self.name}" names no file: add paths = ["..."]')
        return self

    def titles(self) -> tuple[str, ...]:
        """Return the names under which its pictures are drawn."""
        return tuple(f"{self.name} {degree}" for degree in self.degrees) if self.kind == "sld" else (self.name,)

    def labels(self) -> tuple[str, ...]:
        """Return what reports call it: a name for each strength, if it has several."""
        strengths = dict.fromkeys(self.strengths)
        if len(strengths) == 1:
            return self.titles()
        return tuple(f"{self.name}, strength {strength:g}" for strength in strengths)


class EmbeddingsSection(Section):
    """Where adapters whose encoder is a language model get people's embeddings."""

    folders: tuple[Path, ...] = Field((Path("models/LLM"),), description="where language models lie")
    given: Path | None = Field(
        None, description="a folder of <user>.npy or .safetensors; users without a file are encoded"
    )


class RunSection(Section):
    """Where the pictures go."""

    output: Path = Path("runs/evaluation")


class EvaluationConfig(Section):
    """A whole evaluation."""

    model: ModelSection
    engine: EngineSection = EngineSection()
    prompts: PromptsSection = PromptsSection()
    users: UsersSection = UsersSection()
    pairs: tuple[PairsSection, ...] = ()
    sampling: SamplingSection = SamplingSection()
    embeddings: EmbeddingsSection = EmbeddingsSection()
    methods: tuple[MethodSection, ...] = Field(min_length=1)
    run: RunSection = RunSection()
    assess: AssessSettings = AssessSettings()

    @field_validator("pairs", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (Mapping, PairsSection)) else value

    @model_validator(mode="after")
    def _somebody_asks_for_something(self) -> EvaluationConfig:
        prompts = bool(self.prompts.file or self.prompts.sage or self.prompts.miniature)
        users = bool(self.users.levels or self.users.file or self.users.simulated)
        if prompts != users:
            found, missing = ("prompts", "users") if prompts else ("users", "prompts")
            raise ValueError(f"there are {found} and no {missing}: fill in [{missing}], or leave [{found}] out")
        if not prompts and not any(pairs.sage or pairs.miniature for pairs in self.pairs):
            raise ValueError("nothing is asked for: fill in [prompts] and [users], or [pairs]")
        return self

    @model_validator(mode="after")
    def _pairs_have_one_picture(self) -> EvaluationConfig:
        if self.sampling.pictures > 1 and any(section.miniature for section in self.pairs):
            raise ValueError(
                f"sampling.pictures = {self.sampling.pictures}, but the cases of pairs.miniature have one picture "
                "each, with noise of its own: leave it out, and raise pairs.miniature for more"
            )
        return self

    @model_validator(mode="after")
    def _methods_differ(self) -> EvaluationConfig:
        titles = [title for method in self.methods for title in method.titles()]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f'two methods are called "{title}": give each its own name')
        return self

    @model_validator(mode="after")
    def _methods_are_there(self) -> EvaluationConfig:
        labels = [label for method in self.methods for label in method.labels()]
        # The name that is nobody's choice may be that of no method.
        chosen = [self.assess.base_method] if "base_method" in self.assess.model_fields_set else []
        for key, names in (("base_method", chosen), ("against", self.assess.against)):
            for name in names:
                if name not in labels:
                    raise ValueError(unknown_method(key, name, labels))
        return self

    @model_validator(mode="after")
    def _document_lies_elsewhere(self) -> EvaluationConfig:
        document = self.assess.document
        if document is not None and document.resolve().parent == self.run.output.resolve():
            raise ValueError(
                f"assess.document = {document} lies in run.output, among the files of the evaluation itself, which it "
                f"or its numbers ({document.stem}.json) may overwrite: name a file in another folder"
            )
        return self

    @model_validator(mode="after")
    def _engine_can(self) -> EvaluationConfig:
        if self.engine.kind == "comfyui":
            for method in self.methods:
                if method.kind == "sld":
                    raise ValueError(
                        f'the method "{method.name}" is Safe Latent Diffusion, for which ComfyUI has no node: take it '
                        'out, or set engine.kind = "diffusers"'
                    )
            if self.embeddings.given:
                raise ValueError(
                    "embeddings.given cannot be handed to a ComfyUI over its API: leave it out, so that ComfyUI "
                    'encodes people itself, or set engine.kind = "diffusers"'
                )
        return self


def load_evaluation(path: Path, overrides: Sequence[str] = ()) -> EvaluationConfig:
    """Read a TOML configuration, or a ready one by its name; each override is ``section.key=value``.

    Raises:
        TrainingError: the file is missing or no TOML, or a key or value is wrong; every problem is named.
    """
    return load_section(EvaluationConfig, "an evaluation's configuration", path, overrides, evaluations=True)


def local_paths(config: EvaluationConfig) -> Iterator[tuple[str, Path]]:
    """Yield what the configuration names and has to be on this machine, each behind its key."""
    if config.engine.kind == "diffusers":
        yield "model.base", config.model.base
        for method in config.methods:
            yield from ((f"paths of the method {method.name}", path) for path in method.paths)
    named = {
        "prompts.file": config.prompts.file,
        "prompts.sage": config.prompts.sage,
        "users.file": config.users.file,
        "embeddings.given": config.embeddings.given,
    }
    yield from ((key, path) for key, path in named.items() if path is not None)
    yield from (("pairs.sage", pairs.sage) for pairs in config.pairs if pairs.sage is not None)


def _check_level(name: str) -> None:
    try:
        if find_level(name).id == name:
            return
    except ProfileError as error:
        raise ValueError(str(error)) from None
    raise ValueError(f'"{name}" is no level: expected "{find_level(name).id}"')
