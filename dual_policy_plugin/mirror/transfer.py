"""How the files of a run get into its mirror and back. Used by `run/mirror.py`; `listing.py` says what stands there.

They are sent in the order in which a run directory needs them: checkpoints, what is said about them, metrics, then the
state, then the result; what retention removed goes last. Broken off anywhere, the mirror continues from the state that
it has, and each object can be checked against the list.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from dual_policy_plugin import files
from dual_policy_plugin.errors import RunError
from dual_policy_plugin.heartbeat import beat
from dual_policy_plugin.mirror.listing import (
    FILE_NAME,
    GROWING_NAMES,
    LIST_NAME,
    PIECE_BYTES,
    PIECE_NAME,
    STATE_NAME,
    Content,
    FileList,
    join_pieces,
    piece_name,
)
from dual_policy_plugin.mirror.places import Guard, Outdated, Place
from dual_policy_plugin.waiting import waiting

RESULT_NAME = "result.json"
FIRST_NAME = "checkpoints/model_0000.safetensors"
"""Stays as long as its run and belongs to no other."""
MAX_HELD = 128
"""Files that a snapshot holds open; a process may have about a thousand."""
_CHECKPOINT = re.compile(r"checkpoints/model_(\d{4,})\.safetensors")
_COPIES = ("checkpoints/latest.safetensors", "checkpoints/best.safetensors")
"""Of numbered checkpoints; made again where a run directory is opened, so never fetched."""
_CHUNK_BYTES = 1 << 22

Key = tuple[int, int, int]
"""Inode, bytes, time of the last change in ns: another one when a file was changed."""


@dataclass(kw_only=True, slots=True, frozen=True)
class HeldFile:
    """A file, or a piece of a growing one, as it was at one moment."""

    name: str
    """In the mirror."""
    path: Path
    start: int
    """Where in the file it begins."""
    key: Key
    file: BinaryIO | None
    """Stays readable when the path is replaced or removed; None: there were too many to hold."""

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, without those that were appended since.

        Raises:
            Outdated: it was not held, and is gone.
        """
        with ExitStack() as stack:
            try:
                file = self.file or stack.enter_context(self.path.open("rb"))
                at, stop = self.start, self.start + self.key[1]
                while at < stop:
                    chunk = os.pread(file.fileno(), min(_CHUNK_BYTES, stop - at), at)
                    if not chunk:
                        raise Outdated(self.name)
                    at += len(chunk)
                    beat()
                    yield chunk
            except FileNotFoundError as error:
                raise Outdated(self.name) from error
            except OSError as error:
                raise files.file_error(error, self.path, "read") from error

    def content(self) -> Content:
        """Its digest, size and iteration."""
        digest, head = hashlib.sha256(), b""
        for chunk in self.chunks():
            head = head or chunk
            digest.update(chunk)
        iteration = _iteration(head, self.path) if self.name == STATE_NAME else None
        return Content(sha256=digest.hexdigest(), num_bytes=self.key[1], iteration=iteration)


@dataclass(kw_only=True, slots=True, frozen=True)
class Snapshot:
    """The files of a run at one moment, between two iterations."""

    names: set[str]
    """All of them."""
    changed: list[HeldFile]
    """Those that may have to be sent, in the order of sending."""

    def close(self) -> None:
        """Lets go of the files."""
        for held in self.changed:
            if held.file is not None:
                held.file.close()


def take_snapshot(folder: Path, sent: Mapping[str, Key]) -> Snapshot:
    """The files of the run at `folder`; those whose key is in `sent` are only named.

    Raises:
        RunError: they cannot be read.
    """
    names: set[str] = set()
    changed: list[HeldFile] = []
    try:
        for path in [*folder.iterdir(), *(folder / "checkpoints").iterdir(), *(folder / "state").iterdir()]:
            name = path.relative_to(folder).as_posix()
            is_piece = PIECE_NAME.fullmatch(name) is not None and name not in GROWING_NAMES
            if is_piece or FILE_NAME.fullmatch(name) is None or path.is_symlink() or not path.is_file():
                continue
            for held in _parts(name, path):
                names.add(held.name)
                if sent.get(held.name) != held.key:
                    changed.append(held)
        changed.sort(key=_order)
        for i, held in enumerate(changed[-MAX_HELD:], max(0, len(changed) - MAX_HELD)):  # the rest: old checkpoints
            changed[i] = replace(held, file=held.path.open("rb"))
    except OSError as error:
        raise files.file_error(error, folder, "read") from error
    return Snapshot(names=names, changed=changed)


