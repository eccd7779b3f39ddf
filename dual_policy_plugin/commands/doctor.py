"""`dual-policy doctor`: what of this machine works, and what to do about the rest.

Each probe, of `doctor_probes.py` and `doctor_services.py`, runs in a process of its own, a few at a time, and is ended
when it does not answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from dual_policy_plugin.commands.doctor_findings import WRONG, Finding
from dual_policy_plugin.commands.doctor_probes import NEEDED, PROBES, TITLES
from dual_policy_plugin.commands.words import make_parser, parse_words
from dual_policy_plugin.errors import RunError
from dual_policy_plugin.waiting import waiting

PROBE_S = 5.0
ALL_S = 9.0
_AT_ONCE = 4
_ORDER = ("torch", "sky", "wandb", "s3", "slurm", "python", "machine")
"""The slow ones first."""
_SIGNS = {"ok": "ok     ", "missing": "missing", "wrong": "wrong  "}
_STYLES = {"ok": "green", "missing": "yellow", "wrong": "red"}


def run(words: list[str]) -> int:
    """Prints a line for each finding; gives 0 where training can work.

    Raises:
        RunError: something is broken that training needs.
    """
    parser = make_parser(
        "dual-policy doctor",
        "[--train-dir DIR] [--json]",
        "Looks at Python, torch, CUDA, CPU, memory, disks, W&B, S3, Slurm and SkyPilot, and says what to do about "
        "each. Nothing is changed, no key is shown, and only what is configured is asked over the network.",
        note="ok: works. missing: not here, or not set up; needed only if you want it. wrong: here, and broken. "
        "Exit code 0, or 2 where training cannot work.",
        examples=("dual-policy doctor", "dual-policy doctor --json"),
    )
    parser.add_argument("--train-dir", metavar="DIR", type=Path, default=Path("train_dir"), help="(train_dir)")
    parser.add_argument("--json", action="store_true", help="as a list of objects")
    args = parse_words(parser, words)
    found = examine(args.train_dir, _ORDER)
    if args.json:
        print(json.dumps([asdict(one) for one in found], indent=2))
    else:
        _print(found)
    broken = [one for one in found if one.is_needed and one.state != "ok"]
    if broken:
        raise RunError(f"training cannot work here: {'; '.join(f'{one.what}: {one.fact}' for one in broken)}")
    return 0


def examine(train_dir: Path, probes: Sequence[str]) -> list[Finding]:
    """The findings of all probes, in the order of PROBES, in less than ten seconds.

    Args:
        train_dir: where runs are to stand.
        probes: which, in the order of their start.
    """
    end = time.monotonic() + ALL_S

    def ask(name: str) -> list[Finding]:
        left = end - time.monotonic()  # for what training needs all of it: torch may lie on a slow disk
        found = _ask(name, train_dir, left if name in NEEDED else min(PROBE_S, left))
        advance(1)
        return found

    with waiting("checking this machine", len(probes)) as advance, ThreadPoolExecutor(_AT_ONCE) as pool:
        found = dict(zip(probes, pool.map(ask, probes), strict=True))
    return [one for name in PROBES if name in found for one in found[name]]


def _ask(name: str, train_dir: Path, timeout_s: float) -> list[Finding]:
    """The findings of one probe; one that says so where it hangs or dies."""
    words = [sys.executable, "-P", "-m", "dual_policy_plugin.commands.doctor_probes", name, str(train_dir)]
    # it imports what this process would, and nothing that stands in the working directory
    paths = os.pathsep.join(path for path in sys.path if path)
    begun = time.monotonic()
    with tempfile.TemporaryFile() as answer:
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=answer, stderr=subprocess.DEVNULL, process_group=0,
            env=os.environ | {"PYTHONPATH": paths},
        )  # fmt: skip
        try:
            child.wait(max(0.1, timeout_s))
        except subprocess.TimeoutExpired:
            return [_broken(name, f"no answer in {time.monotonic() - begun:.0f} s", is_needed=False)]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with all that it has started
            child.wait()
        answer.seek(0)
        try:
            return [Finding(**one) for one in json.loads(answer.read())]
        except (ValueError, TypeError):
            return [_broken(name, f"its check ended with code {child.returncode}", is_needed=name in NEEDED)]


def _broken(name: str, fact: str, *, is_needed: bool) -> Finding:
    mend = "ask again when the machine and its network are less busy" if "no answer" in fact else "install it again"
    return Finding(what=TITLES[name], state=WRONG, fact=fact, mend=mend, is_needed=is_needed)


def _print(found: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    for is_fixed in (True, True, False):
        table.add_column(no_wrap=is_fixed, overflow="fold")
    for one in found:
        table.add_row(Text(_SIGNS[one.state], style=_STYLES[one.state]), one.what, Text(one.fact))
        if one.mend:
            table.add_row("", "", Text(f"-> {one.mend}", style="" if one.state == "ok" else "bold"))
    Console(highlight=False).print(table)
