"""Fetched policies on the disk, by the sha256 of their bytes; processes share them, and hosts on a network file system.

    <root>/blobs/<sha256>          the bytes; the time of the file is that of its last use
    <root>/index/<digest>.json     which bytes an immutable URI means
    <root>/holds/<sha256>/<name>   a live run that uses the bytes; locked by its process, gone with it
    <root>/locks/<digest>          one process fetches, the others wait for it

Nothing here is trusted: `get` hashes what it read, and drops what is not what its name says. Files are written under
another name and renamed, so two writers of one thing leave one whole thing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dual_policy_plugin.errors import ConfigError, NpcError
from dual_policy_plugin.npc.holds import Hold, is_live, locked, unlink
from dual_policy_plugin.waiting import waiting

ROOT_VARIABLE = "DUAL_POLICY_CACHE"
SIZE_VARIABLE = "DUAL_POLICY_CACHE_GB"
DEFAULT_GB = 20.0
WAIT_S = 900.0
"""How long to wait for another process that fetches the same thing; then this one fetches too."""
STALE_S = 24 * 3600.0
"""Age from which an unfinished file is what a killed process left."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True, frozen=True)
class CacheEntry:
    """One policy in the cache."""

    sha256: str
    num_bytes: int
    last_used: float
    """Seconds since 1970."""
    uris: tuple[str, ...]
    """What it was fetched as."""
    is_held: bool
    """Whether a live run uses it."""


