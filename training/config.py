"""What a training run is: the TOML configuration, validated. Knows no torch and reads no data.

Paths are relative to the folder in which the command runs. Every default that the paper states is the
paper's (arXiv 2508.01151); the ready files in ``configs/`` say where they differ for SD1.5 and SDXL.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from ..adapter import EncoderSpec, GatedSpec, Kind, NullMode, TextSpec
from .errors import TrainingError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

S = TypeVar("S", bound="Section")

CONFIGS = Path(__file__).parent / "configs"

Share = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["fp32", "bf16", "fp16"]
PredictionType = Literal["auto", "epsilon", "v_prediction"]
LearningRateSchedule = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
]


class Section(BaseModel):
    """A table of the configuration: unknown keys are errors, values are fixed once read."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSection(Section):
    """The frozen base model."""

    base: Path = Field(description="a diffusers folder or a single-file checkpoint")
    prediction_type: PredictionType = "auto"
    dtype: Precision = Field("bf16", description="precision of the frozen UNet; what is trained stays float32")
    attention: Literal["sdpa", "xformers"] = "sdpa"
    gradient_checkpointing: bool = False
    compile: bool = False


class EncoderSection(Section):
    """How users become embeddings: ``attributes``, or a language model found in ``folders``."""

    kind: Literal["llm", "attributes"] = "attributes"
    name: str = Field("attributes-1", description="for llm: the model's name or hub id")
    template: Path | None = Field(None, description="for llm: a prompt template; by default this pack's own")
    folders: tuple[Path, ...] = Field((Path("models/LLM"),), description="for llm: where language models lie")
    batch_size: PositiveInt = 8

    @model_validator(mode="after")
    def _name_fits(self) -> EncoderSection:
        EncoderSpec(kind=self.kind, name=self.name)
        if self.kind == "llm" and self.name == "attributes-1":
            raise ValueError('an encoder of kind "llm" needs the name of its language model')
        return self


class DataSection(Section):
    """Preference pairs, users, and what is cached of them."""

    train: Path = Field(description="a Sage split folder, or a datasets folder (parquet, arrow, jsonl)")
    embeddings: Path | None = Field(
        None, description="a folder of <User_ID>.npy; without it the encoder computes them from user_data"
    )
    encoder: EncoderSection = EncoderSection()
    cache: Path = Path("cache")
    resolution: PositiveInt = Field(512, multiple_of=8)
    crop: Literal["center", "random"] = "center"
    flip: bool = Field(True, description="mirror a pair with probability one half")
    cache_batch_size: PositiveInt = 8
    max_skipped: NonNegativeInt = Field(0, description="how many unusable rows may be left out, each reported")


class AdapterSection(Section):
    """What is trained: one or several kinds, see ``docs/training.md``."""

    kinds: tuple[Kind, ...] = Field(("constant",), min_length=1, description="constant (the paper), gated, text")
    gated: GatedSpec = GatedSpec()
    text: TextSpec = Field(TextSpec(form="mlp"), description="sizes; pooled_dim is the base model's own")
    name: str = Field("psa_adapter", pattern=r"^[\w][\w.-]*$", description="the file name, without ending")
    null: NullMode = "zero_embedding"
    standardise: bool = Field(True, description="standardise user embeddings; false is the paper")
    dtype: Precision = Field("fp32", description="what the finished adapter's weights are rounded to")

    @field_validator("kinds")
    @classmethod
    def _each_once(cls, value: tuple[Kind, ...]) -> tuple[Kind, ...]:
        return tuple(kind for kind in get_args(Kind) if kind in value)

    @field_validator("text", mode="before")
    @classmethod
    def _form_that_did_best(cls, value: Any) -> Any:
        return {"form": "mlp", **value} if isinstance(value, dict) else value

    @field_validator("text")
    @classmethod
    def _base_knows(cls, value: TextSpec) -> TextSpec:
        if value.pooled_dim is not None:
            raise ValueError("pooled_dim is the base model's own: leave it out")
        if value.form == "mlp" and value.heads != TextSpec().heads:
            raise ValueError('the form "mlp" has no heads: leave them out, or name the form "attention"')
        return value


