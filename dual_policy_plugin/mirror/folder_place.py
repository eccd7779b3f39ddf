"""A mirror in a folder that outlives the machine (`places.py` says what a place is): renames under the owner's lock."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from dual_policy_plugin import files
from dual_policy_plugin.errors import RunError, StorageError
from dual_policy_plugin.mirror.places import OWNER_NAME, Found, Guard

_PASSING = (
    *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENETDOWN, errno.EHOSTUNREACH),
    *(errno.ECONNRESET, errno.EREMOTEIO, errno.EAGAIN),
)
"""A network file system that does not answer; the same command may work later."""


@dataclass(kw_only=True, slots=True, frozen=True)
class FolderPlace:
    """Files in a folder that outlives the machine, such as a network file system."""

    root: Path
    """The folder of trainer.sync_uri; it must stay where it is."""
    folder: Path
    """The run's part of it."""

    @property
    def where(self) -> str:
        """The folder."""
        return f"{self.folder}/"

    def get(self, name: str) -> Found | None:
        """See Place."""
        with self._errors(name, "read"):
            try:
                with (self.folder / name).open("rb") as file:
                    data, written = file.read(), os.fstat(file.fileno()).st_mtime
            except FileNotFoundError:
                return None
            age_s = max(0.0, self._now() - written)
        return Found(data=data, version=hashlib.sha256(data).hexdigest(), age_s=age_s)

    def has(self, name: str) -> bool:
        """See Place."""
        with self._errors(name, "looked for"):
            return (self.folder / name).exists()

    def put(self, name: str, data: bytes, guard: Guard) -> bool:
        """See Place. While it takes its place nobody else can become the owner."""
        guard.check()
        try:
            self._write(name, data, self._owned(guard))
        except _Replaced:
            guard.confirm()
            raise StorageError(f"{self.where}{name} could not be written: {OWNER_NAME} is gone") from None
        return True

    def swap(self, name: str, data: bytes, version: str | None) -> str | None:
        """See Place. Of two machines that write at once one waits, where the file system's locks reach both."""
        with self._errors(name, "written"), self._locked(name):
            found = self.get(name)
            if (found.version if found else None) != version:
                return None
            self._write(name, data, nullcontext())
        return hashlib.sha256(data).hexdigest()

    def delete(self, name: str) -> None:
        """See Place."""
        with self._errors(name, "removed"):
            (self.folder / name).unlink(missing_ok=True)

    def clean_up(self) -> None:
        """See Place. Not in mirror/, where another process may be about to ask for the lease."""
        with self._errors("", "cleaned"):
            for folder in (self.folder, self.folder / "checkpoints", self.folder / "state"):
                files.remove_temporary_files(folder)

    def _write(self, name: str, data: bytes, around: AbstractContextManager[None]) -> None:
        path = self.folder / name
        with self._errors(name, "written"):
            self._check_root()
            path.parent.mkdir(parents=True, exist_ok=True)
            files.publish(path, data, around=around)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Held by one process at a time, on all machines."""
        self._check_root()
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _owned(self, guard: Guard) -> Iterator[None]:
        """While it is held the owner stays the owner."""
        with self._locked(OWNER_NAME):
            try:
                note = (self.folder / OWNER_NAME).read_bytes()
            except FileNotFoundError:
                note = b""
            if not guard.is_owner(note):
                raise _Replaced
            yield

    def _check_root(self) -> None:
        if not self.root.is_dir():
            raise FileNotFoundError(errno.ENOENT, f"{self.root} is gone")

    def _now(self) -> float:
        """Seconds since 1970 by the clock of the file system, which on a network is not ours."""
        probe = self.root / f".{secrets.token_hex(6)}.tmp"
        try:
            probe.write_bytes(b"")
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    @contextmanager
    def _errors(self, name: str, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, RunError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            kind = StorageError if cause.errno in _PASSING else RunError
            raise kind(
                f"{self.where}{name} could not be {what}: {cause.strerror or type(cause).__name__}; "
                "see that trainer.sync_uri is mounted, can be written and has space"
            ) from None


class _Replaced(Exception):  # noqa: N818 (no error yet)
    """Another owner stands there."""
