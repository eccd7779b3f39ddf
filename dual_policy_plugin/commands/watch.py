"""`dual-policy watch -- COMMAND...`: runs a command that must show signs of life and may take so long.

Stands on a node between a launcher and `dual-policy train` (or torchrun). Its exit code is the command's, 128 + n where
a signal n ended it; 75 where the command hung, which launchers start again; 7 where the time is over, which they do
not.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dual_policy_plugin.commands.words import make_parser, parse_words
from dual_policy_plugin.errors import EXIT_AGAIN, EXIT_LIMIT, ConfigError
from dual_policy_plugin.heartbeat import VARIABLE, noted_exit, read_age

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_LOOK_S = 0.25
_AMOUNTS = (
    ("--heartbeat-timeout-seconds", 0.0, "N", "between two signs of life; 0: any time"),
    ("--startup-seconds", 900.0, "N", "in which a run that has finished no iteration need not give any"),
    ("--max-runtime-hours", 0.0, "H", "over all restarts; 0: any time"),
    ("--grace-seconds", 120.0, "N", "between SIGTERM and SIGKILL"),
)
"""Name, default, unit and meaning."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Limits:
    """What a command may not exceed, in seconds; inf: no limit."""

    heartbeat_s: float
    """Between two signs of life."""
    startup_s: float
    """In which a run need not show any, until it has finished an iteration."""
    runtime_s: float
    """Over all restarts."""
    grace_s: float
    """Between SIGTERM and SIGKILL."""


def run(words: list[str]) -> int:
    """Runs the command to its end, or to a limit, and returns the exit code."""
    args, command = _parse(words)
    limits = Limits(
        heartbeat_s=args.heartbeat_timeout_seconds or math.inf,
        startup_s=max(args.startup_seconds, args.heartbeat_timeout_seconds),
        runtime_s=args.max_runtime_hours * 3600 or math.inf,
        grace_s=args.grace_seconds,
    )
    command += _words_of(args.words_of)
    with tempfile.TemporaryDirectory(prefix="dual-policy-watch-") as folder:
        heartbeat = Path(folder) / "heartbeat"
        heartbeat.touch()
        with _started(command, heartbeat) as child:
            return _watch(child, heartbeat, limits)


def _watch(child: subprocess.Popen[bytes], heartbeat: Path, limits: Limits) -> int:
    """Waits for the command's end, which it brings about where a limit is reached."""
    start = alive = time.monotonic()
    touched = heartbeat.stat().st_mtime_ns
    age_s: float | None = None  # of the run, over all restarts; a run that has one has finished an iteration
    earlier_s = 0.0  # of it, before this start
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_LOOK_S)
        now = time.monotonic()
        if heartbeat.stat().st_mtime_ns != touched:
            touched, alive, age_s = heartbeat.stat().st_mtime_ns, now, read_age(str(heartbeat))
            earlier_s = max(earlier_s, (age_s or 0.0) - (now - start))
        runtime_s, silent_s = earlier_s + now - start, now - alive
        if child.returncode is not None:
            code = _exit_code(child, heartbeat)
            # what ends a rank on one node ends those on the others, whose clocks may be a little behind
            return EXIT_LIMIT if code == EXIT_AGAIN and runtime_s > limits.runtime_s - limits.grace_s else code
        if runtime_s >= limits.runtime_s:
            _say(
                f"--max-runtime-hours={limits.runtime_s / 3600:g} is over; a run has been told to save and goes on "
                "with the same command and more hours"
            )
            return 0 if _end(child, limits.grace_s) == 0 else EXIT_LIMIT
        is_starting = age_s is None and now - start < limits.startup_s
        if silent_s > limits.heartbeat_s and not is_starting:
            _say(f"no sign of life for {silent_s:.0f} s; the command is ended and may be started again")
            _end(child, limits.grace_s)
            return EXIT_AGAIN