class LossSection(Section):
    """Diffusion-DPO. What comes after ``noise_offset`` is not in the paper, and off."""

    beta: PositiveFloat = 5000.0
    prompt_dropout: Share = 0.2
    user_dropout: Share = Field(0.1, description="share of pairs seen as the null user; 0 is the paper")
    noise_offset: NonNegativeFloat = 0.0
    winner_anchor: NonNegativeFloat = Field(0.0, description="how much it counts if a chosen image gets worse")
    safeguard: float | None = Field(
        None, ge=0, lt=1, description="Diffusion-SDPO: rejected images do not make chosen ones worse; its slack, from 0"
    )
    fidelity: NonNegativeFloat = Field(
        0.0,
        description="how much it counts if what a user allows is drawn otherwise than by the base; such pairs are no "
        "preferences then. They need a column category, and users who say what they ban",
    )
    timestep_weight_limit: NonNegativeFloat = Field(
        0.0, description="errors count as those of the picture, at most this many times as much; 0: as they are"
    )
    min_timestep: NonNegativeInt = Field(0, description="the smallest timestep that is drawn")
    final_beta: PositiveFloat | None = Field(None, description="beta from switch_at on")
    final_winner_anchor: NonNegativeFloat | None = Field(None, description="winner_anchor from switch_at on")
    switch_at: Share = Field(0.4, description="share of run.steps after which the final values count")
    noises_per_pair: NonNegativeInt = Field(
        0, description="how many noises (and timesteps) a pair has; 0: a new one each time"
    )

    @property
    def remembers_reference(self) -> bool:
        """Whether the reference's errors come again, and are all that is needed of it (fidelity wants more)."""
        return bool(self.noises_per_pair) and not self.fidelity

    def at(self, step: int, steps: int) -> LossSection:
        """Return the settings that count when ``step`` of the run's ``steps`` are done: those of the start, or final.

        They depend on nothing else, so a resumed run has those of an uninterrupted one.
        """
        # A quotient, because 0.55 * 100 is more than 55.
        if step / steps < self.switch_at:
            return self
        final = {"beta": self.final_beta, "winner_anchor": self.final_winner_anchor}
        return self.model_copy(update={name: value for name, value in final.items() if value is not None})

    @model_validator(mode="after")
    def _switch_leads_somewhere(self) -> LossSection:
        final = (self.final_beta, self.final_winner_anchor)
        if final == (None, None) and self.switch_at != type(self).model_fields["switch_at"].default:
            raise ValueError(
                f"switch_at = {self.switch_at:g} says when final_beta and final_winner_anchor begin to count, but "
                "neither is given: add one of them, or leave switch_at out"
            )
        return self


class OptimizerSection(Section):
    """The optimizer of the adapter's float32 weights."""

    kind: Literal["adamw", "adafactor", "adamw8bit"] = "adamw"
    learning_rate: PositiveFloat = 5e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 1e-2
    epsilon: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0
    schedule: LearningRateSchedule = "constant_with_warmup"
    warmup_steps: NonNegativeInt = 500
    cycles: PositiveInt = Field(1, description="for cosine_with_restarts")
    power: PositiveFloat = Field(1.0, description="for polynomial")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="0: no moving average")

    @model_validator(mode="after")
    def _settings_count(self) -> OptimizerSection:
        idle = {
            "betas": self.kind == "adafactor",
            "epsilon": self.kind == "adafactor",
            "cycles": self.schedule != "cosine_with_restarts",
            "power": self.schedule != "polynomial",
        }
        for name in (name for name, unused in idle.items() if unused):
            if getattr(self, name) != type(self).model_fields[name].default:
                other = f'kind = "{self.kind}"' if self.kind == "adafactor" else f'schedule = "{self.schedule}"'
                raise ValueError(f"{name} does not count with {other}: leave it out, or choose what it belongs to")
        return self


class RunSection(Section):
    """How long, how large, where to, and from where."""

    output: Path = Path("runs/psa")
    steps: PositiveInt = 5000
    batch_size: PositiveInt = Field(4, description="pairs per device and micro-batch")
    accumulation: PositiveInt = Field(1, description="micro-batches per step")
    seed: int = 2025
    resume: str | None = Field(None, description='"latest", or the folder of a checkpoint')
    checkpoint_every: PositiveInt = 500
    checkpoints_total_limit: PositiveInt | None = 3


class ValidationSection(Section):
    """Held-out pairs and unseen users, looked at with fixed noise, and image grids."""

    every: NonNegativeInt = Field(500, description="steps; 0: never")
    pairs: PositiveInt = Field(64, description="pairs of each kind")
    held_out: Share = Field(0.02, description="share of the training pairs that are held out, if there is no `seen`")
    unseen_users: Share = Field(0.05, description="share of the users kept out of training, if there is no `unseen`")
    seen: Path | None = Field(None, description="held-out pairs of training users: a split of its own")
    unseen: Path | None = Field(None, description="pairs of users that training never sees: a split of its own")
    grid_every: NonNegativeInt = Field(1000, description="steps; 0: no image grids")
    grid_prompts: tuple[str, ...] = ("a photo of a city street", "a portrait of a person", "a war scene")
    grid_users: tuple[str, ...] = Field(
        (), description="User_IDs of the columns; by default the levels L0 to L5 where the encoder can make them"
    )
    grid_steps: PositiveInt = 20
    grid_guidance_scale: NonNegativeFloat = 7.5


class TrackingSection(Section):
    """Where curves go besides ``metrics.jsonl`` in the output folder."""

    trackers: tuple[str, ...] = Field(("tensorboard",), description="accelerate's names: tensorboard, wandb, ...")
    project: str = "psa"
    every: PositiveInt = Field(10, description="steps")


