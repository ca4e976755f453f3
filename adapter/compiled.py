"""Compiled profiles: what an adapter does for one person, without the adapter, the profile and its embedding.

A file is safetensors, metadata ``format``, ``format_version`` and ``config`` (the JSON of ``CompiledSpec``), tensors in
float32 or float16 as ``compiled_tensors.py`` lays them out. In float32 these are the numbers that the adapter gives,
bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from safetensors.torch import save
from torch import Tensor

from ..safe_files import PRIVATE, replacing
from .adapter import PSAAdapter, UserEffect
from .algebra import users_of
from .compiled_tensors import CompiledSpec, described, pack, shapes, unpack
from .config import NullMode
from .errors import AdapterError
from .files import FORMAT as ADAPTER_FORMAT
from .files import is_there, read_safetensors, writing
from .sites import Site

FORMAT = "psa_compiled"
FORMAT_VERSION = "1"
COMPILED_SUFFIX = ".safetensors"
Precision = Literal["fp32", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")

_MOST_LOST = 0.01  # share of what a person does that half precision may lose
_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True, eq=False, repr=False)
class CompiledProfile:
    """What an adapter does for one person; ``source`` names it in messages."""

    spec: CompiledSpec
    effect: UserEffect
    source: str = "the compiled profile"

    def __repr__(self) -> str:
        """Say no value: ComfyUI prints node inputs into error reports."""
        return "CompiledProfile(private)"

    def check_sites(self, sites: Sequence[Site]) -> None:
        """Raise AdapterError unless these are the cross-attention layers of the base that it was compiled for."""
        other = self.spec.other_model(sites)
        if other is not None:
            raise AdapterError(
                f"{self.source} was compiled for {self.spec.describe_base()}, but the connected model is {other}. Load "
                "a checkpoint of that family, or compile the profile with an adapter for this model."
            )

    def with_null(self, null: NullMode | None = None) -> UserEffect:
        """Return the effect; ``null`` is what the unconditional half gets, by default as the adapter was trained.

        Raises:
            AdapterError: a null user is asked for, and the file holds none.
        """
        vectors = self.effect.constant
        if vectors is None or null in (None, self.spec.null):
            return self.effect
        if null == "zero_embedding":
            raise AdapterError(
                f"{self.source} holds nothing for the negative half, because its adapter was trained without: "
                'unconditional cannot be "zero embedding". Set it to "as trained", or connect adapter and embedding '
                "instead."
            )
        return self.effect._replace(constant=vectors._replace(null=None))


def adapter_hash(adapter: PSAAdapter) -> str:
    """Return a SHA-256 of all that decides what an adapter does: its weights, as float32, and its null user.

    It is the same for an adapter in any format. Where the embeddings come from does not count.
    """
    digest = hashlib.sha256(adapter.config.null.encode())
    for name, tensor in sorted(adapter.state_dict().items()):
        digest.update(f"\n{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()


def compile_profile(
    adapter: PSAAdapter, effect: UserEffect, categories: tuple[str, ...] | None = None
) -> CompiledProfile:
    """Return what ``adapter`` does for one person, as a file can hold it.

    Args:
        adapter: the adapter that ``effect`` is of.
        effect: of one person, or of a mixture, with the null user as trained.
        categories: the banned ones, if their owner agrees that the file names them.

    Raises:
        AdapterError: the effect is of several people.
    """
    if (users := users_of(effect)) != 1:
        raise AdapterError(
            f"A compiled profile is of one person, and this embedding of {users}. Connect one, or mix them first."
        )
    spec = described(adapter.config, effect, adapter_hash(adapter), categories)
    return CompiledProfile(spec, effect)


def save_compiled(profile: CompiledProfile, path: Path, precision: Precision = "fp32", overwrite: bool = False) -> None:
    """Write a compiled profile, readable by its owner only. A failure leaves an existing file as it was.

    A file that holds the same already stays; another compiled profile is replaced if ``overwrite`` says so, and nothing
    else ever is.

    Raises:
        AdapterError: there is another file, or one that may not be read, a number is too large for float16, or the file
            cannot be written.
    """
    tensors = {name: _rounded(name, value, precision) for name, value in pack(profile.effect).items()}
    if is_there(path):
        try:
            found = load_compiled(path)
        except AdapterError:
            raise AdapterError(
                f"There is already a file {path.name}, and it is no compiled profile that this version can read: it "
                "stays as it is. Choose another name."
            ) from None
        if _same(found, profile.spec, tensors):
            return
        if not overwrite:
            raise AdapterError(
                f"There is already a compiled profile {path.name}, and it may be somebody else's: it stays as it is. "
                "Choose another name, or switch overwrite on."
            )
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "config": profile.spec.model_dump_json()}
    content = save(tensors, metadata)
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        with replacing(path, PRIVATE) as aside:
            aside.write_bytes(content)


def load_compiled(path: Path) -> CompiledProfile:
    """Load a compiled profile; its numbers become float32.

    Raises:
        AdapterError: the file is missing, closed to us, damaged, no compiled profile, of another version, or not whole.
    """
    if not is_there(path):
        raise AdapterError(f"There is no compiled profile {path}. Put the file there, or choose another one.")
    tensors, metadata = read_safetensors(path)
    spec = _read_spec(metadata, path)
    expected = shapes(spec)
    if expected.keys() != tensors.keys():
        missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise AdapterError(
            f"{path.name} does not hold what it describes: {', '.join(missing) or 'nothing'} is missing, "
            f"{', '.join(extra[:3]) or 'nothing'} does not belong there. Compile the profile again."
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name] or tensor.dtype not in _DTYPES.values():
            raise AdapterError(
                f"In {path.name} {name} has shape {list(tensor.shape)} and is {tensor.dtype}; expected "
                f"{list(expected[name])} in float32 or float16. Compile the profile again."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(
                f"In {path.name} {name} holds values that are not numbers (NaN or infinity). Compile the profile again."
            )
    # Copies in memory of their own: how numbers lie in a file must not decide how they are multiplied.
    loaded = {name: value.float().clone() for name, value in tensors.items()}
    return CompiledProfile(spec, unpack(loaded, spec), path.name)


def _read_spec(metadata: Mapping[str, str], path: Path) -> CompiledSpec:
    found = metadata.get("format")
    if found != FORMAT:
        what = "a PSA adapter: choose it in Load PSA Adapter" if found == ADAPTER_FORMAT else "another kind of file"
        raise AdapterError(
            f"{path.name} is not a compiled profile, but {what}. Choose a file that Save Compiled Profile or "
            "`psa compile` has written."
        )
    version = metadata.get("format_version", "unknown")
    if version != FORMAT_VERSION:
        raise AdapterError(
            f"{path.name} has format version {version}; this version of ComfyUI-PSA reads version {FORMAT_VERSION}. "
            "Update ComfyUI-PSA, or compile the profile again with this version."
        )
    try:
        return CompiledSpec.model_validate_json(metadata.get("config", ""))
    except ValidationError as error:
        fields = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors())
        raise AdapterError(
            f"The description inside {path.name} is not one that this version understands ({fields}). Compile the "
            "profile again."
        ) from None


def _rounded(name: str, value: Tensor, precision: Precision) -> Tensor:
    rounded = value.detach().cpu().to(_DTYPES[precision]).contiguous()
    if not bool(torch.isfinite(rounded).all()):
        raise AdapterError(
            f"{name} has numbers up to {float(value.abs().max()):.3g}, and fp16 ends at 65504. Save the compiled "
            "profile as fp32."
        )
    if float((rounded.float() - value.cpu()).norm()) > _MOST_LOST * float(value.norm()):
        raise AdapterError(f"{name} has numbers so small that fp16 loses them. Save the compiled profile as fp32.")
    return rounded


def _same(found: CompiledProfile, spec: CompiledSpec, tensors: Mapping[str, Tensor]) -> bool:
    there = pack(found.effect)
    return (
        found.spec == spec
        and there.keys() == tensors.keys()
        and all(torch.equal(there[name], value.float()) for name, value in tensors.items())
    )
