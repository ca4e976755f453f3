"""Where this pack's files lie in a ComfyUI: adapters, embeddings, compiled and private profiles, language models."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..adapter import COMPILED_SUFFIX
from ..adapter import SUFFIXES as ADAPTER_SUFFIXES
from ..profiles import ProfileStore, embeddings_folder, private_fingerprint, profiles_folder
from ..profiles.embedding import SUFFIXES as EMBEDDING_SUFFIXES
from .accounts import UnknownAccountError, current_account

ADAPTERS = "psa_adapters"
EMBEDDINGS = "psa_embeddings"
COMPILED = "psa_compiled"
LANGUAGE_MODELS = "LLM"

# Comes with the pack: a small text-to-image model, with adapters for it.
MINIATURE = Path(__file__).resolve().parents[1] / "miniature"


def register_folders() -> None:
    """Add ``models/psa_adapters``, ``psa_embeddings``, ``psa_compiled`` and ``LLM`` to ComfyUI's folders.

    Behind the first one come the miniature's adapters: a file of the same name in ``models`` goes before.
    """
    _register(ADAPTERS, set(ADAPTER_SUFFIXES))
    folder_paths.add_model_folder_path(ADAPTERS, str(MINIATURE / "adapters"))
    _register(EMBEDDINGS, set(EMBEDDING_SUFFIXES))
    _register(COMPILED, {COMPILED_SUFFIX})
    _register(LANGUAGE_MODELS, None)


def _register(name: str, suffixes: set[str] | None) -> None:
    folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))
    if suffixes:
        # A new entry has an empty set, which would list every file.
        paths, _ = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (paths, suffixes)


def file_names(folder: str) -> list[str]:
    """Return the files of a registered folder, as a choice for an artist."""
    return list(folder_paths.get_filename_list(folder))


def find_file(folder: str, name: str) -> Path | None:
    """Return the path of a file that an artist chose, or None if it is not there."""
    found = folder_paths.get_full_path(folder, name)
    return Path(found) if found else None


def place_for(folder: str, name: str) -> Path:
    """Return where a new file of this name goes, or the one that is there."""
    return find_file(folder, name) or Path(folder_paths.get_folder_paths(folder)[0]) / name


def check_file(what: str, folder: str, name: str | None) -> bool | str:
    """Return True if a chosen file is there, else the message. A linked name is None here, and checked later."""
    return name is None or find_file(folder, name) is not None or missing_file(what, folder, name)


def missing_file(what: str, folder: str, name: str) -> str:
    """Return the message for a file that is not there: what it is, and where it belongs."""
    root = Path(folder_paths.get_folder_paths(folder)[0])
    # A name never leads out of its folder.
    place = root / name if ".." not in Path(name).parts and not Path(name).is_absolute() else root / Path(name).name
    return (
        f'There is no {what} "{name}" on this machine. Put the file at {place} and refresh (R), or choose another '
        f"{what}."
    )


def file_fingerprint(*paths: Path | None) -> str:
    """Return a short text that changes when one of these files is replaced, and tells nothing of them."""
    stats = [path.stat() for path in paths if path is not None and path.is_file()]
    return private_fingerprint(repr([(stat.st_size, stat.st_mtime_ns) for stat in stats]))


def language_model_folders() -> list[Path]:
    """Return the folders in which language models lie."""
    return [Path(path) for path in folder_paths.get_folder_paths(LANGUAGE_MODELS)]


def profile_store() -> ProfileStore:
    """Return the private store of whoever asks, in a folder of the user directory that ComfyUI serves to nobody.

    Raises:
        ProfileError: ComfyUI has accounts, and it is not known which one asks.
    """
    return ProfileStore(profiles_folder(Path(folder_paths.get_user_directory()), current_account()))


def embedding_cache() -> Path:
    """Return the folder of cached embeddings, beside the profiles of whoever asks and as private."""
    try:
        account = current_account()
    except UnknownAccountError:  # who can use levels alone
        account = None
    return embeddings_folder(Path(folder_paths.get_user_directory()), account)
