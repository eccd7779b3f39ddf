"""The `dual-policy` program at work on small sweeps, and what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.curriculum.sweeps import RANDOM, SMALL

PRESET = "hydra/launcher=dual_policy_slurm"
AGAINST_RANDOM = ["+dual_policy=checkpoint", f"trainer.dual_policy.checkpoint_npc.uri={RANDOM}"]
ENDLESS = "trainer.total_timesteps=100000000"


def sweep(folder: Path, *more: str, launcher: str = PRESET, name: str = "s") -> list[str]:
    """The words of a small sweep."""
    return ["train", "-m", launcher, *SMALL, *AGAINST_RANDOM, f"train_dir={folder}", f"run={name}", *more]


def run(words: list[str], timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `dual-policy` and waits for the sweep's end."""
    command = [sys.executable, "-m", "dual_policy_plugin", *words]
    return subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, timeout=timeout, check=False
    )  # fmt: skip


@contextmanager
def running(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    """`dual-policy` at work, ended with the context."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dual_policy_plugin", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.1)


def num_iterations(path: Path) -> int:
    """How many iterations the run at `path` has done."""
    metrics = path / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def errors(text: str) -> list[str]:
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("error: ")]


def result_of(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((path / "result.json").read_text())
    return found


def log_of(folder: Path, job: str, kind: str = "err", task: int = 0, name: str = "s") -> Path:
    return folder / name / ".submitit" / job / f"{job}_{task}_log.{kind}"


def process_of(job: str, task: int) -> int:
    """The process that trains as that task of a job."""
    wanted = {"SLURM_JOB_ID": job, "SLURM_PROCID": str(task), "SUBMITIT_EXECUTOR": "slurm"}
    (found,) = [
        process.pid
        for process in psutil.process_iter(["environ", "cmdline"])
        if wanted.items() <= (process.info["environ"] or {}).items()
        and "submitit.core._submit" in (process.info["cmdline"] or [])
    ]
    return found
