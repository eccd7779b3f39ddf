"""The run directory on a storage that outlives the machine, so that a run goes on on another one (trainer.sync_uri).

Stands beside the run directory: `continuation.py` opens it before, and calls it after each saved state. The mirror has
the run's files under their own names, and two of its own:

    mirror/owner.json   who may write (`mirror/lease.py`)
    mirror/files.json   which bytes each file may have (`mirror/listing.py`)

The files of a saved state are held open when it is saved, so what is sent fits together however long that takes
(`mirror/transfer.py`).
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dual_policy_plugin.errors import RunError, StorageError
from dual_policy_plugin.mirror.folder_place import FolderPlace
from dual_policy_plugin.mirror.lease import Lease
from dual_policy_plugin.mirror.listing import GROWING_NAMES, FileList, join_pieces, read_list
from dual_policy_plugin.mirror.places import Outdated, Place
from dual_policy_plugin.mirror.s3_place import S3Place
from dual_policy_plugin.mirror.transfer import (
    RESULT_NAME,
    Key,
    Snapshot,
    fetch_files,
    send_snapshot,
    take_snapshot,
)
from dual_policy_plugin.run.lock import check_unlocked
from dual_policy_plugin.waiting import waiting

_LAST_TRIES = 3
"""At the end of a run, each with the attempts of every request."""
_JOIN_S = 1.0
_logger = logging.getLogger(__name__)


class RunMirror:
    """The mirror of one run, held by this process; every method is for the main thread.

    A thread of its own sends one snapshot at a time; of those that wait the newest is sent. A context manager: leaving
    it gives the mirror back.
    """

    def __init__(self, place: Place, lease: Lease, folder: Path, listed: FileList, *, grace_s: float) -> None:
        """Takes over a held lease; users call `open`."""
        self._place, self._lease, self._folder, self._listed = place, lease, folder, listed
        self._grace_s = grace_s
        self._sent: dict[str, Key] = {}
        self._wanted: Snapshot | None = None
        self._is_sending = False
        self._is_ended = False
        self._error: RunError | None = None
        self._defect: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._send_wanted, name="mirror", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        sync_uri: str,
        run: str,
        folder: Path,
        *,
        grace_s: float = 30.0,
    ) -> Self:
        """Takes the mirror of a run, and brings the run directory up to what it has.

        Args:
            sync_uri: as trainer.sync_uri.
            run: its name.
            folder: its directory, which no process has open.
            grace_s: how long leaving may wait for what is being sent.

        Raises:
            RunError: another machine has the run, the storage refuses, or what stands there is damaged.
            StorageError: it cannot be reached.
        """
        place = open_place(sync_uri, run)
        check_apart(place, folder)
        check_unlocked(folder)
        lease = Lease(place)
        with waiting(f"waiting for {place.where}"):
            lease.take()
        try:
            place.clean_up()
            listed = read_list(place)
            before = time.monotonic()
            found = copy.deepcopy(listed)  # `listed` keeps what an owner that was replaced may still have on its way
            if fetch_files(place, found, folder):
                _logger.info(
                    "%s continues from its mirror %s: iteration %d, %d files in %.1f s",
                    folder, place.where, found.newest_iteration(), len(found.contents), time.monotonic() - before,
                )  # fmt: skip
            elif found.newest_iteration() >= 0:
                _logger.info("%s has all that its mirror %s has, and continues from itself", folder, place.where)
        except BaseException:
            lease.release()
            raise
        return cls(place, lease, folder, listed, grace_s=grace_s)

    def advance(self) -> None:
        """Has the files of the run as they are now sent; takes no time.

        Raises:
            RunError: another machine has taken the run over.
        """
        self._raise_lost()
        snapshot = take_snapshot(self._folder, self._sent)
        with self._changed:
            self._drop_wanted()
            self._wanted = snapshot
            self._changed.notify_all()

    def wait(self, timeout_s: float = math.inf) -> bool:
        """Waits until nothing is being sent; whether all that was handed over has arrived.

        What is sent gives the signs of life meanwhile, so that a storage that hangs is no life.

        Raises:
            RunError: another machine has taken the run over.
        """
        end = time.monotonic() + timeout_s
        with self._changed:
            while self._is_sending or self._wanted is not None:
                left_s = end - time.monotonic()
                if left_s <= 0:
                    return False
                self._changed.wait(min(left_s, threading.TIMEOUT_MAX))
        self._raise_lost()
        return self._error is None

    def settle(self, timeout_s: float) -> None:
        """Waits for what is being sent, at most so long, and says what that came to; for a run that is to stop."""
        if self.wait(timeout_s):
            _logger.info("%s has the newest state", self._place.where)
        else:
            _logger.warning(
                "%s does not have the newest state, %s; without this run directory the run continues from an older one",
                self._place.where, self._error or f"{timeout_s:.1f} s were too short for it",
            )  # fmt: skip

    def finish(self) -> None:
        """Sends all that the run has left and waits for it.

        Raises:
            StorageError: it did not arrive.
            RunError: the storage refuses it, or another machine has taken the run over.
        """
        with waiting(f"sending the rest to {self._place.where}"):
            for attempt in range(_LAST_TRIES):
                if attempt:
                    time.sleep(2.0**attempt)
                self.advance()
                if self.wait():
                    return
        kind = StorageError if isinstance(self._error, StorageError) else RunError
        raise kind(f"{self._error}; the run is complete here, and the same command sends what is missing there")

    def close(self, *, wait_s: float = 0.0) -> None:
        """Gives the mirror back; what is still being sent may take `wait_s`."""
        with contextlib.suppress(RunError):
            if wait_s and not self.wait(0.0):
                self.settle(wait_s)
        with self._changed:
            self._is_ended = True
            self._drop_wanted()
            self._changed.notify_all()
        self._lease.end()
        self._thread.join(_JOIN_S)
        if not self._thread.is_alive() and not isinstance(self._error, StorageError):
            self._lease.release()  # else an object of ours may be on its way: the next process has to wait

    def __enter__(self) -> Self:
        """The open mirror."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes it; a run that was told to stop has waited before."""
        self.close(wait_s=0.0 if kind in (KeyboardInterrupt, SystemExit) else self._grace_s)

    def _drop_wanted(self) -> None:
        if self._wanted is not None:
            self._wanted.close()
            self._wanted = None

    def _raise_lost(self) -> None:
        if self._defect is not None:
            raise self._defect
        if self._lease.lost:
            raise RunError(self._lease.lost)

    def _send_wanted(self) -> None:
        """What the thread does."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted is not None or self._is_ended)
                snapshot, self._wanted = self._wanted, None
                if snapshot is None:
                    return
                self._is_sending = True
            try:
                send_snapshot(self._place, self._listed, snapshot, self._sent, self._lease)
                error: RunError | None = None
            except Outdated:
                error = RunError(f"{self._place.where}: not all files were sent")
            except RunError as failure:
                error = failure
                _logger.warning("%s; it will be tried again with the next state", error)
            except BaseException as defect:  # ours; raised where the run is
                error, self._defect = StorageError(f"{self._place.where}: {defect!r}"), defect
            finally:
                snapshot.close()
            with self._changed:
                self._is_sending, self._error = False, error
                self._changed.notify_all()


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


def read_mirrored(sync_uri: str, run: str, name: str) -> bytes | None:
    """The bytes of a file of a mirrored run, such as timing.jsonl; None if it is not there. Takes no lease.

    Raises:
        RunError: the storage refuses, or cannot be reached (StorageError).
    """
    place = open_place(sync_uri, run)

    def get(part: str) -> bytes | None:
        found = place.get(part)
        return None if found is None else found.data

    return join_pieces(name, get) if name in GROWING_NAMES else get(name)


def read_result(sync_uri: str, run: str) -> dict[str, Any] | None:
    """What result.json of a mirrored run holds; None while it has none.

    Raises:
        RunError: it is damaged, the storage refuses, or cannot be reached (StorageError).
    """
    data = read_mirrored(sync_uri, run, RESULT_NAME)
    if data is None:
        return None
    try:
        result = json.loads(data)
    except ValueError:
        result = None
    if not isinstance(result, dict):
        raise RunError(f"{RESULT_NAME} of {run} under {sync_uri} is damaged; run the job again")
    return result


def check_apart(place: Place, folder: Path) -> None:
    """Raises a RunError where the mirror would be the directory itself that it mirrors."""
    if isinstance(place, FolderPlace):
        mirror, own = place.folder.resolve(), folder.resolve()
        if mirror == own or mirror in own.parents or own in mirror.parents:
            raise RunError(f"trainer.sync_uri: the mirror {mirror} and the run directory {own} overlap; use another")