def _parts(name: str, path: Path) -> list[HeldFile]:
    """What is to be sent of a file: itself, or the pieces of a growing one; those that are full never change."""
    status = path.stat()
    size, inode, changed_ns = status.st_size, status.st_ino, status.st_mtime_ns
    if name not in GROWING_NAMES:
        return [HeldFile(name=name, path=path, start=0, key=(inode, size, changed_ns), file=None)]
    return [
        HeldFile(
            name=piece_name(name, start // PIECE_BYTES),
            path=path,
            start=start,
            key=(inode, PIECE_BYTES, 0) if size - start >= PIECE_BYTES else (inode, size - start, changed_ns),
            file=None,
        )
        for start in range(0, max(size, 1), PIECE_BYTES)
    ]


def send_snapshot(place: Place, listed: FileList, snapshot: Snapshot, sent: dict[str, Key], guard: Guard) -> None:
    """Makes the mirror hold what the snapshot does; `listed` and `sent` are kept up to date.

    Args:
        place: of the run.
        listed: what the mirror may hold.
        snapshot: what it is to hold.
        sent: the keys of the local files whose content it holds; by name.
        guard: whether it may be written.
    """
    coming: list[tuple[HeldFile, Content]] = []
    for held in snapshot.changed:
        content = held.content()
        if listed.sure(held.name) == content:
            sent[held.name] = held.key
        else:
            coming.append((held, content))
    for held, content in coming:
        before = listed.contents.setdefault(held.name, [])
        if not before:
            listed.unsure.add(held.name)
        if content not in before:
            before.append(content)
    listed.leaving = (listed.leaving | listed.contents.keys()) - snapshot.names
    if not coming and not listed.leaving:
        return
    if coming:
        place.put(LIST_NAME, listed.encode(), guard)
    for held, content in coming:
        if place.put(held.name, b"".join(held.chunks()), guard):
            listed.contents[held.name] = [content]  # else what an earlier owner has on its way may come
        listed.unsure.discard(held.name)
        sent[held.name] = held.key
        beat()
    for name in listed.leaving:
        listed.drop(name)
        sent.pop(name, None)
    place.put(LIST_NAME, listed.encode(), guard)
    for name in sorted(listed.leaving):
        guard.check()  # once too late does no harm: the newest state does not know the file
        place.delete(name)
        listed.leaving.discard(name)


def fetch_files(place: Place, listed: FileList, folder: Path) -> bool:
    """Makes the run directory hold what the mirror does, where that has done more iterations; the state comes last.

    Args:
        place: of the run.
        listed: what the mirror may hold; is brought in line with what it does hold.
        folder: the run's directory; need not exist.

    Returns:
        Whether anything was fetched.

    Raises:
        RunError: another run stands in the one than in the other, or the mirror is damaged.
    """
    local = saved_iteration(folder / STATE_NAME)
    _check_same(place, listed, folder, local)
    if listed.newest_iteration() <= local:
        return False
    newest = listed.newest_iteration()
    state = _get_checked(place, listed, STATE_NAME)
    if state is None or listed.newest_iteration() <= local:
        return False
    if listed.newest_iteration() == newest:
        for name in listed.leaving:
            listed.drop(name)
    for part in (folder, folder / "checkpoints", folder / "state"):
        try:
            part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.file_error(error, part, "created") from error
    whole = {name for name in listed.contents if PIECE_NAME.fullmatch(name) is None}
    names = sorted(whole - {STATE_NAME, *_COPIES})
    with waiting(f"fetching the files of {place.where}", len(names) + len(GROWING_NAMES)) as advance:
        for name in names:
            _publish(folder / name, _get_checked(place, listed, name))
            advance(1)
        for name in GROWING_NAMES:
            _publish(folder / name, join_pieces(name, partial(_get_checked, place, listed)))
            advance(1)
    if local >= 0:
        _remove_old(folder, listed)
    files.publish(folder / STATE_NAME, state)
    return True


def _publish(path: Path, data: bytes | None) -> None:
    """A file that was fetched, if it was there."""
    if data is not None:
        files.publish(path, data)
    beat()


def saved_iteration(path: Path) -> int:
    """The iteration after which a run's state was saved; -1: there is none."""
    try:
        with path.open("rb") as file:
            size = file.read(8)
            return _iteration(size + file.read(min(int.from_bytes(size, "little"), 1 << 26)), path)
    except FileNotFoundError:
        return -1
    except OSError as error:
        raise files.file_error(error, path, "read") from error


def _iteration(head: bytes, path: Path) -> int:
    """From the first bytes of a state; a safetensors file begins with its header's length and its header."""
    try:
        (size,) = struct.unpack_from("<Q", head)
        header = json.loads(head[8 : 8 + size])
        return int(json.loads(header["__metadata__"]["run"])["counters"]["iteration"])  # as run_state.py writes it
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise RunError(f"{path} is no state of a run; remove it to continue from the mirror") from error


def _check_same(place: Place, listed: FileList, folder: Path, local: int) -> None:
    """Raises a RunError where both sides have a state and their first checkpoints differ."""
    first = folder / FIRST_NAME
    contents = listed.contents.get(FIRST_NAME)
    if local < 0 or not contents or STATE_NAME not in listed.contents or not first.is_file():
        return
    try:
        digest = hashlib.sha256(first.read_bytes()).hexdigest()
    except OSError as error:
        raise files.file_error(error, first, "read") from error
    if digest not in {one.sha256 for one in contents}:
        raise RunError(
            f"{folder} and its mirror {place.where} hold two different runs; use another run= name, "
            "or remove the one that is not wanted"
        )


def _remove_old(folder: Path, listed: FileList) -> None:
    """Removes the checkpoints that retention had removed from the run as the mirror has it."""
    for path in (folder / "checkpoints").iterdir():
        name = f"checkpoints/{path.name}"
        match = _CHECKPOINT.fullmatch(name)
        if match is not None and name not in listed.contents and int(match[1]) <= listed.newest_iteration():
            try:
                path.unlink()
            except OSError as error:
                raise files.file_error(error, path, "removed") from error


def _get_checked(place: Place, listed: FileList, name: str) -> bytes | None:
    """The bytes of a file in the mirror, one of its possible contents; None where it has not arrived, or never was.

    Raises:
        RunError: it is missing, or has other bytes.
    """
    if name not in listed.contents:
        return None
    mend = "remove the mirror and continue from a whole run directory, or use another run= name"
    for _ in range(2):  # once more, where bytes were damaged on their way
        found = place.get(name)
        if found is None:
            if name not in listed.unsure:
                raise RunError(f"{place.where}{name} is missing; {mend}")
            listed.drop(name)
            return None
        digest = hashlib.sha256(found.data).hexdigest()
        for one in listed.contents[name]:
            if one.sha256 == digest:
                listed.contents[name] = [one]
                listed.unsure.discard(name)
                return found.data
    raise RunError(f"{place.where}{name} is damaged: its bytes are not those that were sent; {mend}")


def _order(held: HeldFile) -> tuple[int, int, str]:
    """Where a file stands in the order of sending: what a later one speaks of is there before it."""
    match = _CHECKPOINT.fullmatch(held.name)
    if match is not None:
        return 0, int(match[1]), held.name
    kind = {STATE_NAME: 3, RESULT_NAME: 4}.get(held.name, 1 if held.name.startswith("checkpoints/") else 2)
    return kind, 0, held.name
