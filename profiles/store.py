"""The private store: one JSON file per profile under a random id, readable by its owner only.

Nothing outside this folder knows more than an id. Beside ``ID.json`` lies ``ID.backup``, the version before the last
save; a damaged file that is replaced or deleted stays as ``ID.damaged-N``.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ..safe_files import PRIVATE, make_private, replacing
from .errors import ConflictError, ProfileError, StoreError, UnknownProfileError
from .files import format_file, parse_file
from .schema import Profile

ACTIVE = "active"
PRIVATE_FOLDER = "__psa"  # ComfyUI serves no folder whose name begins so
_ID = re.compile(r"[0-9a-f]{16}")
_USER = re.compile(r"[A-Za-z0-9_-]{1,200}")
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
    """One line of the store's list.

    ``problem`` says why a file cannot be read, ``restorable`` whether the version before it can be brought back.
    """

    id: str
    name: str
    active: bool
    problem: str | None = None
    restorable: bool = False
    revision: str = ""


def profiles_folder(user_directory: Path, user: str | None = None) -> Path:
    """Return where profiles lie inside ComfyUI's user directory.

    ``user`` is the id of an account of ``--multi-user``; None where everybody shares one store.

    Raises:
        ProfileError: no account has such an id.
    """
    private = user_directory / PRIVATE_FOLDER
    if user is None:
        return private / "profiles"
    if not _USER.fullmatch(user):
        raise ProfileError("The request comes from no account of this ComfyUI. Log in again.")
    return private / "accounts" / user / "profiles"


def embeddings_folder(user_directory: Path, user: str | None = None) -> Path:
    """Return where cached embeddings lie, beside the profiles and as private."""
    return _beside(profiles_folder(user_directory, user))


def _beside(profiles: Path) -> Path:
    return profiles.with_name("embeddings")


class ProfileStore:
    """The profiles of one person, in the folder ``root``. Reading never creates or changes anything."""

    def __init__(self, root: Path, lock_seconds: float = _LOCK_SECONDS) -> None:
        """Use the folder ``root``; wait at most ``lock_seconds`` for another program that writes."""
        self.root = root
        self._lock_seconds = lock_seconds

    def entries(self) -> tuple[ProfileEntry, ...]:
        """Return all profiles without their attributes, sorted by name; unreadable ones too."""
        active = self.active_id()
        return tuple(
            sorted(
                (self._entry(path.stem, active) for path in self._files()),
                key=lambda entry: (entry.name.casefold(), entry.id),
            )
        )

    def read(self, profile_id: str) -> StoredProfile:
        """Return a profile.

        Raises:
            UnknownProfileError: there is no such profile.
            ProfileError: its file is damaged.
            StoreError: the file may not be read.
        """
        return self._read(profile_id, self._path(profile_id))

    def create(self, profile: Profile) -> StoredProfile:
        """Store a new profile under a random id."""
        with self._writing():
            return self._write(secrets.token_hex(8), profile)

    def save(self, stored: StoredProfile, profile: Profile) -> StoredProfile:
        """Replace the profile that was read as ``stored``; that version stays as the backup.

        Raises:
            ConflictError: another program saved it in between; nothing is overwritten.
        """
        with self._writing():
            if self.read(stored.id).revision != stored.revision:
                raise ConflictError(
                    f"Profile {stored.id} was changed by another program since it was opened; nothing was "
                    "overwritten. Open it again and repeat your change."
                )
            return self._write(stored.id, profile)

    def restore(self, profile_id: str) -> StoredProfile:
        """Bring back the version before the last save; what is there now becomes the backup, or is set aside.

        Raises:
            UnknownProfileError: there is no such profile.
            ProfileError: it has no backup, or a damaged one.
        """
        with self._writing():
            path = self._existing(profile_id)
            backup = self._backup(profile_id)
            if not backup.is_file():
                raise ProfileError(f"Profile {profile_id} has no earlier version: it was never saved twice.")
            earlier = self._read(profile_id, backup).profile
            damaged = self._next_damaged(path) if self._is_damaged(profile_id) else None
            if damaged is None:
                return self._write(profile_id, earlier)
            with replacing(damaged, PRIVATE) as aside:
                aside.write_bytes(path.read_bytes())
            return self._write(profile_id, earlier, keep=False)

    def delete(self, profile_id: str) -> None:
        """Delete a profile and its backup; if it was the active one, none is active afterwards.

        Cached embeddings go as well, everybody's: they do not tell whose they are, and are made again when needed.
        A damaged file is not deleted, but set aside with its backup: they may be all that is left of a profile.
        """
        with self._writing():
            path, backup = self._existing(profile_id), self._backup(profile_id)
            if self._is_damaged(profile_id):
                damaged = self._next_damaged(path)
                if backup.is_file():
                    backup.rename(damaged.with_name(f"{damaged.name}.backup"))
                path.rename(damaged)
            else:
                path.unlink()
                backup.unlink(missing_ok=True)
                shutil.rmtree(_beside(self.root), ignore_errors=True)
            if self.active_id() == profile_id:
                (self.root / ACTIVE).unlink()

    def put_back(self, profile_id: str, profile: Profile) -> StoredProfile:
        """Store a profile that was deleted under the id that it had, so that workflows find it again.

        Raises:
            ConflictError: there is a profile with this id.
        """
        with self._writing():
            if self._path(profile_id).exists():
                raise ConflictError(f"There is a profile {profile_id} already; nothing was overwritten.")
            return self._write(profile_id, profile)

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
                "No safety profile is active. Make or choose one in the tab Safety Profiles (on the command line: "
                "psa profile)."
            )
        return self.read(active)

    def _entry(self, profile_id: str, active: str | None) -> ProfileEntry:
        try:
            stored = self.read(profile_id)
            return ProfileEntry(profile_id, stored.profile.name, profile_id == active, revision=stored.revision)
        except ProfileError as error:
            restorable = not isinstance(error, StoreError) and self._has_backup(profile_id)
            return ProfileEntry(profile_id, "", profile_id == active, str(error), restorable)

    def _has_backup(self, profile_id: str) -> bool:
        try:
            self._read(profile_id, self._backup(profile_id))
        except ProfileError:
            return False
        return True

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

    def _backup(self, profile_id: str) -> Path:
        return self._path(profile_id).with_suffix(".backup")

    def _existing(self, profile_id: str) -> Path:
        path = self._path(profile_id)
        if not path.is_file():
            raise self._unknown(profile_id)
        return path

    def _read(self, profile_id: str, path: Path) -> StoredProfile:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise self._unknown(profile_id) from None
        except UnicodeDecodeError:
            text = ""  # damaged, as parse_file says
        except OSError as error:
            raise StoreError(
                f"The profile file {path} cannot be read ({_reason(error)}). Make it readable for the account that "
                "runs ComfyUI, or restore it from a backup."
            ) from None
        return StoredProfile(profile_id, *parse_file(text, path))

    def _is_damaged(self, profile_id: str) -> bool:
        try:
            self.read(profile_id)
        except StoreError:
            raise
        except ProfileError:
            return True
        return False

    def _next_damaged(self, path: Path) -> Path:
        names = (path.with_suffix(f".damaged-{number}") for number in itertools.count(1))
        return next(name for name in names if not name.exists())

    def _unknown(self, profile_id: str) -> UnknownProfileError:
        return UnknownProfileError(
            f'There is no safety profile "{profile_id}" on this machine. A shared workflow refers to its author\'s '
            f'profile: choose "{ACTIVE}" to use your own, or another one of the tab Safety Profiles (on the command '
            "line: psa profile list)."
        )

    def _unreadable(self, error: OSError) -> StoreError:
        return StoreError(
            f"The profile folder {self.root} cannot be read ({_reason(error)}). Make it readable for the account "
            "that runs ComfyUI."
        )

    def _write(self, profile_id: str, profile: Profile, keep: bool = True) -> StoredProfile:
        """Write a profile's file; what is there becomes the backup if it is to be kept."""
        stored = StoredProfile(profile_id, secrets.token_hex(8), profile)
        path = self._path(profile_id)
        if keep and path.is_file():
            with replacing(self._backup(profile_id), PRIVATE) as aside:
                aside.write_bytes(path.read_bytes())
        with replacing(path, PRIVATE) as aside:
            aside.write_text(format_file(stored.revision, profile), encoding="utf-8")
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


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def private_fingerprint(content: str) -> str:
    """Return a short text that changes when ``content`` changes, and tells nothing else.

    ComfyUI writes fingerprints of nodes into the metadata of saved images. The space of profiles is small
    enough to try them all against a plain hash, so this one is keyed with a secret of this process.
    """
    return hmac.new(_FINGERPRINT_KEY, content.encode(), hashlib.sha256).hexdigest()[:16]
