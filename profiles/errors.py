"""The exceptions of this room. No message ever quotes a profile: it names the file and the field."""

from __future__ import annotations


class ProfileError(ValueError):
    """A profile, a level or a reference to one cannot be used."""


class UnknownProfileError(ProfileError):
    """There is no profile with this id."""


class StoreError(ProfileError):
    """The private store cannot be read or written."""


class ConflictError(StoreError):
    """A profile has changed since it was read; nothing was overwritten."""


class EncoderError(ValueError):
    """A profile cannot be turned into an embedding, or an embedding cannot be read."""
