"""Who may write to a run's mirror: a lease in the mirror, renewed while its owner lives. Used by `run/mirror.py`.

Nobody's clock is trusted but that of the storage: whoever wants a lease that is held waits until it is older than its
length there, and takes it on the condition that it is still the one that was read. An owner that was replaced finds
another one in its place at the next renewal, and writes no more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from dual_policy_plugin.errors import RunError, StorageError
from dual_policy_plugin.heartbeat import beat
from dual_policy_plugin.mirror.places import OWNER_NAME, Outdated, Place

LEASE_S = 90.0
"""How long an owner may be silent before another machine takes the run over."""
_JOIN_S = 5.0
"""How long the end of a run waits for a renewal that is under way."""
_logger = logging.getLogger(__name__)


class Lease:
    """The right to write to one mirror, from `take` to `release`; a thread renews it."""

    def __init__(self, place: Place, *, length_s: float | None = None) -> None:
        """Args: place: of the run. length_s: LEASE_S if not given."""
        self._place = place
        self._length_s = LEASE_S if length_s is None else length_s
        self._note: dict[str, Any] = {
            "id": secrets.token_hex(8),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": _process(os.getpid()),
            "length_s": self._length_s,
        }
        self._version: str | None = None
        self._written = 0.0  # by _now, when the last renewal that worked was begun
        self._num_writes = 0
        self._lost = ""
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_often, name="mirror-lease", daemon=True)

    def take(self) -> None:
        """Takes the lease; waits while a silent owner may be alive.

        Raises:
            RunError: another machine has the run and is alive.
            StorageError: the storage cannot be reached.
        """
        while not self._write(self._replaceable(), is_held=True):
            pass  # somebody was faster: look who
        self._thread.start()

    def check(self) -> None:
        """Makes sure that the lease is ours, and asks the storage where it may have run out.

        Raises:
            RunError: another machine has it.
            StorageError: it ran out, and the storage cannot be reached.
            Outdated: it is being given back.
        """
        if self._ended.is_set():
            raise Outdated
        if _now() - self._written > self._length_s:
            self._renew()
        if self._lost:
            raise RunError(self._lost)

    def confirm(self) -> None:
        """As `check`, and always asks the storage."""
        self.check()
        self._renew()
        self.check()

    def is_owner(self, note: bytes) -> bool:
        """Whether a mirror/owner.json is ours."""
        return bool(_read(note).get("id") == self._note["id"])

    def release(self) -> None:
        """Gives the lease back, so that the next process need not wait; the storage may be out of reach."""
        self.end()
        self._thread.join(_JOIN_S)
        if not self._thread.is_alive() and not self._lost:
            with contextlib.suppress(RunError):
                self._write(self._version, is_held=False)

    def end(self) -> None:
        """Nothing more is written, and the lease renewed no more; without `release` the next process has to wait."""
        self._ended.set()

    @property
    def lost(self) -> str:
        """Who has the lease instead of us, as a message; empty while it is ours."""
        return self._lost

    def _replaceable(self) -> str | None:
        """The version of the lease that may be replaced now; None: there is none. Waits for a silent owner."""
        found = first = self._place.get(OWNER_NAME)
        begun, is_said = _now(), False
        while found is not None and first is not None and _is_held(note := _read(found.data)):
            if found.version != first.version:
                raise RunError(
                    f"{self._place.where} is in use by {_name(note)}; wait for it, end it, or use another run= name"
                )
            age_s = max(found.age_s, first.age_s + _now() - begun)
            left_s = float(note.get("length_s", self._length_s)) - age_s
            if left_s <= 0:
                _logger.warning("%s is taken over from %s, silent for %.0f s", self._place.where, _name(note), age_s)
                break
            if not is_said:
                _logger.warning(
                    "%s was in use by %s %.0f s ago; waiting up to %.0f s to see whether it lives",
                    self._place.where, _name(note), age_s, left_s,
                )  # fmt: skip
                is_said = True
            time.sleep(min(left_s, self._length_s / 30))
            beat()
            found = self._place.get(OWNER_NAME)
        return found.version if found is not None else None

    def _renew_often(self) -> None:
        while not self._ended.wait(self._length_s / 5):
            try:
                self._renew()
            except StorageError as error:
                _logger.warning("%s; it will be tried again", error)
            except RunError as error:
                _logger.warning("%s", error)
            if self._lost:
                return

    def _renew(self) -> None:
        """Renews the lease, or notes who has it."""
        with self._lock:
            if self._lost or self._write(self._version, is_held=True):
                return
            found = self._place.get(OWNER_NAME)
            owner = _name(_read(found.data)) if found is not None else "somebody who removed this run's lease"
            self._lost = (
                f"{self._place.where} was taken over by {owner}, as this process had been silent for too long; "
                "nothing more is written there, and the run goes on with the other one"
            )

    def _write(self, version: str | None, *, is_held: bool) -> bool:
        """Writes the lease in the place of `version`; whether it is ours now."""
        self._num_writes += 1
        data = (json.dumps({**self._note, "renewals": self._num_writes, "is_held": is_held}) + "\n").encode()
        while True:
            begun = _now()
            written = self._place.swap(OWNER_NAME, data, version)
            if written is None:
                found = self._place.get(OWNER_NAME)
                if found is None or not self.is_owner(found.data):
                    return False
                if found.data != data:  # ours, from a renewal whose answer was lost
                    version = found.version
                    continue
                written = found.version
            self._version, self._written = written, begun
            return True


def _now() -> float:
    """Seconds by a clock that goes on while the machine sleeps, where it has one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _read(data: bytes) -> dict[str, Any]:
    """What a lease says; nothing where it cannot be read, and then it is held by somebody unknown."""
    try:
        note = json.loads(data)
    except ValueError:
        return {}
    return note if isinstance(note, dict) else {}


def _is_held(note: dict[str, Any]) -> bool:
    return bool(note.get("is_held", True)) and not _is_dead(str(note.get("process", "")))


def _name(note: dict[str, Any]) -> str:
    """Who holds a lease, in words."""
    return f"process {note['pid']} on {note['host']}" if {"pid", "host"} <= note.keys() else "another process"


def _process(pid: int) -> str:
    """A name that no other process ever has: machine since it was started, its part, number, moment of birth.

    Empty where the operating system does not tell.
    """
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        part = os.readlink("/proc/self/ns/pid")
        facts = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        state, born = facts[0], facts[19]
    except (OSError, ValueError, IndexError):
        return ""
    if state in "ZX":  # ended, and only its parent has not looked yet
        return ""
    return f"{machine} {part} {pid} {born}"


def _is_dead(process: str) -> bool:
    """Whether a process was one of this machine that has ended; one of another machine may be alive."""
    words, own = process.split(), _process(os.getpid()).split()
    if len(words) != 4 or len(own) != 4 or words[:2] != own[:2]:
        return False
    return _process(int(words[2])) != process
