"""A curriculum sweep is killed again and again, and ends as one that never was.

    python -m tests.curriculum.drill [--kills 20] [--seed 1] [--folder DIR]

A toy sweep of seconds runs once in peace, which gives its phases (start, rating, each job's training, each gate) and
how long they take. Then it runs with SIGKILL to its process group at moments drawn from that time, sorted, and the same
command is given again after each. In the end the state file is the same but for times, every checkpoint has the same
bits, and no job was run to its end twice. There are two witnesses of that: result.json, which a run replaces as its
last act, keeps its inode and time from one kill to the next; and the line that a run prints right after it stands in
the output of all starts together at most once for each job.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LADDER = "[builtin://arena/forager,builtin://arena/random]"  # not in the order of strength
WORDS = (
    "hydra/sweeper=dual_policy_curriculum", f"hydra.sweeper.ladder={LADDER}", "hydra.sweeper.order=weakest_first",
    "hydra.sweeper.on_fail=advance", "hydra.sweeper.max_attempts=2", "hydra.sweeper.promote_at=0.3",
    "hydra.sweeper.episodes=192", "hydra.sweeper.rating_episodes=64", "-m", "seed=1,2", "run=toy", "device=cpu",
    "env.num_envs=8", "env.episode_steps=32", "trainer.horizon=8", "trainer.num_minibatches=2", "trainer.threads=1",
    "trainer.precision=fp32", "agent.hidden_size=16", "trainer.total_timesteps=8000", "trainer.checkpoint_interval=8",
    "evals.episodes=16", "report=false",
)  # fmt: skip
_POLL_S = 0.005
_TIMEOUT_S = 240.0
Phases = list[tuple[str, float]]


@dataclass(kw_only=True)
class Drill:
    """What a drill found."""

    hits: list[str] = field(default_factory=list)
    """The phase that each kill hit, and how far into it."""
    faults: list[str] = field(default_factory=list)
    """What was not as in the sweep that ran in peace; empty: all is well."""
    num_jobs: int = 0


def drill(folder: Path, *, kills: int, seed: int) -> Drill:
    """Runs the toy sweep in peace, then under kills, and compares.

    Args:
        folder: an empty one, for both sweeps and the output of every start.
        kills: how often the sweep is killed.
        seed: of the moments.
    """
    found, work, logs = Drill(), folder / "work", folder / "logs"
    logs.mkdir()
    work.mkdir()
    phases = _run_in_peace(work, logs / "peace.log")
    work.rename(folder / "peace")  # the killed sweep runs at the same path, since paths stand in its files
    work.mkdir()
    seen: dict[Path, tuple[int, int]] = {}
    for number, (phase, offset_s) in enumerate(draw_moments(phases, kills, random.Random(seed)), 1):
        hit = _run_until(work, logs / f"start_{number:02d}.log", phases, phase, offset_s)
        found.hits.append(hit)
        print(f"kill {number} of {kills}: aimed {offset_s:.2f} s into {phase}, hit {hit}", flush=True)
        found.faults += changed_results(work, seen)
    _run_in_peace(work, logs / "last.log")
    found.faults += changed_results(work, seen)
    found.faults += ended_twice(logs)
    found.faults += differences(folder / "peace" / "train_dir/toy", work / "train_dir/toy")
    found.num_jobs = len(seen)
    return found


def phase_of(sweep: Path, pid: int) -> str:
    """What the sweep's process is at, told from its files; locks say which process took a folder last."""
    if _holder(sweep) != pid:
        return "start"
    try:
        state = json.loads((sweep / "curriculum.json").read_bytes())
    except FileNotFoundError:
        return "start"
    if state["status"] != "running":
        return "end"
    if any(rung["rating"] is None for rung in state["rungs"]):
        return "rate"
    now = [job for job in state["jobs"] if (job["stage"], job["attempt"]) == (state["stage"], state["attempt"])]
    open_jobs = [job["num"] for job in now if not (sweep / str(job["num"]) / "result.json").exists()]
    if open_jobs:
        return f"train {open_jobs[0]}" if _holder(sweep / str(open_jobs[0])) == pid else f"launch {open_jobs[0]}"
    return f"gate {state['stage']}.{state['attempt']}" if now else f"plan {state['stage']}.{state['attempt']}"


def _holder(run: Path) -> int | None:
    try:
        return int(json.loads((run / "run.lock").read_bytes())["pid"])
    except (FileNotFoundError, ValueError):
        return None


def _start(work: Path, log: Path) -> subprocess.Popen[bytes]:
    environ = {name: value for name, value in os.environ.items() if name not in ("HYDRA_FULL_ERROR", "LOG_LEVEL")}
    environ |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "dual_policy_plugin", "train", *WORDS],
            cwd=work,
            env=environ,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _run_in_peace(work: Path, log: Path) -> Phases:
    """Runs the sweep to its end; gives the phases that were seen, in their order, with the seconds each took.

    Raises:
        RuntimeError: it did not end well; the message holds the end of its output.
    """
    process, seen, began = _start(work, log), {}, time.monotonic()
    last = began
    while process.poll() is None:
        phase, now = phase_of(work / "train_dir/toy", process.pid), time.monotonic()
        seen[phase] = seen.get(phase, 0.0) + now - last
        last = now
        if now - began > _TIMEOUT_S:
            _kill(process)
        time.sleep(_POLL_S)
    if process.returncode != 0:
        raise RuntimeError(f"the sweep ended with {process.returncode}: {log.read_text()[-2000:]}")
    return [(phase, seconds) for phase, seconds in seen.items() if phase != "end"]


