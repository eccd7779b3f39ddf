"""What the user waits for, while it lasts: a bar on a terminal, a log line every ten seconds elsewhere.

    with waiting("fetching s3://bucket/policy.safetensors", 12_000_000, unit="B") as advance:
        advance(len(chunk))

Nothing is shown of a wait under two seconds, and nothing of a bar stays on the screen. It stands on standard error,
whose log lines go above it. To advance costs an addition; a thread of its own draws, and ends with the last wait. Of
waits within waits the innermost is shown. While the panel of a run has the terminal (`report/progress.py`) no bar is
drawn: the panel shows what is waited for.

Below all that may wait, as `heartbeat.py` is: neither knows who looks.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SHOWN_AFTER_S = 2.0
LINE_INTERVAL_S = 10.0
_DRAW_S = 0.2
_ESTIMATE_AFTER_S = 5.0
_LEAST_FRACTION = 0.02
_MAX_TEXT = 60
_SIZES = ("B", "kB", "MB", "GB", "TB")

Advance = Callable[[float], None]
"""Takes how much more is done."""

_log = logging.getLogger(__name__)


class _Wait:
    """One thing that is waited for."""

    def __init__(self, what: str, total: float | None, unit: str) -> None:
        self.what = what
        self.total = total
        self.unit = unit
        self.done = 0.0
        self.begun = time.monotonic()
        self.thread = threading.get_ident()
        self.said = self.begun  # when its last log line was written

    def advance(self, more: float) -> None:
        self.done += more

    def line(self) -> str:
        """What it is and how far, in one line of plain text."""
        return f"{self.what}: {self.amount()}, {int(time.monotonic() - self.begun)} s"

    def amount(self) -> str:
        if self.total is None:
            return _shown(self.done, self.unit) if self.done else "waiting"
        of = f"{_shown(self.done, self.unit)} of {_shown(self.total, self.unit)}, " if self.unit else ""
        fraction = min(1.0, self.done / self.total if self.total else 1.0)
        return f"{of}{fraction:.0%}{self._left(fraction)}"

    def _left(self, fraction: float) -> str:
        """The time that is left at the mean speed, once that says something."""
        elapsed = time.monotonic() - self.begun
        if elapsed < _ESTIMATE_AFTER_S or not _LEAST_FRACTION <= fraction < 1.0:
            return ""
        minutes, seconds = divmod(round(elapsed * (1.0 - fraction) / fraction), 60)
        return f", {minutes}:{seconds:02} left"


class _Display:
    """All waits of the process, and the thread that shows them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waits: list[_Wait] = []
        self._thread: threading.Thread | None = None
        self._is_over = threading.Event()
        self.has_panel = False

    def add(self, wait: _Wait) -> None:
        with self._lock:
            self._waits.append(wait)
            if self._thread is None:
                self._is_over = threading.Event()
                self._thread = threading.Thread(target=self._show, args=(self._is_over,), name="waiting", daemon=True)
                self._thread.start()

    def remove(self, wait: _Wait) -> None:
        """Takes a wait away; when it is the last one, comes back when its bar has left the screen."""
        with self._lock:
            self._waits.remove(wait)
            ended = None
            if not self._waits:
                ended, self._thread = self._thread, None
                self._is_over.set()
        if ended is not None:
            ended.join()

    def shown(self) -> list[_Wait]:
        """The innermost wait of each thread, of those that have lasted long enough."""
        with self._lock:
            innermost = {wait.thread: wait for wait in self._waits}
        now = time.monotonic()
        return [wait for wait in innermost.values() if now - wait.begun >= SHOWN_AFTER_S]

    def _show(self, is_over: threading.Event) -> None:
        bars: _Bars | None = None
        try:
            while not is_over.wait(_DRAW_S):
                waits = self.shown()
                if self.has_panel:
                    if bars:
                        bars.close()
                    bars = None
                elif not sys.stderr.isatty():
                    _say_lines(waits)
                elif waits or bars:
                    bars = bars or _Bars()
                    bars.draw(waits)
        finally:
            if bars:
                bars.close()


