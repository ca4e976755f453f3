"""The private store: one JSON file per profile under a random id, readable by its owner only.

Nothing outside this folder knows more than an id. Format version 1: ``format``, ``format_version``,
``revision`` (new at every save) and ``profile``.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ..safe_files import PRIVATE, make_private, replacing
from .errors import ProfileError, StoreError
from .schema import Profile, parse_profile

ACTIVE = "active"
PRIVATE_FOLDER = "__psa"  # ComfyUI serves no folder whose name begins so
FORMAT = "psa_profile"
FORMAT_VERSION = 1

_ID = re.compile(r"[0-9a-f]{16}")
_LOCK_SECONDS = 10.0
_FINGERPRINT_KEY = secrets.token_bytes(32)


@dataclass(frozen=True)
class StoredProfile:
    """A profile as it lies in the store; ``revision`` changes with every save."""

    id: str
    revision: str
    profile: Profile


@dataclass(frozen=True)
class ProfileEntry:
    """One line of the store's list; ``problem`` says why a file cannot be read."""

    id: str
    name: str
    active: bool
    problem: str | None = None


def profiles_folder(user_directory: Path) -> Path:
    """Return where the profiles lie inside ComfyUI's user directory."""
    return user_directory / PRIVATE_FOLDER / "profiles"


def embeddings_folder(user_directory: Path) -> Path:
    """Return where cached embeddings lie, beside the profiles and as private."""
    return user_directory / PRIVATE_FOLDER / "embeddings"


