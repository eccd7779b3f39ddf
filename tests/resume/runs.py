"""The run that is drilled: its command, given in a fork of this process, in peace or with a fault put in.

A fork costs tenths of a second where a new process takes seconds to import everything. This process has one thread and
imports only, so a fork of it is as good as new.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401  (here, and not in every child, as what follows)

import dual_policy_plugin.train  # noqa: F401
from dual_policy_plugin import files
from dual_policy_plugin.cli import main as command
from tests.resume.edge import Call, Edge
from tests.resume.reading import Peace, digest
from tests.resume.witness import Page, Witness

ROOT = Path(__file__).resolve().parents[2]
NUM_ITERATIONS = 24
DUAL = "trainer.dual_policy"
WORDS = (
    "train", "+dual_policy=self_play", f"{DUAL}.self_play.window=2", f"{DUAL}.self_play.snapshot_interval=4",
    f"{DUAL}.pool=[builtin://arena/weak,builtin://arena/random]", f"{DUAL}.matchmaking=pfsp", "device=cpu", "wandb=off",
    "agent.hidden_size=32", "env.num_envs=8", "env.episode_steps=12", "evals.episodes=8", "trainer.horizon=8",
    "trainer.threads=1", "trainer.num_minibatches=2", "trainer.checkpoint_interval=2", "trainer.keep_checkpoints=1",
    "trainer.state_interval_s=0", f"trainer.total_timesteps={NUM_ITERATIONS * 8 * 8 * 4}", "run=r", "report=false",
)  # fmt: skip
SHORT = (*WORDS, f"trainer.total_timesteps={8 * 8 * 8 * 4}")
"""A third of it: two snapshots join the pool, and retention removes checkpoints."""
RUN = Path("train_dir/r")
TIMEOUT_S = 120.0


def start(
    work: Path,
    log: Path,
    page: Page,
    words: Sequence[str] = WORDS,
    *,
    die_at: tuple[int, int] | None = None,
    sabotage: str = "",
) -> int:
    """Forks a process that gives the command in `work`; returns its pid.

    Args:
        work: the folder that it works in.
        log: where its output is added.
        page: where it says where it is.
        words: of the command.
        die_at: as Witness has it.
        sabotage: a key of SABOTAGES, or "".
    """

    def work_on() -> int:
        witness = Witness(page=page, die_at=die_at)
        if sabotage:
            SABOTAGES[sabotage]()
        with Edge(work, witness.before, witness.after):
            return command(list(words))

    return _fork(work, log, work_on)


def _fork(work: Path, log: Path, task: Callable[[], int]) -> int:
    """Forks a process that does `task` in `work`, its output added to `log`; returns its pid."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        _enter(work, log)
        code = task()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _enter(work: Path, log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.chdir(work)


def await_end(child: int, log: Path) -> int:
    """The exit code of a child, less than 0 for a signal.

    Raises:
        RuntimeError: it failed by itself.
    """
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the run ended with {code}: {log.read_text()[-2000:]}")
    return code


def _publish_plainly(path: Path, data: bytes) -> None:
    """What `files.publish` must not be: the file is emptied and written again, as `open(path, "wb")` does it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for i in range(0, len(data), 4096):
        os.write(descriptor, data[i : i + 4096])
    os.close(descriptor)


def _append_late() -> None:
    """Has lines wait in memory for two more, as a buffered file has them: a state may be ahead of its metrics."""
    waiting: list[tuple[Path, Any]] = []
    append = files.append_line

    def late(path: Path, record: Any) -> None:
        waiting.append((path, record))
        if len(waiting) == 6:  # metrics and timing
            for one in waiting:
                append(*one)
            waiting.clear()

    files.append_line = late


def _write_plainly() -> None:
    files.publish = _publish_plainly


SABOTAGES: dict[str, Callable[[], None]] = {"plain": _write_plainly, "late": _append_late}
"""Faults that the drill must find; they are put into the children only."""


def run_in_peace(folder: Path, words: Sequence[str] = WORDS, *, sabotage: str = "") -> Peace:
    """Runs the command once in an empty folder and notes each version of each file.

    Raises:
        RuntimeError: it failed.
    """
    work, log, notes = folder / "peace", folder / "peace.log", folder / "peace.json"
    work.mkdir(parents=True)
    began = time.perf_counter()

    def work_on() -> int:
        if sabotage:
            SABOTAGES[sabotage]()
        noted = note_run(work, words, began)
        notes.write_text(json.dumps(noted))
        return 0

    if await_end(_fork(work, log, work_on), log):
        raise RuntimeError(f"the run in peace was killed: {log.read_text()[-2000:]}")
    return peace_of(work, json.loads(notes.read_bytes()))


def note_run(work: Path, words: Sequence[str], began: float) -> dict[str, Any]:
    """Gives the command in `work`, where this process is, and notes what it saves.

    Args:
        work: this process's folder.
        words: of the command.
        began: `time.perf_counter()` of its start.

    Returns:
        Plain numbers and names, for `peace_of`.
    """
    versions: dict[str, list[str]] = {}
    starts: list[float] = []
    saves: list[tuple[str, int]] = []
    calls: list[tuple[str, str, bool]] = []

    def note(call: Call) -> None:
        starts.append(time.perf_counter() - began)
        saves.append((call.kind, witness.num_calls))
        if call.path.exists():
            versions.setdefault(str(call.path.relative_to(work / RUN)), []).append(digest(call.path.read_bytes()))

    witness = Witness(page=Page(), on_saved=note)

    def before(call: Call) -> None:
        calls.append((call.name, call.kind, call.is_temporary))
        witness.before(call)

    with Edge(work, before, witness.after):
        code = command(list(words))
    if code:
        raise RuntimeError(f"the run in peace ended with {code}")
    return {"versions": versions, "saves": saves, "calls": calls, "lengths_s": witness.lengths_s, "start_s": starts[0]}


def peace_of(work: Path, noted: dict[str, Any]) -> Peace:
    """What `note_run` noted."""
    return Peace(
        run=work / RUN,
        versions={name: set(digests) for name, digests in noted["versions"].items()},
        metrics=files.read_lines(work / RUN / "metrics.jsonl"),
        calls=[(name, kind, is_temporary) for name, kind, is_temporary in noted["calls"]],
        saves=[(kind, num_calls) for kind, num_calls in noted["saves"]],
        length_s={kind: statistics.median(times) for kind, times in noted["lengths_s"].items()},
        start_s=noted["start_s"],
    )


def run_fresh(folder: Path) -> Path:
    """Runs the command as a process of its own, as a user does; gives the run directory."""
    folder.mkdir()
    subprocess.run(
        [sys.executable, "-m", "dual_policy_plugin", *WORDS],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True,
        check=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    return folder / RUN
