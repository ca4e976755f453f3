"""What an adapter says about itself: the metadata of an adapter file, validated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from .families import FAMILIES, describe, family_name, family_title
from .sites import Site

FORMAT_VERSION = 2
READ_VERSIONS = (1, 2)
NullMode = Literal["zero_embedding", "none"]
Kind = Literal["constant", "gated", "text"]

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


class Spec(BaseModel):
    """A part of a description: immutable, and nothing else may stand in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class GatedSpec(Spec):
    """The sizes of image-side user attention: tokens of a user and their width, heads and the width of each."""

    num_tokens: PositiveInt = 8
    token_dim: PositiveInt = 256
    heads: PositiveInt = 4
    head_dim: PositiveInt = 32


class TextSpec(Spec):
    """The sizes of the text side: see ``adapter/text.py`` for its two forms.

    The form "mlp" has no heads, and one user token. ``pooled_dim`` is the width of the pooled text vector where the
    base reads one (SDXL), else None.
    """

    form: Literal["attention", "mlp"] = "attention"
    num_tokens: PositiveInt = Field(default_factory=lambda known: 1 if known.get("form") == "mlp" else 8)
    token_dim: PositiveInt = 256
    inner_dim: PositiveInt = 256
    heads: PositiveInt = 4
    pooled_dim: PositiveInt | None = None

    @model_validator(mode="after")
    def _sizes_fit(self) -> TextSpec:
        if self.form == "mlp" and self.num_tokens != 1:
            raise ValueError(
                f'the form "mlp" takes one user token, and num_tokens is {self.num_tokens}: leave it out, or '
                'name the form "attention"'
            )
        if self.form == "attention" and self.inner_dim % self.heads:
            raise ValueError(f"inner_dim {self.inner_dim} is no multiple of heads {self.heads}")
        return self


class Base(Spec):
    """The models that an adapter, or what was made with it, is for.

    ``hidden_sizes`` has one entry per cross-attention layer ("site"), in diffusers' order.
    """

    base: str = ""
    hidden_sizes: tuple[PositiveInt, ...] = ()
    cross_attention_dim: PositiveInt

    @model_validator(mode="after")
    def _check_base(self) -> Base:
        if not self.hidden_sizes:
            return self
        expected = family_name(self.hidden_sizes, self.cross_attention_dim)
        if self.base != expected and self.base in {family.name for family in FAMILIES}:
            raise ValueError(f'it says its base is "{self.base}", but its layers are those of "{expected}"')
        return self

    @property
    def num_sites(self) -> int:
        """The number of cross-attention layers."""
        return len(self.hidden_sizes)

    @property
    def base_title(self) -> str:
        """The base in few words: "SDXL"."""
        return family_title(self.base) if self.base else self.describe_base()

    def check_acts(self, constant: bool, gated: object, text: object, null: NullMode) -> None:
        """Raise ValueError unless what acts in these ways, with this null user, makes sense on these models."""
        if not (constant or gated or text):
            raise ValueError("it acts in no way: neither constant, nor gated, nor text")
        if not self.hidden_sizes and (constant or gated):
            raise ValueError("it acts at cross-attention layers, and names none (hidden_sizes)")
        if null != "none" and not constant:
            raise ValueError('only the constant kind has a null user: null has to be "none"')

    def describe_base(self) -> str:
        """Return the base in words, for messages."""
        if not self.hidden_sizes:
            return f"models that read text of width {self.cross_attention_dim}"
        return describe(self.hidden_sizes, self.cross_attention_dim)

    def other_model(self, sites: Sequence[Site]) -> str | None:
        """Return None if these are the base's layers (any, if it names none), else what they are, in words."""
        found = [site.hidden_size for site in sites]
        widths = sorted({site.cross_attention_dim for site in sites})
        if found == list(self.hidden_sizes or found) and widths == [self.cross_attention_dim]:
            return None
        return describe(found, widths[0]) if len(widths) == 1 else f"a UNet with the text widths {widths}"


class AdapterConfig(Base):
    """The configuration of an adapter.

    An adapter acts in up to three ways: ``constant`` (the paper: a vector per cross-attention layer), ``gated`` (image
    side, several tokens that look before they act) and ``text`` (text side). ``hidden_sizes`` has one entry per site,
    in diffusers' order; it may be empty if only the text side acts.

    ``base`` names the base family; left out, it follows from the dimensions ("other" if none has them).
    ``null`` says what the unconditional half of classifier-free guidance was trained with: the projection
    of a zero embedding (the paper) or nothing. ``training`` is free-form: how the adapter was made.
    """

    embedding_dim: PositiveInt
    constant: bool = True
    gated: GatedSpec | None = None
    text: TextSpec | None = None
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
                f"it has {value} user tokens; the constant kind has one. With one token the user attention is a "
                "constant vector per layer; several are the gated kind"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """The family's name follows from the dimensions; format version 1 had one kind, and said so."""
        if not isinstance(values, dict):
            return values
        values = {name: value for name, value in values.items() if (name, value) != ("kind", "constant")}
        if not values.get("base") and values.get("hidden_sizes"):
            return values | {"base": family_name(values["hidden_sizes"], values.get("cross_attention_dim", 0))}
        return values

    @model_validator(mode="after")
    def _check_kinds(self) -> AdapterConfig:
        self.check_acts(self.constant, self.gated, self.text, self.null)
        if self.gated and any(size % self.gated.heads for size in self.hidden_sizes):
            raise ValueError(f"{self.gated.heads} heads do not divide all of its layers' widths")
        return self

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """In which ways the adapter acts."""
        there: tuple[tuple[Kind, object], ...] = (
            ("constant", self.constant),
            ("gated", self.gated),
            ("text", self.text),
        )
        return tuple(kind for kind, on in there if on)
