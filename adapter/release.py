"""The published release's checkpoint: ``psa_adapter.bin`` (a torch pickle) and its safetensors variant.

``{"psa_adapter": {"<i>.to_k_user.0.weight", "<i>.to_v_user.0.weight"}, "user_proj": {"proj.*", "norm.*"}}``,
or the same names behind the prefixes ``psa_adapter.`` and ``user_proj.``. Keys (``to_k_user``) are dropped:
with one user token they have no effect. Read only; adapters are written in our own format.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..safe_files import DAMAGE
from .config import PAPER_LANGUAGE_MODEL, AdapterConfig, EncoderSpec
from .errors import AdapterError

TEMPLATE_NAME = "get_embeds.txt"

_LAYER = re.compile(r"psa_adapter\.(0|[1-9]\d{0,3})\.to_([kv])_user\.(\d+)\.weight")
_PROJECTION = {f"user_proj.{part}.{kind}" for part in ("proj", "norm") for kind in ("weight", "bias")}


def read_pickle(path: Path) -> object:
    """Read a torch pickle that holds nothing but tensors and plain containers.

    Raises:
        AdapterError: it is damaged, or holds code, which is never run.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise AdapterError(
                f"{path.name} holds Python code besides weights. It was not run and never will be: an adapter has "
                "no need of it. Get the adapter from a source that you trust, best as .safetensors."
            ) from None
        raise _damaged(path, error) from None
    except DAMAGE as error:
        raise _damaged(path, error) from None


def flatten_release(content: object, path: Path) -> dict[str, Tensor]:
    """Turn the release's nested dictionary into the flat names of its safetensors variant."""
    if not isinstance(content, Mapping) or not all(isinstance(part, Mapping) for part in content.values()):
        raise _no_adapter(path)
    return {f"{group}.{name}": tensor for group, part in content.items() for name, tensor in part.items()}


def translate_release(tensors: Mapping[str, Any], path: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Return the configuration of a release and its tensors under the names of our format.

    The release's prompt template is taken from ``get_embeds.txt`` beside ``path``, if it lies there.

    Raises:
        AdapterError: the tensors are no PSA release, are incomplete, or have more than one user token.
    """
    layers = {name: match for name in tensors if (match := _LAYER.fullmatch(name))}
    if not layers or not any(name in tensors for name in _PROJECTION):
        raise _no_adapter(path)
    if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise _no_adapter(path)
    if any(match[3] != "0" for match in layers.values()):
        raise _several_tokens(path)

    values = {int(match[1]): tensors[name] for name, match in layers.items() if match[2] == "v"}
    named = {int(match[1]) for match in layers.values()}
    missing = [f"psa_adapter.{i}.to_v_user.0.weight" for i in range(max(named) + 1) if i not in values]
    missing += sorted(_PROJECTION - tensors.keys())
    extra = sorted(tensors.keys() - layers.keys() - _PROJECTION)
    if missing or extra:
        raise AdapterError(
            f"{path.name} is not a whole PSA adapter: {len(missing)} layers are missing ({_first(missing)}) and "
            f"{len(extra)} do not belong there ({_first(extra)}). Get the adapter again."
        )

    token_dim, embedding_dim = _matrix(tensors["user_proj.proj.weight"], "user_proj.proj.weight", path)
    norm_dim = tensors["user_proj.norm.weight"].numel()
    if norm_dim and token_dim > norm_dim and token_dim % norm_dim == 0:
        raise _several_tokens(path)
    hidden_sizes = tuple(_matrix(values[i], f"psa_adapter.{i}.to_v_user.0.weight", path)[0] for i in sorted(values))
    config = AdapterConfig(
        hidden_sizes=hidden_sizes,
        cross_attention_dim=token_dim,
        embedding_dim=embedding_dim,
        encoder=EncoderSpec(
            kind="llm",
            name=PAPER_LANGUAGE_MODEL,
            template=_template_beside(path),
        ),
        training={"source": "published release"},
    )
    translated = {name: tensors[name] for name in _PROJECTION}
    translated |= {f"sites.{i}.to_v_user.weight": value for i, value in values.items()}
    translated |= {"embedding_mean": torch.zeros(embedding_dim), "embedding_std": torch.ones(embedding_dim)}
    return config, translated


def _template_beside(path: Path) -> str | None:
    template = path.with_name(TEMPLATE_NAME)
    try:
        return template.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(
            f"The prompt template {template} beside {path.name} cannot be read as UTF-8 text ({error}). "
            "Save it as UTF-8, or take it away."
        ) from None


def _matrix(tensor: Tensor, name: str, path: Path) -> tuple[int, int]:
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise AdapterError(
            f"In {path.name} the layer {name} has shape {list(tensor.shape)}, expected a matrix. Get the adapter again."
        )
    return tensor.shape[0], tensor.shape[1]


def _first(names: list[str]) -> str:
    return f"{names[0]}{', ...' if len(names) > 1 else ''}" if names else "none"


def _damaged(path: Path, error: Exception) -> AdapterError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return AdapterError(
        f"{path.name} could not be read as a torch file ({reason}). It is damaged, not fully downloaded, or another "
        "kind of file: get it again."
    )


def _no_adapter(path: Path) -> AdapterError:
    return AdapterError(
        f"{path.name} is not a PSA adapter: it has no user projection and user cross-attention layers. "
        "Choose a PSA adapter (a LoRA or checkpoint goes into its own folder)."
    )


def _several_tokens(path: Path) -> AdapterError:
    return AdapterError(
        f"{path.name} has more than one user token; this version applies one (with more, the user attention is "
        "no longer a constant vector per layer). Use an adapter that was trained with one user token."
    )
