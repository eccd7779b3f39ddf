"""Where a process is in its saves, left in shared memory so that it can be read when the process is dead.

The drill makes a page before it forks; the child writes one number into it before and after every call of the edge.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.resume.edge import CALLS, KINDS, Call

_WORD = struct.Struct("Q")  # native: one store, where "=Q" would be eight
_NOT_SAVED = ("folder", "run lock", "other")


@dataclass(kw_only=True, slots=True, frozen=True)
class Place:
    """Where a process was."""

    num_saves: int
    """Files that it had begun to save; the one that it is at, if there is one, is the last of them."""
    kind: str
    """The file that it was saving, of KINDS; empty: none, it was between two saves or did something else."""
    call: str
    """The call of the operating system that it was in or had come from last."""
    is_after: bool
    """That call had returned."""


class Page:
    """Shared memory of one child: one number of 8 bytes, which is written in one step."""

    def __init__(self) -> None:
        """A page that says: nothing yet."""
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def write(self, num_saves: int, kind: str, call: str, *, is_after: bool) -> None:
        """Notes a place."""
        kind_number = 0 if not kind else KINDS.index(kind) + 1
        _WORD.pack_into(self._memory, 0, num_saves << 16 | kind_number << 8 | CALLS.index(call) << 1 | is_after)

    def read(self) -> Place:
        """The place that was noted last."""
        (word,) = _WORD.unpack_from(self._memory, 0)
        kind_number = word >> 8 & 0xFF
        return Place(
            num_saves=word >> 16,
            kind=KINDS[kind_number - 1] if kind_number else "",
            call=CALLS[word >> 1 & 0x7F],
            is_after=bool(word & 1),
        )

    def close(self) -> None:
        """Gives the memory back."""
        self._memory.close()


@dataclass(kw_only=True, slots=True)
class Witness:
    """Follows the calls of a process and says when a save begins and ends.

    A save is one file: from the opening of its temporary file to the closing of the folder, which has been synced; of
    a growing file from its opening to its closing; a removal is one call.
    """

    page: Page
    die_at: tuple[int, int] | None = None
    """(save, call of it), both from 1, before which the process ends itself with SIGKILL."""
    on_saved: Callable[[Call], None] = lambda call: None
    """Called with the first call of each save that has ended."""
    lengths_s: dict[str, list[float]] = field(default_factory=dict)
    """Seconds that each save took, by kind."""
    num_calls: int = 0
    """Calls of the save that is going on, or was the last."""
    _first: Call | None = None
    _began: float = 0.0
    _num_saves: int = 0

    def before(self, call: Call) -> None:
        """To be called before each call of the edge."""
        begins = call.name == "open" or (call.name == "unlink" and not call.is_temporary)
        if self._first is None and begins and call.kind not in _NOT_SAVED:
            self._first, self._began, self.num_calls = call, time.perf_counter(), 0
            self._num_saves += 1
        self.num_calls += 1
        self.page.write(self._num_saves, self._kind(), call.name, is_after=False)
        if self.die_at is not None and (self._num_saves, self.num_calls) >= self.die_at and self._first is not None:
            os.kill(os.getpid(), signal.SIGKILL)

    def after(self, call: Call, done: bool) -> None:
        """To be called after each call of the edge."""
        first = self._first
        if not done and call.name == "open":
            first = self._first = None  # there is no such file, as of a log without a line
            self._num_saves -= 1
        if first is not None and ((call.name == "close" and not call.is_temporary) or first.name == "unlink"):
            self.lengths_s.setdefault(first.kind, []).append(time.perf_counter() - self._began)
            self._first = None
            self.on_saved(first)
        self.page.write(self._num_saves, self._kind(), call.name, is_after=True)

    def _kind(self) -> str:
        return "" if self._first is None else self._first.kind