class _Bars:
    """The bars on a terminal, one for each wait that is shown."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self._progress: Progress = Progress(
            SpinnerColumn("line" if console.options.ascii_only else "dots"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[amount]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            auto_refresh=False,
            redirect_stdout=False,  # the answer of a command may be on its way there
        )
        self._tasks: dict[_Wait, TaskID] = {}
        self._progress.start()
        self._logs = move_log_streams()

    def draw(self, waits: list[_Wait]) -> None:
        for gone in self._tasks.keys() - set(waits):
            self._progress.remove_task(self._tasks.pop(gone))
        for wait in waits:
            if wait not in self._tasks:
                task = self._progress.add_task(_shortened(wait.what), total=wait.total, amount="")
                self._progress.tasks[-1].start_time = self._progress.get_time() - (time.monotonic() - wait.begun)
                self._tasks[wait] = task
            amount = "" if wait.amount() == "waiting" else wait.amount()
            self._progress.update(self._tasks[wait], completed=wait.done, amount=amount)
        self._progress.refresh()

    def close(self) -> None:
        """Leaves the screen as it was."""
        restore_log_streams(self._logs)
        self._progress.stop()


_display = _Display()


@contextmanager
def waiting(what: str, total: float | None = None, *, unit: str = "") -> Iterator[Advance]:
    """Shows, from the second second on, that and how far something is waited for.

    Args:
        what: it is, for the user, beginning with a verb: fetching s3://...
        total: how much there is to do; None: nobody knows.
        unit: of total: B for bytes; none: only the fraction is shown.

    Yields:
        Takes how much more is done.
    """
    wait = _Wait(what, total, unit)
    _display.add(wait)
    try:
        yield wait.advance
    finally:
        _display.remove(wait)


@contextmanager
def panel_shows_waits() -> Iterator[None]:
    """For as long as a panel has the terminal no bar is drawn; the panel shows what `current_line` gives."""
    _display.has_panel = True
    try:
        yield
    finally:
        _display.has_panel = False


def current_line() -> str:
    """What has been waited for longer than two seconds, in one line; empty where there is nothing."""
    return "; ".join(wait.line() for wait in _display.shown())


LogStreams = list[tuple["logging.StreamHandler[Any]", Any]]


def move_log_streams() -> LogStreams:
    """Lets log lines go above what rich draws, whose stream stands in for standard output or error from now on.

    Returns:
        What `restore_log_streams` takes.
    """
    moved: LogStreams = []
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            for stream in (sys.stdout, sys.stderr):
                is_replaced = hasattr(stream, "rich_proxied_file") and handler.stream is not stream
                if is_replaced and _descriptor(handler.stream) == _descriptor(stream):
                    moved.append((handler, handler.setStream(stream)))
                    break
    return moved


def restore_log_streams(moved: LogStreams) -> None:
    """Gives the handlers their streams back."""
    for handler, stream in moved:
        handler.setStream(stream)


def _descriptor(stream: Any) -> int:
    """Where a stream ends up: the same for one and for whatever stands in for it."""
    try:
        return int(stream.fileno())
    except (OSError, AttributeError):  # in memory
        return id(getattr(stream, "rich_proxied_file", stream))


def _say_lines(waits: list[_Wait]) -> None:
    now = time.monotonic()
    for wait in waits:
        if now - wait.said >= LINE_INTERVAL_S:
            wait.said = now
            _log.info("%s", wait.line())


def _shown(amount: float, unit: str) -> str:
    if unit != "B":
        return f"{amount:,.0f}{f' {unit}' if unit else ''}"
    power = 0
    while amount >= 1000 and power + 1 < len(_SIZES):
        amount, power = amount / 1000, power + 1
    return f"{amount:.1f} {_SIZES[power]}" if power else f"{amount:.0f} B"


def _shortened(text: str) -> str:
    """At most _MAX_TEXT columns; of a long one the ends, since a URI ends with what tells it from others."""
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT // 2 - 2]}...{text[-_MAX_TEXT // 2 :]}"
