"""Signs of life for `dual-policy watch`, which ends a command that gives none.

The variable DUAL_POLICY_HEARTBEAT names a file, set by whoever watches; without it nothing is written. Training and
evaluation touch the file as they go on; its text is the run's age in seconds, over all restarts. Beside it, in
`<file>.codes`, stand the exit codes of the ranks, which torchrun keeps to itself. While rank 0 evaluates the others
wait, maybe watched on another machine; `ranks/watch.py` hands its signs on to them.
"""

from __future__ import annotations

import math
import os
import time

from dual_policy_plugin.errors import EXIT_AGAIN, RunError

VARIABLE = "DUAL_POLICY_HEARTBEAT"
_EVERY_S = 1.0
_WIDTH = 20  # characters of the age, so that a reader never sees a part of it

_last = -math.inf  # when this process has touched the file
_told = -math.inf  # when it has last told its age


def beat(elapsed_s: float | None = None) -> None:
    """Touches the heartbeat file, at most once a second of either kind; nothing is written where nobody watches.

    Args:
        elapsed_s: seconds that the run has taken over all its restarts; None: not known here.

    Raises:
        RunError: the file cannot be written.
    """
    global _last, _told
    now = time.monotonic()
    if now - (_last if elapsed_s is None else _told) < _EVERY_S:  # the age is told though others give signs of life
        return
    _last, _told = now, _told if elapsed_s is None else now
    path = os.environ.get(VARIABLE)
    if not path:
        return
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            if elapsed_s is not None:
                os.write(file, f"{elapsed_s:{_WIDTH}.3f}".encode())
            os.utime(file)
        finally:
            os.close(file)
    except OSError as error:
        raise RunError(f"{VARIABLE}={path} cannot be touched: {error.strerror}; name a file that can") from error


def is_watched() -> bool:
    """Whether somebody watches, who may begin this process again."""
    return bool(os.environ.get(VARIABLE))


def last_beat() -> float:
    """When this process last gave a sign of life, by time.monotonic, watched or not; -inf: never."""
    return _last


def read_age(path: str) -> float | None:
    """Seconds of the run over all its restarts, as it last said; None before it did."""
    with open(path, "rb") as file:
        text = file.read()
    return float(text) if text else None


def note_exit(exit_code: int) -> None:
    """Leaves this process's exit code to whoever watches."""
    path = os.environ.get(VARIABLE)
    if path:
        with open(f"{path}.codes", "a") as file:
            file.write(f"{exit_code}\n")


def noted_exit(path: str) -> int | None:
    """The exit code that the ranks' codes come to: a mistake or a defect before what can be tried again."""
    try:
        with open(f"{path}.codes") as file:
            codes = {int(line) for line in file}
    except FileNotFoundError:
        return None
    return min(codes - {EXIT_AGAIN}, default=EXIT_AGAIN if codes else None)