def _exit_code(child: subprocess.Popen[bytes], heartbeat: Path) -> int:
    """The exit code as shells give it; of several ranks the one that says most."""
    code = child.returncode if child.returncode >= 0 else 128 - child.returncode
    noted = noted_exit(str(heartbeat))
    return noted if code == 1 and noted is not None else code  # torchrun's code is 1 whatever a rank's was


def _end(child: subprocess.Popen[bytes], grace_s: float) -> int:
    """Ends the command, and then all that it has started; gives what `Popen.returncode` says."""
    family = _descendants(child.pid)
    with contextlib.suppress(ProcessLookupError):
        child.terminate()
    try:
        child.wait(grace_s)
    except subprocess.TimeoutExpired:
        _say(f"it has not ended {grace_s:g} s after SIGTERM; it is killed")
        family |= _descendants(child.pid)
        child.kill()
    for pid, started in family.items():  # torchrun's ranks have sessions of their own and outlive it
        if _start_time(pid) == started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return child.wait()


def _descendants(pid: int) -> dict[int, str]:
    """The processes below `pid`, each with its start time, which tells it from a later one of the same number."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(one) for task in tasks for one in (task / "children").read_text().split()]
    except OSError:  # it has ended
        return {}
    below = {child: _start_time(child) for child in children}
    for child in children:
        below |= _descendants(child)
    return below


def _start_time(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


@contextlib.contextmanager
def _started(command: list[str], heartbeat: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The running command in a process group of its own; signals that come to us go on to it, each once."""
    waiting: list[int] = []
    before = {signum: signal.signal(signum, lambda number, _: waiting.append(number)) for signum in FORWARDED}
    try:
        child = subprocess.Popen(command, env=os.environ | {VARIABLE: str(heartbeat)}, process_group=0)
    except OSError as error:
        raise ConfigError(f"{command[0]} cannot be run: {error.strerror}; see PATH and the words behind --") from error
    else:
        for signum in FORWARDED:
            signal.signal(signum, lambda number, _: child.send_signal(number))
        for number in waiting:
            child.send_signal(number)
        try:
            yield child
        finally:
            if child.poll() is None:
                _end(child, 0.0)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _words_of(variable: str | None) -> list[str]:
    """The words in a variable's text, which a shell's quotes hold together; none where it is empty."""
    text = os.environ.get(variable, "") if variable else ""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{variable}={text} has no words: {error}; close every quote".replace("\n", " ")) from error


def _say(line: str) -> None:
    print(f"watch: {line}", file=sys.stderr, flush=True)


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the command, whose words are not looked at."""
    parser = make_parser(
        "dual-policy watch",
        "[options] -- COMMAND...",
        "Runs COMMAND, ends it when it gives no sign of life or has taken too long, and hands signals on.",
        note="Exit codes: COMMAND's own, 128 + n where signal n ended it; 75 it hung, to be started again; 7 the "
        "time was over, not to be.",
        examples=(
            "dual-policy watch --max-runtime-hours 2 -- dual-policy train run=first",
            "dual-policy watch --heartbeat-timeout-seconds 600 -- dual-policy demo",
        ),
    )
    for name, default, metavar, text in _AMOUNTS:
        parser.add_argument(name, type=_amount, default=default, metavar=metavar, help=f"{text} ({default:g})")
    parser.add_argument("--words-of", metavar="VARIABLE", help="whose text ends COMMAND, split as a shell would")
    at = words.index("--") if "--" in words else len(words)
    args, command = parse_words(parser, words[:at]), words[at + 1 :]
    if not command:
        raise ConfigError("watch has no command; write it behind --, for example -- dual-policy train run=x")
    return args, command


def _amount(word: str) -> float:
    try:
        amount = float(word)
    except ValueError:
        amount = math.nan
    if not 0 <= amount < math.inf:
        raise argparse.ArgumentTypeError(f"{word!a} is no number of 0 or more")
    return amount
