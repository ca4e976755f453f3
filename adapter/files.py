"""Adapter files: our self-describing safetensors format, read and written, and the way into every format.

Format version 2: the tensors of :class:`PSAAdapter` by their names, sites in diffusers' order (of the constant kind
``user_proj.{proj,norm}.{weight,bias}`` and ``sites.<i>.to_v_user.weight``; of all ``embedding_mean`` and
``embedding_std``); metadata ``format``, ``format_version`` and ``config``, the JSON of :class:`AdapterConfig`.
Version 1 had the constant kind alone. The published release has its own module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..safe_files import DAMAGE, replacing
from .adapter import PSAAdapter
from .config import FORMAT_VERSION, READ_VERSIONS, AdapterConfig
from .errors import AdapterError
from .release import flatten_release, read_pickle, translate_release

FORMAT = "psa_adapter"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)


def load_adapter(path: Path) -> PSAAdapter:
    """Load an adapter: our format, or the published release as pickle or safetensors.

    Pickles are read with ``weights_only=True``: code in them never runs.

    Raises:
        AdapterError: the file is missing, closed to us, damaged, no adapter, incomplete, or holds NaN or infinity.
    """
    _check_file(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        config, tensors = translate_release(flatten_release(read_pickle(path), path), path)
        return _build(config, tensors, path)
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") == FORMAT:
        config = _read_config(metadata, path)
    else:
        config, tensors = translate_release(tensors, path)
    return _build(config, tensors, path)


def load_adapter_config(path: Path) -> AdapterConfig:
    """Return what an adapter says about itself. Of our format only the description is read, of a release all.

    Raises:
        AdapterError: see ``load_adapter``.
    """
    _check_file(path)
    if path.suffix.lower() == ".safetensors":
        metadata = read_safetensors(path, tensors=False)[1]
        if metadata.get("format") == FORMAT:
            return _read_config(metadata, path)
    return load_adapter(path).config


def save_adapter(adapter: PSAAdapter, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write an adapter in our format. A failure leaves an existing file as it was.

    Each tensor is stored in half the size if that loses nothing (the release's projection), else as float32.

    Args:
        adapter: what is written; it stays as it is.
        path: the file.
        dtype: what weights are rounded to before; float32 keeps every bit. Mean and deviation of embeddings are never
            rounded: some numbers of a language model's are large, and differ little between people.

    Raises:
        AdapterError: the file cannot be written, or weights are too large for ``dtype``.
    """
    state = {name: tensor.detach().cpu().float() for name, tensor in adapter.state_dict().items()}
    weights = {name for name, _ in adapter.named_parameters()}
    tensors = {
        name: _compact(tensor.to(dtype).float() if name in weights else tensor) for name, tensor in state.items()
    }
    if too_large := [name for name in state if bool((state[name].isfinite() & tensors[name].isinf()).any())]:
        raise AdapterError(
            f"The weights of {too_large[0]} are too large for {dtype}. Write the adapter in float32 or bfloat16."
        )
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": adapter.config.model_dump_json(),
    }
    content = save(tensors, metadata)
    with writing(path), replacing(path) as aside:
        aside.write_bytes(content)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong with writing a file into AdapterError."""
    try:
        yield
    except OSError as error:
        raise AdapterError(
            f"{path} cannot be written ({error.strerror}); what was there is as it was. Make room, make the folder "
            "writable, or choose another file."
        ) from None


def _compact(tensor: Tensor) -> Tensor:
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal((small := tensor.to(dtype)).to(tensor.dtype), tensor):
            return small
    return tensor.contiguous()


def _read_config(metadata: Mapping[str, str], path: Path) -> AdapterConfig:
    version = metadata.get("format_version", "")
    if version not in map(str, READ_VERSIONS):
        raise AdapterError(
            f"{path.name} has format version {version or 'unknown'}; this version of ComfyUI-PSA reads versions up to "
            f"{FORMAT_VERSION}. Update ComfyUI-PSA, or ask for the adapter in the older format."
        )
    try:
        return AdapterConfig.model_validate_json(metadata.get("config", ""))
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors())
        raise AdapterError(
            f"The description inside {path.name} is not one that this version understands ({details}). "
            "Update ComfyUI-PSA, or get the adapter again."
        ) from None


def _build(config: AdapterConfig, tensors: Mapping[str, Tensor], path: Path) -> PSAAdapter:
    with torch.device("meta"):  # the description may be wrong: nothing is allocated from it
        adapter = PSAAdapter(config)
    expected = adapter.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    extra = sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise AdapterError(
            f"{path.name} does not hold the layers that it describes ({config.describe_base()}): "
            f"{_some(missing)} missing, {_some(extra)} too many. Get the adapter again."
        )
    loaded = {}
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise AdapterError(
                f"In {path.name} the layer {name} has shape {list(tensor.shape)}, expected "
                f"{list(expected[name].shape)}. Get the adapter again."
            )
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            raise AdapterError(
                f"In {path.name} the layer {name} is of the kind {tensor.dtype}, {tensor.layout}; expected plain "
                "floating-point numbers. Get the adapter again."
            )
        loaded[name] = tensor.float()
        if not bool(torch.isfinite(loaded[name]).all()):
            raise AdapterError(
                f"In {path.name} the layer {name} holds values that are not numbers (NaN or infinity). "
                "The training that made it went wrong, or the file is damaged: get the adapter again."
            )
    if not bool((loaded["embedding_std"] > 0).all()):
        raise AdapterError(f"In {path.name} the embedding deviation is not positive. Train or convert it again.")
    adapter.load_state_dict(loaded, assign=True)
    return adapter.requires_grad_(False).eval()


def is_there(path: Path) -> bool:
    """Return whether there is such a file; raise AdapterError if it is known, or hidden, and may not be read."""
    try:
        if path.is_dir():  # to open one is another error on Windows
            return False
        with path.open("rb"):
            return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise AdapterError(
            f"{path} cannot be read ({error.strerror}). Make the file and its folder readable for the account under "
            "which ComfyUI runs, or choose another file."
        ) from None


def _check_file(path: Path) -> None:
    if not is_there(path):
        raise AdapterError(f"There is no adapter file {path}. Put the adapter there, or choose another one.")
    if path.suffix.lower() not in SUFFIXES:
        raise AdapterError(f"{path.name} is not an adapter file: expected one of {', '.join(SUFFIXES)}.")


def _some(names: list[str]) -> str:
    return f"{len(names)}{f' ({names[0]}, ...)' if names else ''}"


def read_safetensors(path: Path, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file, if these are wanted, and its metadata; raise AdapterError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys() if tensors else ()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except DAMAGE as error:
        raise AdapterError(
            f"{path.name} could not be read as safetensors ({error}). It is damaged, not fully downloaded, or "
            "another kind of file: get it again."
        ) from None
