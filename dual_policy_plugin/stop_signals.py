"""Signals that ask a run to stop: noted at once, answered between two iterations, when the run's state is saved.

`train.py` holds a StopSignals around its loop. What a signal means is left to the handler that was there before: a
launcher's requeue, Python's KeyboardInterrupt, the default action of the operating system.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from dual_policy_plugin.ranks.distributed import Ranks, sum_over_ranks

SIGNALS = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
"""In the order in which they are answered: a scheduler's warning, whose handler may requeue, before its SIGTERM."""
_AGAIN_S = 1.0
"""A signal of the same kind within this time is a copy of the first (a process group's, a launcher's), later a new
one."""
_log = logging.getLogger(__name__)


class StopSignals:
    """The signals of one run. Entering it does nothing; it listens between `listen` and `release`.

    Only the main thread can have handlers: in another one it never hears anything. A signal that was ignored before
    stays ignored, and one whose handler Python does not know stays with that.
    """

    def __init__(self, grace_s: float) -> None:
        """Args: grace_s: seconds that a stop may take without a warning."""
        self._grace_s = grace_s
        self._since: dict[signal.Signals, float] = {}  # when each that waits for an answer first came
        self._before: dict[signal.Signals, Any] = {}  # the handlers that ours replaced
        self._default: signal.Signals | None = None  # whose default action is to follow when everything is closed

    def listen(self) -> None:
        """Puts our handlers in the place of those that there are."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in SIGNALS:
            if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                self._before[signum] = signal.signal(signum, self._note)

    def release(self) -> None:
        """Puts the old handlers back, and has them answer what has come since the last iteration."""
        self._put_back()
        for signum in SIGNALS:
            if self._since.pop(signum, None) is not None:
                self._hand_on(signum)

    def asked(self, ranks: Ranks, device: torch.device, *, is_due: bool = False) -> tuple[list[signal.Signals], bool]:
        """The signals that any rank was sent, in the order of SIGNALS, and whether any rank says `is_due`.

        All ranks must call this together; what they say travels in one reduction.
        """
        said = [*(signum in self._since for signum in SIGNALS), is_due]
        if ranks.world_size > 1:
            said = [count > 0 for count in sum_over_ranks(torch.tensor(said, device=device).int(), ranks).tolist()]
        return [signum for signum, is_asked in zip(SIGNALS, said, strict=False) if is_asked], said[-1]

    def answer(self, asked: list[signal.Signals], iteration: int, ranks: Ranks, device: torch.device) -> None:
        """Has the old handlers answer, on every rank as if each had been sent the signals; returns if they do.

        A default action follows when the run has been closed. Where a handler ends the run on one rank, it ends on all.

        Args:
            asked: as `asked` gave it.
            iteration: after which the state has been saved.
            ranks: who we are; all must call this together.
            device: where the process group sends from.

        Raises:
            BaseException: whatever a handler raises; SystemExit for a default action.
        """
        names = ", ".join(signum.name for signum in asked)
        _log.info("%s: saved after iteration %d", names, iteration)
        self._check_grace(names)
        sum_over_ranks(torch.zeros((), device=device), ranks).item()  # none leaves before the first one has saved
        self._put_back()
        leaving: BaseException | None = None
        try:
            for signum in asked:
                self._since.pop(signum, None)
                self._hand_on(signum)
        except BaseException as error:
            leaving = error
        num_leaving = sum_over_ranks(torch.tensor(float(leaving is not None), device=device), ranks).item()
        if leaving is not None:
            raise leaving
        if num_leaving:
            raise SystemExit(128 + signum)
        _log.info("%s: its handler lets the run go on", names)
        self.listen()

    def left_s(self) -> float:
        """Seconds that the stop may still take, without a tenth of them for its end."""
        now = time.monotonic()
        return max(0.0, 0.9 * self._grace_s - (now - min(self._since.values(), default=now)))

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Our handler. An impatient second signal goes to the old one at once, and nothing more is saved."""
        signum, now = signal.Signals(number), time.monotonic()
        if now - self._since.setdefault(signum, now) <= _AGAIN_S:
            return
        signal.signal(signum, self._before[signum])
        signal.raise_signal(signum)
        signal.signal(signum, self._note)  # the old one lets the run go on
        self._since[signum] = now

    def _hand_on(self, signum: signal.Signals) -> None:
        """Calls the old handler, which is back in its place; a default action only notes and leaves."""
        if signal.getsignal(signum) is signal.SIG_DFL:
            self._default = signum
            raise SystemExit(128 + signum)
        signal.raise_signal(signum)

    def _put_back(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _check_grace(self, names: str) -> None:
        took_s = time.monotonic() - min(self._since.values(), default=time.monotonic())
        if took_s > self._grace_s:
            _log.warning(
                "%s: the iteration and its save took %.1f s, trainer.grace_s=%g; lower env.num_envs or "
                "trainer.horizon, or allow more time before the machine is taken away",
                names,
                took_s,
                self._grace_s,
            )

    def __enter__(self) -> Self:
        """Of use as the outermost context of a run, see `__exit__`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Puts the old handlers back; where a signal's default action is due, it follows here.

        The process then dies by the signal, as whoever sent it expects. The first process of a container, which the
        system spares, leaves with the exit code that shells give for it.
        """
        self._put_back()
        if self._default is not None and isinstance(error, SystemExit):
            sys.stdout.flush()
            sys.stderr.flush()
            signal.raise_signal(self._default)
