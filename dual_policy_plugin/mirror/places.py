"""Where a run can be mirrored: under a prefix of S3, or in a folder. `transfer.py` knows what goes there.

A place holds whole objects by name ("state/training.safetensors"): a reader sees the old one or the new one. One of
them says who may write the others (`lease.py`). It may change hands while a write is on its way, so every write has a
condition: that the owner is still the same (a folder), or that the object is still the one that was to be replaced
(S3). What comes too late is refused by the storage itself.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dual_policy_plugin import files
from dual_policy_plugin.errors import DigestError, NpcError, NpcNotFoundError, RunError, StorageError
from dual_policy_plugin.heartbeat import beat
from dual_policy_plugin.npc.sources import s3_client
from dual_policy_plugin.npc.sources.http import RETRIES, Transient, read_body

OWNER_NAME = "mirror/owner.json"
"""Who may write."""
MAX_PUT_BYTES = 5 * 1024**3
"""The most that S3 takes in one request."""
_PASSING = (
    *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENETDOWN, errno.EHOSTUNREACH),
    *(errno.ECONNRESET, errno.EREMOTEIO, errno.EAGAIN),
)
"""A network file system that does not answer; the same command may work later."""

_CONFLICTS = 3
"""How often a write may find other bytes than those it was to replace, though the owner is the same."""

T = TypeVar("T")


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


def open_place(sync_uri: str, run: str) -> Place:
    """The place of a run.

    Args:
        sync_uri: as trainer.sync_uri has it: s3://bucket/prefix/, or an absolute folder with or without file://.
        run: the run's name; may have slashes.

    Raises:
        RunError: the folder does not exist; it is not made, since it may be a mount that is missing.
    """
    scheme, _, rest = sync_uri.rpartition("://")
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        prefix = prefix.rstrip("/")
        return S3Place(bucket=bucket, prefix=f"{prefix}/{run}/" if prefix else f"{run}/")
    root = Path(rest)
    if not root.is_dir():
        raise RunError(f"trainer.sync_uri={sync_uri} is no folder; mount it or make it, or use s3://bucket/prefix/")
    return FolderPlace(root=root, folder=root / run)


@dataclass(kw_only=True, slots=True, frozen=True)
class S3Place:
    """Objects under s3://<bucket>/<prefix>, through boto3 with the user's own configuration of it."""

    bucket: str
    prefix: str
    _versions: dict[str, str | None] = field(default_factory=dict)
    """What stands there, as far as our own writes tell; None: nothing."""

    @property
    def where(self) -> str:
        """The prefix as a URI."""
        return f"s3://{self.bucket}/{self.prefix}"

    def get(self, name: str) -> Found | None:
        """See Place."""

        def once() -> Found | None:
            client = s3_client.client()
            try:
                answer = client.get_object(Bucket=self.bucket, Key=self.prefix + name)
            except client.exceptions.NoSuchKey:
                return None
            size = int(answer["ContentLength"])
            try:
                data = read_body(answer["Body"].read, size)
            finally:
                answer["Body"].close()
            if len(data) != size:
                raise Transient(f"{len(data)} of {size} bytes arrived")
            return Found(data=data, version=str(answer["ETag"]), age_s=_age_s(answer))

        return self._try(name, "read", once)

    def has(self, name: str) -> bool:
        """See Place."""
        try:
            self._try(name, "looked for", lambda: self._head(name))
        except NpcNotFoundError:
            return False
        return True

    def put(self, name: str, data: bytes, guard: Guard) -> bool:
        """See Place."""
        if name not in self._versions:
            self._versions[name] = self._version(name)
        before = self._versions[name]
        for _ in range(_CONFLICTS):
            version = self._put(name, data, self._versions[name], guard.check)
            if version is not None:
                self._versions[name] = version
                return version != before
            guard.confirm()  # else it is our own write, whose answer was lost, or a late one of an earlier owner
            self._versions[name] = self._version(name)
        raise StorageError(f"{self.where}{name} could not be written: others write it; end them, or use another run=")

    def swap(self, name: str, data: bytes, version: str | None) -> str | None:
        """See Place."""
        return self._put(name, data, version)

    def delete(self, name: str) -> None:
        """See Place."""
        self._versions.pop(name, None)
        arguments = {"Bucket": self.bucket, "Key": self.prefix + name}
        self._try(name, "removed", lambda: s3_client.client().delete_object(**arguments))

    def clean_up(self) -> None:
        """See Place. S3 keeps no half of an object that came in one request."""

    def _head(self, name: str) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = s3_client.client().head_object(Bucket=self.bucket, Key=self.prefix + name)
        return answer

    def _version(self, name: str) -> str | None:
        try:
            return str(self._try(name, "looked for", lambda: self._head(name))["ETag"])
        except NpcNotFoundError:
            return None

    def _put(self, name: str, data: bytes, version: str | None, check: Callable[[], None] = lambda: None) -> str | None:
        """Writes an object in the place of `version` and gives its new one; None where another one stands there."""
        if len(data) > MAX_PUT_BYTES:
            raise RunError(
                f"{self.where}{name} could not be written: {len(data)} bytes are more than the {MAX_PUT_BYTES} that S3 "
                "takes in one request; use a folder for trainer.sync_uri"
            )
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}

        def once() -> str:
            client = s3_client.client()
            answer = client.put_object(Bucket=self.bucket, Key=self.prefix + name, Body=_Body(data), **condition)
            return str(answer["ETag"])

        try:
            return self._try(name, "written", once, check)
        except DigestError:
            return None
        except NpcNotFoundError as error:
            if version is not None and "NoSuchBucket" not in str(error):
                return None  # what was to be replaced is gone
            raise RunError(str(error)) from None

    def _try(self, name: str, what: str, once: Callable[[], T], check: Callable[[], None] = lambda: None) -> T:
        """What `once` returns at the first attempt that does not fail in a way that may pass.

        Args:
            name: the object.
            what: is done to it, for messages.
            once: one request.
            check: before each attempt; raises where there is to be none.

        Raises:
            StorageError: every attempt failed.
            NpcNotFoundError, DigestError: for the caller to judge.
            RunError: S3 refuses.
        """
        failed, reason = f"{self.where}{name} could not be {what}", ""
        for attempt in range(RETRIES.attempts):
            if attempt:
                time.sleep(RETRIES.wait_s(attempt - 1))
            check()
            try:
                with s3_client.errors(failed):
                    return once()
            except Transient as error:
                reason = str(error)
            except (NpcNotFoundError, DigestError) as error:
                if "NoSuchBucket" in str(error):
                    raise RunError(f"{failed}: there is no bucket {self.bucket}; mend trainer.sync_uri") from None
                raise
            except NpcError as error:
                raise RunError(str(error)) from None
        raise StorageError(f"{failed}: {reason}; gave up after {RETRIES.attempts} attempts")


class _Body(io.BytesIO):
    """Bytes on their way: a sign of life with each part that has gone."""

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes."""
        beat()
        return super().read(size)


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


def _age_s(answer: Mapping[str, Any]) -> float:
    """Seconds between an object's last write and now, both as S3's own clock has them."""
    date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    written = answer.get("LastModified")
    if date is None or not isinstance(written, datetime):
        return 0.0
    return max(0.0, (parsedate_to_datetime(date) - written).total_seconds())