class ProfileStore:
    """The profiles of one person, in the folder ``root``. Reading never creates or changes anything."""

    def __init__(self, root: Path, lock_seconds: float = _LOCK_SECONDS) -> None:
        """Use the folder ``root``; wait at most ``lock_seconds`` for another program that writes."""
        self.root = root
        self._lock_seconds = lock_seconds

    def entries(self) -> tuple[ProfileEntry, ...]:
        """Return all profiles without their attributes, sorted by name; unreadable ones too."""
        active = self.active_id()
        entries = []
        for path in self._files():
            try:
                entries.append(ProfileEntry(path.stem, self.read(path.stem).profile.name, path.stem == active))
            except ProfileError as error:
                entries.append(ProfileEntry(path.stem, "", path.stem == active, str(error)))
        return tuple(sorted(entries, key=lambda entry: (entry.name.casefold(), entry.id)))

    def read(self, profile_id: str) -> StoredProfile:
        """Return a profile.

        Raises:
            ProfileError: there is no such profile, or its file is damaged.
            StoreError: the file may not be read.
        """
        path = self._path(profile_id)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise self._unknown(profile_id) from None
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(
                f"The profile file {path} cannot be read ({_reason(error)}). Make it readable for the account that "
                "runs ComfyUI, or restore it from a backup."
            ) from None
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ProfileError(
                f"The profile file {path} is damaged: expected a JSON object of the format {FORMAT}. "
                "Restore it from a backup, or delete the profile and make a new one."
            )
        if content.get("format_version") != FORMAT_VERSION:
            raise ProfileError(
                f"The profile file {path} was written by another version of ComfyUI-PSA (this one reads format "
                f"version {FORMAT_VERSION}). Update ComfyUI-PSA."
            )
        profile = parse_profile(content.get("profile"), f"The profile file {path}")
        return StoredProfile(profile_id, str(content.get("revision", "")), profile)

    def create(self, profile: Profile) -> StoredProfile:
        """Store a new profile under a random id."""
        with self._writing():
            return self._write(secrets.token_hex(8), profile)

    def save(self, stored: StoredProfile, profile: Profile) -> StoredProfile:
        """Replace the profile that was read as ``stored``.

        Raises:
            StoreError: another program saved it in between; nothing is overwritten.
        """
        with self._writing():
            if self.read(stored.id).revision != stored.revision:
                raise StoreError(
                    f"Profile {stored.id} was changed by another program since it was opened; nothing was "
                    "overwritten. Open it again and repeat your change."
                )
            return self._write(stored.id, profile)

    def delete(self, profile_id: str) -> None:
        """Delete a profile, a damaged one too; if it was the active one, none is active afterwards."""
        with self._writing():
            path = self._path(profile_id)
            if not path.is_file():
                raise self._unknown(profile_id)
            path.unlink()
            if self.active_id() == profile_id:
                (self.root / ACTIVE).unlink()

    def activate(self, profile_id: str) -> None:
        """Make a profile the one that ``"active"`` refers to."""
        with self._writing():
            self.read(profile_id)
            with replacing(self.root / ACTIVE, PRIVATE) as aside:
                aside.write_text(profile_id, encoding="utf-8")

    def active_id(self) -> str | None:
        """Return the id of the active profile, or None if there is none or the note of it is damaged."""
        try:
            active = (self.root / ACTIVE).read_text(encoding="utf-8", errors="replace").strip()
            return active if _ID.fullmatch(active) else None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unreadable(error) from None

    def resolve(self, reference: str) -> StoredProfile:
        """Return the profile behind a reference: an id, or ``"active"``.

        Raises:
            ProfileError: no profile is active, or there is none with this id.
        """
        if reference != ACTIVE:
            return self.read(reference)
        active = self.active_id()
        if active is None:
            raise ProfileError(
                "No safety profile is active on this machine. Make one with `psa profile new --activate`, or "
                "activate one with `psa profile activate ID` (`psa profile list` shows the ids)."
            )
        return self.read(active)

    def _files(self) -> list[Path]:
        try:
            return [path for path in self.root.iterdir() if path.suffix == ".json" and _ID.fullmatch(path.stem)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._unreadable(error) from None

    def _path(self, profile_id: str) -> Path:
        if not _ID.fullmatch(profile_id):
            raise self._unknown(profile_id)
        return self.root / f"{profile_id}.json"

    def _unknown(self, profile_id: str) -> ProfileError:
        return ProfileError(
            f'There is no safety profile "{profile_id}" on this machine. A shared workflow refers to its author\'s '
            f'profile: choose "{ACTIVE}" to use your own, or one of the ids that `psa profile list` shows.'
        )

    def _unreadable(self, error: Exception) -> StoreError:
        return StoreError(
            f"The profile folder {self.root} cannot be read ({_reason(error)}). Make it readable for the account "
            "that runs ComfyUI."
        )

    def _write(self, profile_id: str, profile: Profile) -> StoredProfile:
        stored = StoredProfile(profile_id, secrets.token_hex(8), profile)
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "revision": stored.revision,
            "profile": profile.model_dump(),
        }
        with replacing(self._path(profile_id), PRIVATE) as aside:
            aside.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
        return stored

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            make_private(self.root)
            with FileLock(self.root / ".lock", timeout=self._lock_seconds, mode=PRIVATE):
                yield
        except Timeout:
            raise StoreError(
                f"Another program has been writing to the profile folder {self.root} for {self._lock_seconds:g} "
                "seconds; nothing was changed. Try again when it has finished."
            ) from None
        except OSError as error:
            raise StoreError(
                f"The profile folder {self.root} cannot be written ({_reason(error)}); nothing was changed. Make it "
                "writable for the account that runs ComfyUI, or make room on the disk."
            ) from None


def _reason(error: Exception) -> str:
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else "it is not UTF-8 text"


def private_fingerprint(content: str) -> str:
    """Return a short text that changes when ``content`` changes, and tells nothing else.

    ComfyUI writes fingerprints of nodes into the metadata of saved images. The space of profiles is small
    enough to try them all against a plain hash, so this one is keyed with a secret of this process.
    """
    return hmac.new(_FINGERPRINT_KEY, content.encode(), hashlib.sha256).hexdigest()[:16]