class TrainConfig(Section):
    """A whole training run."""

    model: ModelSection
    data: DataSection
    adapter: AdapterSection = AdapterSection()
    loss: LossSection = LossSection()
    optimizer: OptimizerSection = OptimizerSection()
    run: RunSection = RunSection()
    validation: ValidationSection = ValidationSection()
    tracking: TrackingSection = TrackingSection()

    @property
    def reference_runs_along(self) -> bool:
        """Whether the UNet runs once for policy and reference, and not for each by itself."""
        model = self.model
        return model.gradient_checkpointing and not model.compile and not self.loss.remembers_reference

    @model_validator(mode="after")
    def _check_null(self) -> TrainConfig:
        if self.adapter.null == "none" and self.loss.user_dropout > 0:
            raise ValueError(
                'loss.user_dropout trains the null user, and adapter.null = "none" has none: set '
                'loss.user_dropout = 0, or adapter.null = "zero_embedding"'
            )
        if self.adapter.null != "none" and "constant" not in self.adapter.kinds:
            raise ValueError(
                f"adapter.kinds = {list(self.adapter.kinds)} leave the unconditional half as it is: set adapter.null = "
                '"none" and loss.user_dropout = 0'
            )
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML configuration; each override is ``section.key=value`` and wins over the file.

    ``path`` may also be the name of a ready configuration in ``configs/``.

    Raises:
        TrainingError: the file is missing or no TOML, or a key or value is wrong; every problem is named.
    """
    return load_section(TrainConfig, "a training configuration", path, overrides)


def load_section(kind: type[S], what: str, path: Path, overrides: Sequence[str] = (), evaluations: bool = False) -> S:
    """Read a configuration of a kind, which messages call ``what``; see ``load_config``."""
    values = read_toml(path, evaluations)
    for override in overrides:
        _override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(f"  {_problem(kind, details)}" for details in error.errors())
        raise TrainingError(f"{path} is not {what}:\n{problems}") from None


def read_toml(path: Path, evaluations: bool = False) -> dict[str, Any]:
    """Read a TOML file, or a ready configuration by its name; raise TrainingError if it is missing or damaged.

    The message then names the ready ones: those of trainings, or of ``evaluations``.
    """
    ready = CONFIGS / f"{path.stem}.toml"
    if not path.is_file() and path.parent == Path() and ready.is_file():
        path = ready
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        stems = sorted(config.stem for config in CONFIGS.glob("*.toml"))
        names = ", ".join(stem for stem in stems if stem.startswith("evaluate-") == evaluations)
        raise TrainingError(f"There is no configuration {path}. Name a TOML file, or one of {names}.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TrainingError(f"{path} cannot be read as TOML ({error}). Correct it and try again.") from None


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not name:
        raise TrainingError(f'--set {override}: expected section.key=value, for example "run.steps=100".')
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise TrainingError(f"--set {override}: {section} is a value and no section. Expected section.key=value.")
    values[name] = _toml_value(text.strip())


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a string without quotes


def _problem(kind: type[BaseModel], details: Mapping[str, Any]) -> str:
    location = tuple(part for part in details["loc"] if isinstance(part, str))
    key = ".".join(location)
    if details["type"] == "extra_forbidden":
        known = _keys_beside(kind, location)
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        elsewhere = [other for other in _all_keys(kind) if other.rsplit(".", 1)[-1] == location[-1]]
        beside = [".".join((*location[:-1], name)) for name in near]
        # A key that is right but stands in the wrong section is meant before one that only looks like it.
        meant = [*elsewhere, *beside]
        hint = f"Did you mean {meant[0]}?" if meant else f"Known here: {', '.join(known)}."
        return f"{key}: there is no such key. {hint}"
    if details["type"] == "missing":
        return f"{key}: is missing; it has to be stated."
    message = str(details["msg"]).removeprefix("Value error, ")
    return f"{key}: {message} (found {details['input']!r})." if key else f"{message}."


def _keys_beside(kind: type[BaseModel], location: Sequence[str]) -> list[str]:
    sections = [kind]
    for name in location[:-1]:
        # Of several kinds in one place, the location also has the name of the one that was meant.
        tagged = [section for section in sections if _default(section, "kind") == name]
        sections = tagged or [inner for section in sections for inner in _sections_in(section, name)]
    return list(dict.fromkeys(key for section in sections for key in section.model_fields))


def _default(section: type[BaseModel], name: str) -> Any:
    return section.model_fields[name].default if name in section.model_fields else None


def _sections_in(section: type[BaseModel], name: str) -> list[type[BaseModel]]:
    return _section_types(section.model_fields[name].annotation) if name in section.model_fields else []


def _section_types(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _section_types(inner)]


def _all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = _section_types(field.annotation)
        if not inner:
            yield f"{prefix}{name}"
        for found in inner:
            yield from _all_keys(found, f"{prefix}{name}.")
