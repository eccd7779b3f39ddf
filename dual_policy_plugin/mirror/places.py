"""Where a run can be mirrored: under a prefix of S3, or in a folder. `transfer.py` knows what goes there.

A place holds whole objects by name ("state/training.safetensors"): a reader sees the old one or the new one. One of
them says who may write the others (`lease.py`). It may change hands while a write is on its way, so every write has a
condition: that the owner is still the same (a folder), or that the object is still the one that was to be replaced
(S3). What comes too late is refused by the storage itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

OWNER_NAME = "mirror/owner.json"
"""Who may write."""
MAX_PUT_BYTES = 5 * 1024**3
"""The most that S3 takes in one request."""
CONFLICTS = 3
"""How often a write may find other bytes than those it was to replace, though the owner is the same."""


class Outdated(Exception):  # noqa: N818 (no error)
    """What was to be sent has been replaced by something newer, or is not wanted any more."""


class Guard(Protocol):
    """Stops an owner that was replaced."""

    def check(self) -> None:
        """Raises where nothing may be written any more, as far as is known; called before every attempt."""

    def confirm(self) -> None:
        """The same after a look at the storage; called where a write was refused."""

    def is_owner(self, note: bytes) -> bool:
        """Whether a mirror/owner.json is that of the owner."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Found:
    """An object as it was read."""

    data: bytes
    version: str
    """Another one after each write."""
    age_s: float
    """Seconds since it was written, by the clock of the place; never negative."""


class Place(Protocol):
    """One run's part of the storage.

    All methods raise a StorageError where the storage cannot be reached after several attempts, and a RunError where it
    refuses. They may be called from several threads.
    """

    @property
    def where(self) -> str:
        """Begins every message: s3://bucket/prefix/run/, or the folder."""

    def get(self, name: str) -> Found | None:
        """An object; None if there is none."""

    def has(self, name: str) -> bool:
        """Whether there is such an object."""

    def put(self, name: str, data: bytes, guard: Guard) -> bool:
        """Writes an object of ours.

        Returns:
            Whether no write of an earlier owner can replace it any more. False: the same bytes stood there before, so
            what that owner has on its way may still come, if it was to replace those.

        Raises:
            RunError: another owner was found; nothing was written.
            Outdated: as `guard` says.
        """

    def swap(self, name: str, data: bytes, version: str | None) -> str | None:
        """Writes an object if `version` still stands there (None: nothing does).

        Returns:
            The new version; None where another one stands there. The answer to an attempt that took effect may have
            been lost, so after a None it has to be looked whether the object is ours.
        """

    def delete(self, name: str) -> None:
        """Removes an object; it may be gone already."""

    def clean_up(self) -> None:
        """Removes what killed processes left half written; for who holds the lease."""
