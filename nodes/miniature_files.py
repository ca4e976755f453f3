"""The files of the miniature, a text-to-image model in diffusers' layout: which there are, and what they say of it.

Knows nothing of ComfyUI's models; ``miniature_model`` builds those from what is read here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import comfy.utils
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator
from torch import Tensor
from transformers import CLIPTokenizer

from ..safe_files import DAMAGE

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
UNET_CONFIG, VAE_CONFIG, TEXT_CONFIG = (f"{part}/config.json" for part in ("unet", "vae", "text_encoder"))
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
TOKENIZER = "tokenizer"
FILES = (
    UNET_CONFIG,
    UNET,
    VAE_CONFIG,
    VAE,
    TEXT_CONFIG,
    TEXT_ENCODER,
    f"{TOKENIZER}/vocab.json",
    f"{TOKENIZER}/merges.txt",
    f"{TOKENIZER}/tokenizer_config.json",
    SCHEDULER_CONFIG,
)

_WHAT_TO_DO = "The miniature comes with the pack: install ComfyUI-PSA again to restore it."

Stages = Annotated[tuple[PositiveInt, ...], Field(min_length=2)]
# ComfyUI's layers have these built in.
_NormEps = Annotated[float, Field(ge=1e-5, le=1e-5)]
_Zero = Annotated[float, Field(ge=0, le=0)]


class MiniatureError(ValueError):
    """A file of the miniature is missing, damaged or of another kind."""


class _Description(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class UNetDescription(_Description):
    """``unet/config.json``. Where a field allows one value, ComfyUI's UNet knows no other."""

    class_name: Literal["UNet2DConditionModel"] = Field(alias="_class_name")
    in_channels: PositiveInt
    out_channels: PositiveInt
    block_out_channels: Stages
    layers_per_block: PositiveInt
    down_block_types: tuple[Literal["DownBlock2D", "CrossAttnDownBlock2D"], ...]
    mid_block_type: Literal["UNetMidBlock2DCrossAttn"] = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[Literal["UpBlock2D", "CrossAttnUpBlock2D"], ...]
    cross_attention_dim: PositiveInt
    # The number of heads: diffusers keeps this misnomer for the sake of old models.
    attention_head_dim: PositiveInt
    transformer_layers_per_block: Stages
    use_linear_projection: bool = False
    act_fn: Literal["silu"] = "silu"
    norm_num_groups: Literal[32] = 32
    norm_eps: _NormEps = 1e-5
    flip_sin_to_cos: Literal[True] = True
    freq_shift: _Zero = 0.0
    addition_embed_type: None = None
    class_embed_type: None = None

    @model_validator(mode="after")
    def _levels(self) -> UNetDescription:
        levels = len(self.block_out_channels)
        per_level = (self.down_block_types, self.up_block_types, self.transformer_layers_per_block)
        if any(len(values) != levels for values in per_level):
            raise ValueError(f"the lists of blocks do not all have {levels} entries")
        if any(width % self.block_out_channels[0] for width in self.block_out_channels):
            raise ValueError("block_out_channels have to be multiples of the first one")
        return self


