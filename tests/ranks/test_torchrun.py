"""The command under a real torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dual_policy_plugin.run_state import decode_state

ROOT = Path(__file__).parents[2]


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
WORDS = (
    "device=cpu", "env.num_envs=4", "trainer.horizon=16", "+dual_policy=checkpoint", "evals.episodes=4",
    "report=false",
    "trainer.dual_policy.checkpoint_npc.uri=builtin://arena/medium",
)  # fmt: skip
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(folder: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], float]:
    command, begun = [*TORCHRUN, *words], time.monotonic()
    done = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    return done, time.monotonic() - begun


@pytest.mark.slow
def test_the_command_trains_under_torchrun(tmp_path: Path) -> None:
    words = [*WORDS, "run=two", "trainer.total_timesteps=1024"]
    done, _ = torchrun(tmp_path, "-m", "dual_policy_plugin", "train", *words)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "train_dir/two/result.json").read_text())
    assert result["agent_step"] == 1024
    assert result["iterations"] == 1024 // (2 * 4 * 4 * 16)
    assert done.stdout.count("result: ") == 1


@pytest.mark.slow
def test_a_rank_that_is_killed_under_torchrun_ends_the_other_in_time(tmp_path: Path) -> None:
    """It sends the survivor SIGTERM, which a run answers between two iterations: that one will not end."""
    args = {
        "how": "killed", "moment": "asking", "rank": 1, "hold": "evaluating", "episodes": 4, "evaluate_interval": 1,
    }  # fmt: skip
    done, took_s = torchrun(tmp_path, "-m", "tests.ranks.programs", "fail", json.dumps(args))
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "rank 1 of 2 (" in lines[0]
    assert "exitcode  : 75" in done.stderr
    assert "exitcode  : -9" in done.stderr
    assert took_s < 30.0  # starting torch twice included


@pytest.mark.slow
def test_ranks_whose_torchrun_was_killed_save_and_end(tmp_path: Path) -> None:
    """They would train on, hold the run and refuse the next start."""
    words = [*WORDS, "run=orphans", "trainer.total_timesteps=1000000000", "trainer.state_interval_s=3600"]
    parent = subprocess.Popen(
        [*TORCHRUN, "-m", "dual_policy_plugin", "train", *words],
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    metrics = tmp_path / "train_dir/orphans/metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        assert parent.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    ranks = psutil.Process(parent.pid).children()
    assert len(ranks) == 2
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive
    state = decode_state((tmp_path / "train_dir/orphans/state/training.safetensors").read_bytes(), "state")
    assert state.counters.iteration >= 3
    assert state.counters.iteration == metrics.read_bytes().count(b"\n")
