"""What an adapter says about itself: the metadata of an adapter file, validated."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from .families import FAMILIES, describe, family_name

FORMAT_VERSION = 1
NullMode = Literal["zero_embedding", "none"]

# The seven categories of the paper, in the order in which its release lists them.
PAPER_CATEGORIES = ("Hate", "Harassment", "Violence", "Self-Harm", "Sexuality", "Shocking", "Propaganda")
PAPER_LANGUAGE_MODEL = "Qwen/Qwen2.5-7B-Instruct"


# "Qwen2.5-7B-Instruct" or "Qwen/Qwen2.5-7B-Instruct"; nothing that leads out of the models' folder.
_MODEL_NAME = r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$"


class EncoderSpec(BaseModel):
    """Which encoder made the user embeddings that an adapter was trained on.

    ``kind`` is ``"llm"`` (``name`` is a language model, ``template`` the prompt that a profile fills; None
    if the adapter does not tell) or ``"attributes"`` (``name`` is the version of the encoding).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["llm", "attributes"]
    name: str = Field(pattern=_MODEL_NAME)
    template: str | None = None


class AdapterConfig(BaseModel):
    """The configuration of an adapter. ``hidden_sizes`` has one entry per site, in diffusers' order.

    ``base`` names the base family; left out, it follows from the dimensions ("other" if none has them).
    ``null`` says what the unconditional half of classifier-free guidance was trained with: the projection
    of a zero embedding (the paper) or nothing. ``training`` is free-form: how the adapter was made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["constant"] = "constant"
    base: str = ""
    hidden_sizes: tuple[PositiveInt, ...] = Field(min_length=1)
    cross_attention_dim: PositiveInt
    embedding_dim: PositiveInt
    num_tokens: PositiveInt = 1
    null: NullMode = "zero_embedding"
    encoder: EncoderSpec
    categories: tuple[str, ...] = PAPER_CATEGORIES
    training: dict[str, Any] = Field(default_factory=dict)

    @field_validator("num_tokens")
    @classmethod
    def _one_token(cls, value: int) -> int:
        if value != 1:
            raise ValueError(
                f"it has {value} user tokens; this version applies one. With one token the user attention is a "
                "constant vector per layer, with more it would need real attention"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _fill_in_base(cls, values: Any) -> Any:
        """The family's name follows from the dimensions."""
        if isinstance(values, dict) and not values.get("base") and values.get("hidden_sizes"):
            return values | {"base": family_name(values["hidden_sizes"], values.get("cross_attention_dim", 0))}
        return values

    @model_validator(mode="after")
    def _check_base(self) -> AdapterConfig:
        expected = family_name(self.hidden_sizes, self.cross_attention_dim)
        if self.base != expected and self.base in {family.name for family in FAMILIES}:
            raise ValueError(f'it says its base is "{self.base}", but its layers are those of "{expected}"')
        return self

    @property
    def num_sites(self) -> int:
        """The number of cross-attention layers."""
        return len(self.hidden_sizes)

    def describe_base(self) -> str:
        """Return the base in words, for messages."""
        return describe(self.hidden_sizes, self.cross_attention_dim)