class VAEDescription(_Description):
    """``vae/config.json`` of a tiny autoencoder. Where a field allows one value, ComfyUI's layers know no other."""

    class_name: Literal["AutoencoderTiny"] = Field(alias="_class_name")
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    latent_channels: PositiveInt
    encoder_block_out_channels: Stages
    decoder_block_out_channels: Stages
    num_encoder_blocks: Stages
    num_decoder_blocks: Stages
    scaling_factor: PositiveFloat = 1.0
    shift_factor: _Zero = 0.0
    act_fn: Literal["relu"] = "relu"
    upsample_fn: Literal["nearest"] = "nearest"
    upsampling_scaling_factor: Literal[2] = 2

    @model_validator(mode="after")
    def _stages(self) -> VAEDescription:
        lists = (self.num_decoder_blocks, self.encoder_block_out_channels, self.decoder_block_out_channels)
        if any(len(values) != len(self.num_encoder_blocks) for values in lists):
            raise ValueError(f"the lists of blocks do not all have {len(self.num_encoder_blocks)} entries")
        return self

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels wide one latent is."""
        return 2 ** (len(self.num_decoder_blocks) - 1)


class TextDescription(_Description):
    """``text_encoder/config.json`` of a CLIP text encoder."""

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    max_position_embeddings: PositiveInt
    vocab_size: PositiveInt
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: _NormEps = 1e-5


class NoiseDescription(_Description):
    """``scheduler/scheduler_config.json``: the noise of the training."""

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    beta_schedule: Literal["scaled_linear"]
    beta_start: PositiveFloat
    beta_end: PositiveFloat
    num_train_timesteps: PositiveInt = 1000
    trained_betas: None = None
    rescale_betas_zero_snr: Literal[False] = False


D = TypeVar("D", bound=_Description)


class MiniatureFiles:
    """A miniature's folder with all its files; their content is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Take ``folder``; raise MiniatureError if files are missing in it."""
        self.folder = folder
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise MiniatureError(
                f"The miniature is not complete: {', '.join(missing)} should be in {folder}. {_WHAT_TO_DO}"
            )

    def describe(self, name: str, kind: type[D]) -> D:
        """Return what the JSON file ``name`` says; raise MiniatureError if it is damaged or says something else."""
        path = self.folder / name
        try:
            return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except ValidationError as error:
            problems = "; ".join(_problem(detail) for detail in error.errors())
            raise MiniatureError(
                f"{path} describes a model that this node cannot load: {problems}. {_WHAT_TO_DO}"
            ) from None
        except DAMAGE as error:
            raise _damaged(path, error) from None

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the tensors in the file ``name`` as they are; raise MiniatureError if it is damaged."""
        path = self.folder / name
        try:
            weights: dict[str, Tensor] = comfy.utils.load_torch_file(str(path), safe_load=True)
        except DAMAGE as error:
            raise _damaged(path, error) from None
        return weights

    def tokenizer(self, tokens: int) -> CLIPTokenizer:
        """Return the tokenizer; raise MiniatureError if it is damaged, or has more than ``tokens`` tokens."""
        path = self.folder / TOKENIZER
        try:
            # First, because the tokenizers library meets damage with a bare Exception.
            numbers = _check_vocabulary(path)
            tokenizer = CLIPTokenizer.from_pretrained(str(path), local_files_only=True)
        except DAMAGE as error:
            raise _damaged(path, error) from None
        if max(numbers) >= tokens:
            raise MiniatureError(
                f"The tokenizer in {path} does not belong to the text encoder, which knows {tokens} tokens: it has "
                f"{len(numbers)}, numbered up to {max(numbers)}. {_WHAT_TO_DO}"
            )
        return tokenizer

    def check_fit(self, name: str, weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        """Raise MiniatureError unless ``weights``, from the file ``name``, are those that a model expects."""
        shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
        wanted = {key: tuple(tensor.shape) for key, tensor in expected.items()}
        different = sorted(key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key))
        if different:
            key = different[0]
            raise MiniatureError(
                f"{self.folder / name} does not fit the config.json beside it. {len(different)} of {len(wanted)} "
                f"weights differ; the first, {key}, is {shapes.get(key, 'missing')} and should be "
                f"{wanted.get(key, 'no part of it')}. {_WHAT_TO_DO}"
            )


def _check_vocabulary(folder: Path) -> list[int]:
    """Return the numbers of the tokens; raise ValueError unless the merges make exactly the tokens that need one."""
    vocabulary: dict[str, int] = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    _version, *lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line]
    made = {"".join(pair) for pair in merges}
    needed = {token for token in vocabulary if len(token.removesuffix("</w>")) > 1 and not token.startswith("<|")}
    parts = {part for pair in merges for part in pair}
    if any(len(pair) != 2 for pair in merges) or made != needed or not parts <= vocabulary.keys():
        raise ValueError(f"merges.txt makes {len(made)} tokens, and vocab.json has {len(needed)} to be made")
    return list(vocabulary.values())


def _problem(detail: Any) -> str:
    place = ".".join(str(part) for part in detail["loc"])
    return f"{place}: {detail['msg']}" if place else str(detail["msg"])


def _damaged(path: Path, error: Exception) -> MiniatureError:
    return MiniatureError(f"{path} cannot be read ({error}). It is damaged or only partly there. {_WHAT_TO_DO}")
