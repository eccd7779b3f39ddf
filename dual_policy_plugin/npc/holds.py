"""Which cached policies a live run uses, and the file locks that the processes of a shared cache meet at.

A hold is a file that its process keeps locked: it is gone with the process, however that ends. `cache.py` asks before
it removes anything.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

FOREIGN_HOLD_S = 30 * 24 * 3600.0
"""How long a hold of another machine counts after its last refresh, where its lock cannot be seen from here."""

_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}
_log = logging.getLogger(__name__)


class Hold:
    """Policies that a live process uses; a context manager, to be closed when it uses them no more. None by default."""

    def __init__(self, root: Path | None = None, digests: Iterable[str] = ()) -> None:
        self._files: list[tuple[int, Path]] = []
        if root is None:
            return
        name = f"{_boot_id()}-{os.getpid()}-{secrets.token_hex(4)}"
        for digest in digests:
            path = root / "holds" / digest / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with locked(root / "locks" / "evict", fcntl.LOCK_SH, 60.0):
                    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                    self._files.append((descriptor, path))
                    with contextlib.suppress(OSError):  # without file locks, its age alone speaks for it
                        fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:  # the bytes can be fetched again
                _log.warning("the cache %s cannot note what this run uses: %s", root, error.strerror)

    def refresh(self) -> None:
        """Says that the process still lives; for machines that cannot see its lock."""
        for descriptor, _ in self._files:
            with contextlib.suppress(OSError):
                os.utime(descriptor)

    def close(self) -> None:
        """Gives them free; may be called twice."""
        for descriptor, path in self._files:
            unlink(path)
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._files = []

    def __enter__(self) -> Self:
        """The hold itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes it."""
        self.close()


def is_live(hold: Path) -> bool:
    """Whether the process that made a hold lives; what a dead one left is removed."""
    try:
        descriptor = os.open(hold, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        can_tell = hold.name.startswith(f"{_boot_id()}-")  # another machine's lock may not be seen from here
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                return True  # locked by its process
            can_tell = False
        if not can_tell and time.time() - os.fstat(descriptor).st_mtime < FOREIGN_HOLD_S:
            return True
        unlink(hold)
        return False
    finally:
        os.close(descriptor)


def _boot_id() -> str:
    """What all processes under one running kernel share, in whatever container they are."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        text = os.uname().nodename
    return re.sub(r"[^A-Za-z0-9]", "", text)[:64] or "host"


@contextlib.contextmanager
def locked(path: Path, kind: int, wait_s: float) -> Iterator[None]:
    """Holds a lock on `path`; goes on without one where it does not come in time or the file system has none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        yield  # a folder that cannot be written: whoever writes into it says so
        return
    try:
        until, pause = time.monotonic() + wait_s, 0.005
        while True:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in _WITHOUT_LOCKS or time.monotonic() > until:
                    break
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        yield
    finally:
        os.close(descriptor)


def unlink(path: Path) -> bool:
    """Removes a file, or finds that another process did; whether it is gone."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True
