"""One live process per run: an advisory lock on run.lock, used by `directory.py`.

The kernel drops the lock when its holder dies, however it dies, so a file that a dead process left is no obstacle. The
file is never removed or replaced: a lock belongs to the inode, and two inodes would be two locks. Its text (pid, host,
since) is for people only. On NFS the lock holds across machines.

Who finds it held is refused, but for a job of Slurm's, which waits: jobs outlive the command that waited for them, and
the same command, given again, sends them again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path

from dual_policy_plugin.errors import RunError
from dual_policy_plugin.files import file_error
from dual_policy_plugin.heartbeat import beat

_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}
_AGAIN_S = 1.0  # between two looks of who waits
_held: set[int] = set()
"""Descriptors of the locks that this process holds."""
_logger = logging.getLogger(__name__)


def is_slurm_job() -> bool:
    """Whether submitit started this process as a job of Slurm's."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def lock_run(folder: Path, since: float) -> int:
    """Takes the lock of the run at `folder`, in a job of Slurm's once it is free; returns the descriptor that holds it.

    Args:
        folder: the run's directory.
        since: seconds since 1970, for the text of the file.

    Raises:
        RunError: another live process holds it (named by pid and host), or the file system has no locks.
    """
    path = folder / "run.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise file_error(error, path, "opened") from error
    try:
        _lock(descriptor, path)
        note = {"pid": os.getpid(), "host": socket.gethostname(), "since": _timestamp(since)}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(note) + "\n").encode(), 0)
    except OSError as error:
        os.close(descriptor)
        raise file_error(error, path, "written") from error
    except RunError:
        os.close(descriptor)
        raise
    _held.add(descriptor)
    return descriptor


def unlock_run(descriptor: int) -> None:
    """Gives back a lock that `lock_run` took."""
    if descriptor in _held:  # not in a forked child, where the number may mean another file by now
        _held.discard(descriptor)
        os.close(descriptor)


def check_unlocked(folder: Path) -> None:
    """Makes sure that no live process has the run at `folder`, or waits in a job of Slurm's until none has.

    A run that never began has none.

    Raises:
        RunError: one has.
    """
    path = folder / "run.lock"
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return
    except OSError as error:
        raise file_error(error, path, "opened") from error
    try:
        _lock(descriptor, path)
    finally:
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether a process has the run at `folder` now; False where the file system cannot say."""
    try:
        descriptor = os.open(folder / "run.lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _lock(descriptor: int, path: Path) -> None:
    try:
        _take(descriptor, path)
    except BlockingIOError as error:
        raise RunError(
            f"{path.parent} is in use by {_holder(descriptor)}; wait for it, end it, or use another run= name"
        ) from error
    except OSError as error:
        if error.errno in _WITHOUT_LOCKS:
            raise RunError(
                f"{path} cannot be locked, the file system has no file locks ({error.strerror}); "
                f"set train_dir= to another disk"
            ) from error
        raise


def _take(descriptor: int, path: Path) -> None:
    """Takes the lock, or raises what the system says; in a job of Slurm's it waits for whoever has it."""
    is_said = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not is_slurm_job():
                raise
        if not is_said:
            _logger.warning("%s is in use by %s; this job waits until it ends", path.parent, _holder(descriptor))
            is_said = True
        beat()
        time.sleep(_AGAIN_S)


def _holder(descriptor: int) -> str:
    """Who holds the lock, in words."""
    try:
        note = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {note['pid']} on {note['host']} since {note['since']}"
    except (ValueError, KeyError, TypeError, OSError):
        return "another process"  # it took the lock and has not yet written its name


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=UTC).isoformat(timespec="seconds")


def _drop_in_child() -> None:
    """Closes a forked child's copies: the lock stays with the parent, and ends with it even if the child lives on."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_drop_in_child)
