"""A base model as a diffusers folder: ``model_index.json`` and one folder per part."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from ...safe_files import DAMAGE
from ..errors import BaseModelError
from .fingerprints import fingerprint
from .text import TextTower

INDEX = "model_index.json"
_VAES = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny)}
_TEXT_MODELS = {kind.__name__: kind for kind in (CLIPTextModel, CLIPTextModelWithProjection)}
_DIFFUSERS_WEIGHTS, _TRANSFORMERS_WEIGHTS = "diffusion_pytorch_model", "(?:model|pytorch_model)"
_UNREADABLE: tuple[type[Exception], ...] = (*DAMAGE, pickle.UnpicklingError)

T = TypeVar("T")


class _Weights(NamedTuple):
    variant: str | None
    safetensors: bool
    files: tuple[Path, ...]


class FolderSource:
    """The parts of a diffusers folder. Opening reads JSON, and checks that the weights are there and whole."""

    def __init__(self, path: Path) -> None:
        """Open the folder ``path``.

        Raises:
            BaseModelError: it is no diffusers folder, of another kind than Stable Diffusion, or incomplete.
        """
        self.path = path
        self._index = _read_json(path / INDEX)
        self._check_kind()
        self.unet_config = self._config("unet")
        self.scheduler_config: Mapping[str, Any] = _read_json(path / "scheduler" / "scheduler_config.json")
        scheduler = str(self.scheduler_config.get("_class_name"))
        if scheduler.startswith("EDM") or "Flow" in scheduler:
            raise BaseModelError(
                f"{path} is made for {scheduler}, another kind of diffusion; expected a model that predicts noise or "
                "v. Choose another base model."
            )
        vae = self._config("vae")
        self.latent_channels = int(vae.get("latent_channels", 4))
        blocks = vae.get("block_out_channels") or vae.get("decoder_block_out_channels") or (64, 64, 64, 64)
        self.vae_scale_factor = int(2 ** (len(blocks) - 1))
        self._check_towers()
        for part in ("unet", "vae", *self._towers()):
            self._check_weights(part)

    def load_unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """Load the UNet, each weight as ``dtype``."""
        return self._load_diffusers("unet", UNet2DConditionModel, dtype)

    def load_vae(self) -> AutoencoderKL | AutoencoderTiny:
        """Load the VAE in float32."""
        return self._load_diffusers("vae", _VAES[self._class_of("vae")], torch.float32)

    def load_text(self) -> list[TextTower]:
        """Load tokenizers and text encoders, in float32, in the order in which the pipeline uses them."""
        return [self._load_tower(name) for name in self._towers()]

    def fingerprint(self, part: Literal["unet", "vae", "text"]) -> str:
        """Hash the files that a part is loaded from."""
        folders = [self.path / part]
        if part == "text":
            folders = [self.path / name for tower in self._towers() for name in (tower, _tokenizer_of(tower))]
        files: list[Path] = []
        for folder in folders:
            if folder.name.startswith("tokenizer"):
                files += sorted(file for file in folder.iterdir() if file.is_file())
            else:
                files += [folder / "config.json", *_find_weights(folder, _stem_of(folder.name)).files]
        return fingerprint(files, part)

    def _check_towers(self) -> None:
        expected = 2 if self.unet_config.get("addition_embed_type") == "text_time" else 1
        towers = self._towers()
        if len(towers) != expected:
            raise BaseModelError(
                f"{self.path} has {len(towers)} text encoder(s), its UNet expects {expected}; the SDXL refiner is of "
                "this kind, and no base model. Choose an SD1.x, SD2.x or SDXL model."
            )
        for tower in towers:
            if not (self.path / _tokenizer_of(tower)).is_dir():
                raise BaseModelError(
                    f"{self.path} has no folder {_tokenizer_of(tower)} for its {tower}. Get the base model again."
                )

    def _check_weights(self, part: str) -> None:
        """Look at the heads of the files, so that a bad download shows now and not after hours."""
        folder = self.path / part
        for file in _find_weights(folder, _stem_of(part)).files:
            if file.suffix == ".safetensors":
                with _guarded(folder, partial(safe_open, file, framework="pt")):
                    pass

    def _check_kind(self) -> None:
        kind = self._index.get("_class_name")
        if self._class_of("transformer"):
            raise BaseModelError(
                f"{self.path} is a {kind}, built on a transformer ({self._class_of('transformer')}); expected a model "
                "with a UNet: SD1.x, SD2.x, SDXL or a relative. Choose another base model."
            )
        if self._class_of("unet") != UNet2DConditionModel.__name__:
            found = self._class_of("unet") or "none"
            raise BaseModelError(
                f"{self.path} is a {kind} with the UNet {found}; expected a {UNet2DConditionModel.__name__}. "
                "Choose an SD1.x, SD2.x or SDXL model."
            )
        for part, known in (("vae", _VAES), *((tower, _TEXT_MODELS) for tower in self._towers())):
            if self._class_of(part) not in known:
                found = self._class_of(part) or "none"
                raise BaseModelError(
                    f"{self.path} has as {part} {found}; expected one of {', '.join(known)}. "
                    "Get the whole pipeline, or choose another base model."
                )

    def _towers(self) -> list[str]:
        return [name for name in ("text_encoder", "text_encoder_2") if self._class_of(name)] or ["text_encoder"]

    def _class_of(self, part: str) -> str:
        """Return the class of a part, or "" if the pipeline leaves it out."""
        entry = self._index.get(part)
        return entry[1] or "" if isinstance(entry, list) and len(entry) == 2 else ""

    def _config(self, part: str) -> Mapping[str, Any]:
        return _read_json(self.path / part / "config.json")

    def _load_diffusers(self, part: str, kind: type[T], dtype: torch.dtype) -> T:
        weights = _find_weights(self.path / part, _stem_of(part))
        return _load(self.path / part, kind, weights, torch_dtype=dtype)

    def _load_tower(self, name: str) -> TextTower:
        kind = _TEXT_MODELS[self._class_of(name)]
        weights = _find_weights(self.path / name, _stem_of(name))
        model = _load(self.path / name, kind, weights, dtype=torch.float32)
        folder = self.path / _tokenizer_of(name)
        tokenizer = _guarded(folder, lambda: CLIPTokenizer.from_pretrained(folder, local_files_only=True))
        return TextTower(tokenizer, model)


def is_unet_folder(path: Path) -> bool:
    """Return whether a folder holds a UNet alone, and no whole pipeline."""
    return (path / "config.json").is_file() and not (path / INDEX).is_file()


def unet_files(folder: Path) -> list[Path]:
    """Return the files that a UNet is loaded from; raise BaseModelError if there are no weights."""
    return [folder / "config.json", *_find_weights(folder, _DIFFUSERS_WEIGHTS).files]


def load_unet_folder(folder: Path, dtype: torch.dtype | None) -> UNet2DConditionModel:
    """Load a UNet from a folder of its own, frozen, each weight as ``dtype``; None: on the meta device, empty.

    Raises:
        BaseModelError: it is no UNet, or its weights are damaged or missing.
    """
    config = _read_json(folder / "config.json")
    if config.get("_class_name") != UNet2DConditionModel.__name__:
        raise BaseModelError(
            f"{folder} holds a {config.get('_class_name')}; expected a {UNet2DConditionModel.__name__}, or a whole "
            f"diffusers folder with {INDEX}. Name another folder."
        )
    weights = _find_weights(folder, _DIFFUSERS_WEIGHTS)
    if dtype is None:
        with torch.device("meta"):
            return _guarded(folder, lambda: UNet2DConditionModel.from_config(config)).requires_grad_(False).eval()
    return _load(folder, UNet2DConditionModel, weights, torch_dtype=dtype)


def _load(folder: Path, kind: Any, weights: _Weights, **options: Any) -> Any:
    model, info = _guarded(
        folder,
        lambda: kind.from_pretrained(
            folder,
            local_files_only=True,
            variant=weights.variant,
            use_safetensors=weights.safetensors,
            output_loading_info=True,
            **options,
        ),
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise BaseModelError(
            f"{folder} lacks {len(missing)} of the weights that its config.json asks for ({missing[0]}, ...). "
            "Get the base model again."
        )
    return model.requires_grad_(False).eval()


def _stem_of(part: str) -> str:
    return _DIFFUSERS_WEIGHTS if part in ("unet", "vae") else _TRANSFORMERS_WEIGHTS


def _tokenizer_of(tower: str) -> str:
    return tower.replace("text_encoder", "tokenizer")


def _guarded(folder: Path, load: Callable[[], T]) -> T:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # it would run across the bar of the training
    try:
        return load()
    except _UNREADABLE as error:
        raise BaseModelError(
            f"{folder} cannot be loaded ({error}). It is damaged or not fully downloaded: get the base model again."
        ) from None
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _find_weights(folder: Path, stem: str) -> _Weights:
    """Find the weights to load: the plain ones, else a variant (fp16 first); safetensors before pickles."""
    pattern = re.compile(rf"{stem}(?:-\d+-of-\d+)?(?:\.([a-z]\w*))?(?:-\d+-of-\d+)?\.(safetensors|bin)")
    found: dict[tuple[str, str], list[Path]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = pattern.fullmatch(file.name)
        if match:
            found.setdefault((match[1] or "", match[2]), []).append(file)
    if not found:
        raise BaseModelError(
            f"There are no weights in {folder}; expected a .safetensors or .bin file. Get the base model again."
        )
    variant, suffix = min(found, key=lambda key: (key[0] != "", key[0] != "fp16", key[0], key[1] == "bin"))
    return _Weights(variant or None, suffix == "safetensors", tuple(found[variant, suffix]))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelError(
            f"{path.parent} has no {path.name}. Expected a diffusers folder ({INDEX}, unet/, vae/, text_encoder/, "
            "tokenizer/, scheduler/) or a single-file checkpoint."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(f"{path} cannot be read ({error}). Get the base model again.") from None
    if not isinstance(content, dict):
        raise BaseModelError(f"{path} is not a JSON object. Get the base model again.")
    return content