class Cache:
    """Policies by their digest, up to `max_bytes` in all.

    Attributes:
        root: the folder.
        max_bytes: above this, those that were used longest ago go; never those that a live run holds.
    """

    def __init__(self, root: Path | None = None, max_bytes: int | None = None) -> None:
        self.root = root if root is not None else _default_root()
        self.max_bytes = max_bytes if max_bytes is not None else _default_bytes()

    def path(self, sha256: str) -> Path:
        """Where the bytes of a digest are, or would be."""
        assert _DIGEST.fullmatch(sha256), "a digest is 64 hex digits"
        return self.root / "blobs" / sha256

    def known(self, key: str) -> tuple[str, int] | None:
        """(sha256, size) of what an immutable URI means, if its bytes are here; they are not read."""
        try:
            note = json.loads(self._note(key).read_bytes())
            digest, size = note["sha256"], note["bytes"]
            if note["key"] == key and _DIGEST.fullmatch(digest) and self.path(digest).stat().st_size == size:
                return digest, size
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not here, or not whole: then it is fetched
        return None

    def get(self, key: str, sha256: str | None = None) -> bytes | None:
        """The bytes of a digest, or of what an immutable URI means; None where they are not here.

        They are hashed in memory: what comes back is what the digest says.
        """
        if sha256 is None:
            known = self.known(key)
            if known is None:
                return None
            sha256 = known[0]
        path = self.path(sha256)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != sha256:
            _log.warning(
                "%s holds other bytes than its name says (a failing disk?); it is dropped and fetched again", path
            )
            self._drop(sha256)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return data

    def put(self, data: bytes, key: str | None = None) -> str:
        """Keeps `data`, and that `key` means it; gives its sha256. What was used longest ago may have to go.

        Raises:
            NpcError: it could not be written.
        """
        digest = hashlib.sha256(data).hexdigest()
        path = self.path(digest)
        try:
            for folder in ("blobs", "index", "holds", "locks"):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            if not (path.exists() and path.stat().st_size == len(data)):
                _write(path, data)
            if key is not None:
                note = {"key": key, "sha256": digest, "bytes": len(data)}
                _write(self._note(key), (json.dumps(note) + "\n").encode())
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise NpcError(
                f"the cache {self.root} cannot be written: {reason}; set {ROOT_VARIABLE} to a folder with room"
            ) from error
        self._evict(self.max_bytes, keep={digest})
        return digest

    def ls(self) -> list[CacheEntry]:
        """What is here, the last used first."""
        uris: dict[str, list[str]] = {}
        for path in self._files("index"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                note = json.loads(path.read_bytes())
                uris.setdefault(str(note["sha256"]), []).append(str(note["key"]).partition("#")[0])
        entries = []
        for path in self._files("blobs"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                entries.append(
                    CacheEntry(
                        sha256=path.name,
                        num_bytes=stat.st_size,
                        last_used=stat.st_mtime,
                        uris=tuple(sorted(uris.get(path.name, ()))),
                        is_held=self._is_held(path.name),
                    )
                )
        return sorted(entries, key=lambda entry: (-entry.last_used, entry.sha256))

    def prune(self, max_bytes: int | None = None) -> list[str]:
        """Removes what was used longest ago until `max_bytes` (None: the cache's bound) are kept; gives the digests.

        What a live run holds stays. What killed processes left unfinished goes too.
        """
        for folder in ("blobs", "index"):
            with contextlib.suppress(FileNotFoundError):
                for path in (self.root / folder).glob(".*.tmp"):
                    with contextlib.suppress(OSError):
                        if time.time() - path.stat().st_mtime > STALE_S:
                            path.unlink()
        removed = self._evict(self.max_bytes if max_bytes is None else max_bytes)
        for path in self._files("index"):
            if self._is_dangling(path):
                unlink(path)
        return removed

    def verify(self) -> tuple[int, list[str]]:
        """Hashes everything; gives how many are whole and the digests that were not, which are removed."""
        bad = []
        paths = self._files("blobs")
        with waiting("hashing what is in the cache", len(paths)) as advance:
            for path in paths:
                advance(1)
                try:
                    with path.open("rb") as file:
                        digest = hashlib.file_digest(file, "sha256").hexdigest()
                except FileNotFoundError:
                    continue  # evicted by another process
                except OSError:
                    digest = ""
                if digest != path.name:
                    bad.append(path.name)
                    self._drop(path.name)
        return len(paths) - len(bad), bad

    def hold(self, digests: Iterable[str]) -> Hold:
        """Keeps these from being removed until the hold is closed or its process ends; they need not be here yet."""
        return Hold(self.root, sorted(set(digests)))

    @contextlib.contextmanager
    def fetching(self, key: str) -> Iterator[None]:
        """Lets one process at a time fetch a URI; the others wait (WAIT_S at most) and find it here afterwards."""
        with contextlib.ExitStack() as stack:
            with waiting(f"waiting for the process that fetches {key.partition('#')[0]}"):
                stack.enter_context(locked(self.root / "locks" / _hash(key), fcntl.LOCK_EX, WAIT_S))
            yield

    def _note(self, key: str) -> Path:
        return self.root / "index" / f"{_hash(key)}.json"

    def _files(self, folder: str) -> list[Path]:
        try:
            return sorted(path for path in (self.root / folder).iterdir() if not path.name.startswith("."))
        except OSError:
            return []

    def _drop(self, sha256: str) -> None:
        """Removes a blob; on a network file system two processes may do so at once."""
        unlink(self.path(sha256))

    def _evict(self, max_bytes: int, keep: Iterable[str] = ()) -> list[str]:
        blobs = []
        for path in self._files("blobs"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                blobs.append((stat.st_mtime, path.name, stat.st_size))
        total, removed = sum(size for _, _, size in blobs), []
        if total <= max_bytes:
            return []
        with locked(self.root / "locks" / "evict", fcntl.LOCK_EX, 60.0):  # no hold is taken in the meantime
            for _, name, size in sorted(blobs):
                if total <= max_bytes:
                    break
                if name in keep or self._is_held(name):
                    continue
                if not self.path(name).exists():  # another process was first
                    total -= size
                elif unlink(self.path(name)):
                    removed.append(name)
                    total -= size
        return removed

    def _is_held(self, sha256: str) -> bool:
        return any(is_live(path) for path in self._files(f"holds/{sha256}"))

    def _is_dangling(self, note: Path) -> bool:
        try:
            return not self.path(json.loads(note.read_bytes())["sha256"]).exists()
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError, AssertionError):
            return True


def _write(path: Path, data: bytes) -> None:
    """Publishes a file under its name, whole or not at all."""
    temporary = path.with_name(f".{path.name[:64]}.{secrets.token_hex(6)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        unlink(temporary)
        raise


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _default_root() -> Path:
    if text := os.environ.get(ROOT_VARIABLE):
        return Path(text).expanduser().absolute()
    try:
        return Path.home() / ".cache" / "dual-policy"
    except RuntimeError as error:
        raise ConfigError(f"there is no home folder for the cache; set {ROOT_VARIABLE} to a folder") from error


def _default_bytes() -> int:
    text = os.environ.get(SIZE_VARIABLE)
    try:
        size = DEFAULT_GB if not text else float(text)
    except ValueError:
        size = math.nan
    if not (math.isfinite(size) and size >= 0):
        raise ConfigError(f"{SIZE_VARIABLE}={text} is not possible; use gigabytes, for example {DEFAULT_GB:g}")
    return int(size * 1e9)
