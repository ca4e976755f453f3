"""A real ComfyUI server with this pack, a random SD1.5-shaped checkpoint, SmolLM2 and a private profile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from prompts import CHECKPOINT, MARKERS

from comfyui_psa.profiles import Profile, ProfileStore, StoredProfile, default_template, profiles_folder
from comfyui_psa.training.adapter_commands import convert
from comfyui_psa.training.comfyui import PACK, ComfyUIServer, prepare_base
from comfyui_psa.training.synthetic import SMALL_SD15, attention_widths, write_checkpoint, write_release_adapter

COMFYUI = PACK / ".runtime" / "comfyui"
SMOLLM2_DIM = 576


@dataclass(frozen=True)
class Studio:
    """A running server and what lies in its folders."""

    server: ComfyUIServer
    store: ProfileStore
    profile: StoredProfile

    @property
    def output(self) -> Path:
        return self.server.base / "output"


@contextmanager
def empty_store(server: ComfyUIServer) -> Iterator[ProfileStore]:
    """The store of a server without accounts; what is put into it is deleted in the end."""
    store = ProfileStore(profiles_folder(server.base / "user"))
    yield store
    for entry in store.entries():
        store.delete(entry.id)


@contextmanager
def open_studio(folder: Path, language_model: Path, gguf: Path) -> Iterator[Studio]:
    """Fill ``folder`` and start the server on it; ``gguf`` is there under the name Quantised."""
    base = prepare_base(folder)
    models = base / "models"
    pack = Path(__file__).with_name("ipadapter_stand_in.py")
    (base / "custom_nodes" / "ComfyUI_IPAdapter_plus.py").symlink_to(pack)
    write_checkpoint(models / "checkpoints" / CHECKPOINT)
    (models / "LLM" / language_model.name).symlink_to(language_model, target_is_directory=True)
    (models / "LLM" / "Quantised.gguf").symlink_to(gguf)

    widths = attention_widths(SMALL_SD15)
    release = base / "psa_adapter.bin"
    write_release_adapter(release, widths, SMALL_SD15.context_dim, SMOLLM2_DIM)
    (base / "get_embeds.txt").write_text(default_template(), encoding="utf-8")
    for encoder in ("HuggingFaceTB/SmolLM2-135M-Instruct", "someone/Quantised", "someone/Absent-7B"):
        target = models / "psa_adapters" / f"{encoder.split('/')[1]}.safetensors"
        convert(release, target, encoder=encoder)

    # The release as it is, with one of its own embeddings: no language model needed.
    write_release_adapter(models / "psa_adapters" / "psa_adapter.bin", widths, SMALL_SD15.context_dim, 3584)
    embedding = np.random.default_rng(0).normal(size=3584).astype(np.float32)
    np.save(models / "psa_embeddings" / "0000001.npy", embedding)

    store = ProfileStore(profiles_folder(base / "user"))
    stored = store.create(Profile(age=87, overrides={"Propaganda": "ban"}, **MARKERS))
    store.activate(stored.id)
    with ComfyUIServer(COMFYUI, base) as server:
        yield Studio(server, store, stored)
