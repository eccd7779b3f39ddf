"""Files that are whole or not there: every file of a run is written through this module.

`publish` replaces a file in one step: temporary file in the same folder, fsync, rename, fsync of the folder. A reader
or a crash at any moment sees the old bytes or the new ones. `append_line` adds one JSON line in one write; a line that
a crash left half written is dropped by `cut_torn_tail`. An OSError comes out as a RunError of one line.

Hard links and in-place truncation are not used, since S3 mounts and some network file systems have neither.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from dual_policy_plugin.errors import RunError

_MENDS = {
    errno.ENOSPC: "free some space, or lower trainer.keep_checkpoints",
    errno.EDQUOT: "free some of your quota, or lower trainer.keep_checkpoints",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EACCES: "make the folder writable, or set train_dir= to one that is",
    errno.EPERM: "make the folder writable, or set train_dir= to one that is",
    errno.EROFS: "set train_dir= to a folder that can be written",
    errno.ENOTDIR: "a file stands where a folder should be; move it, or set train_dir= or run= to another name",
    errno.EEXIST: "a file stands where a folder should be; move it, or set train_dir= or run= to another name",
    errno.ENAMETOOLONG: "use a shorter run= name",
    errno.EIO: "the storage is failing; set train_dir= to another disk",
    errno.ESTALE: "the network file system lost the file; mount it again",
}
_FOLDER_SYNC_UNKNOWN = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}
_TMP_SUFFIX = ".tmp"
_BLOCK_BYTES = 1 << 16


def file_error(error: OSError, path: Path, what: str) -> RunError:
    """A RunError of one line for an OSError.

    Args:
        error: what the operating system said.
        path: the file that was meant.
        what: what could not be done to it, for example "written".
    """
    reason = error.strerror or type(error).__name__
    mend = _MENDS.get(error.errno or 0, "see that the folder exists and can be written")
    return RunError(f"{path} could not be {what}: {reason}; {mend}")


def check_writable(path: Path) -> None:
    """Raises unless a file could be written there: before the hours of work whose result it is to hold.

    Raises:
        RunError: it is a folder, or in none, or in one that cannot be written.
    """
    if path.is_dir():
        raise RunError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise RunError(f"{path} cannot be written: there is no folder {path.parent}; make it, or choose another file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}; choose another file") from error


def publish(path: Path, data: bytes, *, around: AbstractContextManager[object] | None = None) -> None:
    """Replaces `path` by `data` in one step; on return the bytes are on the disk.

    Args:
        path: the file.
        data: its bytes.
        around: entered before the step and left after it, such as a lock; if it raises, the old file stays.

    Raises:
        RunError: the file could not be written. The old file, if there was one, is intact, and no temporary file stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}{_TMP_SUFFIX}")
    try:
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                _write_all(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            with around or contextlib.nullcontext():
                os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise file_error(error, path, "written") from error


def publish_json(path: Path, value: Any) -> None:
    """Publishes `value` as indented JSON; NaN and infinity become null, as in `encode_json`."""
    publish(path, (encode_json(value, indent=2) + "\n").encode())


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Adds `record` as one line of JSON, in one write, so that readers of the growing file see whole lines.

    The line outlives the process at once, and the machine after `sync_file`.

    Raises:
        RunError: the line could not be written; the file is as long as before.
    """
    line = (encode_json(record) + "\n").encode()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, line)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise file_error(error, path, "extended") from error


def encode_json(value: Any, *, indent: int | None = None) -> str:
    """`value` as strict JSON, in the order in which it came.

    NaN and infinity have no JSON spelling and become null: a metric may be undefined for an iteration (explained
    variance of constant returns), and a reader of any language must still be able to read the line.
    """
    return json.dumps(_without_non_finite(value), indent=indent, allow_nan=False, ensure_ascii=False)


def read_lines(path: Path) -> list[bytes]:
    """The complete lines of a JSON-lines file, each with its newline; [] if there is no such file.

    Lines at the end that a crash tore (no newline, or bytes that are no JSON) are left out.

    Raises:
        RunError: the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise file_error(error, path, "read") from error
    lines = data.splitlines(keepends=True)
    while lines and not _is_whole(lines[-1]):
        lines.pop()
    return lines


def lines_backwards(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that `read_lines` gives, the last one first, each with where in the file it ends.

    Of a long file no more is read than is asked for.

    Raises:
        RunError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = end = file.seek(0, os.SEEK_END)
            rest, is_torn = b"", True
            while start > 0:
                start, stop = max(0, start - _BLOCK_BYTES), start
                file.seek(start)
                lines = (file.read(stop - start) + rest).splitlines(keepends=True)
                rest = lines.pop(0) if start > 0 else b""  # its beginning is in the block before
                for line in reversed(lines):
                    is_torn = is_torn and not _is_whole(line)
                    if not is_torn:
                        yield end, line
                    end -= len(line)
    except FileNotFoundError:
        return
    except OSError as error:
        raise file_error(error, path, "read") from error


def cut_torn_tail(path: Path) -> int:
    """Cuts what a crash left half written at the end of a JSON-lines file; returns how many bytes that were."""
    if not path.exists():
        return 0
    whole = next((end for end, _ in lines_backwards(path)), 0)
    torn = path.stat().st_size - whole
    if torn:
        keep_first(path, whole)
    return torn


def keep_first(path: Path, num_bytes: int) -> None:
    """Publishes a file's first bytes in its place.

    Raises:
        RunError: it cannot be read or written.
    """
    try:
        with path.open("rb") as file:
            kept = file.read(num_bytes)
    except OSError as error:
        raise file_error(error, path, "read") from error
    publish(path, kept)


def read_json(path: Path) -> Any:
    """The value in a JSON file; None if there is no such file.

    Raises:
        RunError: the file cannot be read, or holds no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise file_error(error, path, "read") from error
    except ValueError as error:
        raise RunError(f"{path} holds no JSON ({error}); restore it, or use another run= name") from error


def sync_file(path: Path) -> None:
    """Brings what was appended to `path` to the disk; does nothing if there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return
    except OSError as error:
        raise file_error(error, path, "opened") from error
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise file_error(error, path, "written") from error
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Brings a folder's names (a rename, a removal) to the disk.

    Some mounts of object stores cannot sync a folder and say so; their renames are durable by other means, so this one
    refusal is no error.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _FOLDER_SYNC_UNKNOWN:
            raise
    finally:
        os.close(descriptor)


def remove_temporary_files(folder: Path) -> int:
    """Removes what killed processes left of unfinished `publish` calls; returns how many files.

    For folders that have one owner only: another process may be about to rename such a file.
    """
    stale = list(folder.glob(f".*{_TMP_SUFFIX}"))
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _is_whole(line: bytes) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(item) for item in value]
    return value