def draw_moments(phases: Phases, kills: int, rng: random.Random) -> Phases:
    """Sorted moments as (phase, seconds into it): one in a training and one in a gate, the rest anywhere.

    Those two are early in their phases, since a machine that is less busy by then would be through sooner.
    """

    def draw(kind: str, last: float) -> tuple[int, float]:
        numbers = [i for i, (phase, _) in enumerate(phases) if phase.startswith(kind)]
        number = rng.choices(numbers, weights=[phases[i][1] for i in numbers])[0]
        return number, rng.uniform(0.0, last) * phases[number][1]

    aims = [("train", 0.3), ("gate", 0.3)] + [("", 0.95)] * (kills - 2)
    return [(phases[number][0], offset_s) for number, offset_s in sorted(draw(*aim) for aim in aims[:kills])]


def _run_until(work: Path, log: Path, phases: Phases, aim: str, offset_s: float) -> str:
    """Starts the sweep, kills it `offset_s` into the phase `aim` or as soon as that is over; gives what was hit.

    Raises:
        RuntimeError: it failed by itself.
    """
    order = [phase for phase, _ in phases]
    process, began = _start(work, log), time.monotonic()
    now, since = "start", began
    while process.poll() is None:
        phase = phase_of(work / "train_dir/toy", process.pid)
        if phase != now:
            now, since = phase, time.monotonic()
        is_past = phase == "end" or (phase in order and order.index(phase) > order.index(aim))
        if is_past or (phase == aim and time.monotonic() - since >= offset_s):
            _kill(process)
            return f"{time.monotonic() - since:.2f} s into {phase}"
        if time.monotonic() - began > _TIMEOUT_S:
            _kill(process)
            raise RuntimeError(f"the sweep did not come to {aim} in {_TIMEOUT_S:.0f} s: {log.read_text()[-2000:]}")
        time.sleep(_POLL_S)
    if phase_of(work / "train_dir/toy", process.pid) == "end":
        return "the end, which came before the moment"
    raise RuntimeError(f"the sweep ended with {process.returncode} before {aim}: {log.read_text()[-2000:]}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the process and all its children."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def changed_results(work: Path, seen: dict[Path, tuple[int, int]]) -> list[str]:
    """Results that are not the files they were; adds the new ones to `seen`."""
    faults = []
    for path in sorted(work.glob("train_dir/toy/*/result.json")):
        facts = (path.stat().st_ino, path.stat().st_mtime_ns)
        if seen.setdefault(path, facts) != facts:
            faults.append(f"{path.relative_to(work)} was written again: its job ran twice to its end")
    return faults


def ended_twice(logs: Path) -> list[str]:
    """Jobs that said more than once that they are done, over all starts."""
    text = "".join(path.read_text() for path in sorted(logs.glob("*.log")) if path.name != "peace.log")
    count = Counter(re.findall(r"result: \S*toy/(\d+)/result\.json", text))
    return [f"job {num} said {times} times that it is done" for num, times in sorted(count.items()) if times > 1]


def differences(peace: Path, killed: Path) -> list[str]:
    """What the two sweeps' folders do not have in common: states but for times, checkpoints, metrics."""
    faults = []
    one, other = (_without_times(json.loads((path / "curriculum.json").read_bytes())) for path in (peace, killed))
    faults += [f"curriculum.json: {key} is {other[key]}, in peace {one[key]}" for key in one if one[key] != other[key]]
    digests = [
        {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for pattern in ("*/checkpoints/*.safetensors", "*/metrics.jsonl")
            for path in folder.glob(pattern)
        }
        for folder in (peace, killed)
    ]
    names = sorted({*digests[0], *digests[1]})
    return faults + [f"{name} is not the same" for name in names if digests[0].get(name) != digests[1].get(name)]


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(one) for key, one in value.items() if key != "elapsed_s"}
    return [_without_times(one) for one in value] if isinstance(value, list) else value


def main() -> int:
    """Runs the drill; 1 where something was not as in peace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="an empty one that is kept; else a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dual_policy_drill_") as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = drill(folder, kills=args.kills, seed=args.seed)
    for fault in found.faults:
        print(f"fault: {fault}")
    count = Counter(hit.partition(" into ")[2].split()[0] for hit in found.hits)
    where = ", ".join(f"{times} in {kind}" for kind, times in sorted(count.items()))
    print(f"{len(found.hits)} kills ({where}), {found.num_jobs} jobs, {len(found.faults)} faults")
    return int(bool(found.faults))


if __name__ == "__main__":
    sys.exit(main())
