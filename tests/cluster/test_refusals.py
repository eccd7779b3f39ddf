"""What Slurm refuses: one line with the key and the mend, exit code 2, nothing launched, nothing left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dual_policy_plugin.cli import main
from tests.cluster.programs import sweep
from tests.cluster.slurm import ROOT, Cluster, missing
from tests.test_bad_input import _clean

__all__ = ["_clean"]  # no variables of the machine's, log handlers as they were
SHOWS = r"`sinfo -o '%P %l %D %c %m %G'` shows what there is"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["hydra.launcher.partition=gold"],
            "Slurm refuses the job: invalid partition specified: gold; Invalid partition name specified; see "
            "hydra.launcher.partition; `sinfo` lists partitions",
        ),
        (
            ["hydra.launcher.partition=gold", "seed=1,2"],
            "Slurm refuses the job: invalid partition specified: gold; Invalid partition name specified; see "
            "hydra.launcher.partition; `sinfo` lists partitions",
        ),
        (
            ["hydra.launcher.cpus_per_task=5"],
            "Slurm refuses the job: CPU count per node can not be satisfied; Requested node configuration is not "
            "available; see hydra.launcher.cpus_per_task and tasks_per_node; `sinfo -o '%P %D %c'` shows what nodes "
            "have",
        ),
        (
            ["hydra.launcher.mem_gb=50"],
            "Slurm refuses the job: Memory specification can not be satisfied; Requested node configuration is not "
            "available; see hydra.launcher.mem_gb; `sinfo -o '%P %D %m'` shows what nodes have",
        ),
        (
            ["hydra/launcher=dual_policy_slurm_gpu"],
            "Slurm refuses the job: Invalid generic resource (gres) specification; see hydra.launcher.gpus_per_node "
            "and hydra.launcher.gres; `sinfo -o '%P %G'` shows what nodes have",
        ),
        (
            ["hydra.launcher.constraint=fast"],
            "Slurm refuses the job: Invalid feature specification; see hydra.launcher.constraint; `sinfo -o '%P %f'` "
            "lists features",
        ),
        (
            ["hydra.launcher.nodes=3"],
            "Slurm could never start job JOB, which is cancelled: hydra.launcher.nodes is more than its partition has "
            f"or allows (PartitionNodeLimit); {SHOWS}",
        ),
        (
            ["hydra.launcher.partition=short", "seed=1,2"],
            "Slurm could never start job JOB_0, which is cancelled: hydra.launcher.timeout_min is more than its "
            f"partition allows (PartitionTimeLimit); {SHOWS}",
        ),
    ],
    ids=["partition", "partition of an array", "cpus", "memory", "gpus", "constraint", "nodes", "time"],
)
def test_what_a_cluster_cannot_do(
    words: list[str], line: str, tmp_path: Path, cluster: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    launchers = [word for word in words if word.startswith("hydra/launcher=")]
    rest = [word for word in words if word not in launchers]
    assert main(sweep(tmp_path, *rest, launcher=[*launchers, "hydra/launcher=dual_policy_slurm"][0])) == 2
    told = [one for one in capfd.readouterr().err.splitlines() if " INFO " not in one]
    assert [re.sub(r"job \d+", "job JOB", one) for one in told] == [f"error: {line}"]
    assert cluster.states() == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_refusal_leaves_what_stood_there(tmp_path: Path, cluster: Cluster) -> None:
    (tmp_path / "s/.submitit/7").mkdir(parents=True)
    (tmp_path / "s/.submitit/7/7_0_log.err").write_text("of an earlier sweep\n")
    assert main(sweep(tmp_path, "hydra.launcher.nodes=3")) == 2
    assert main(sweep(tmp_path, "hydra.launcher.partition=gold")) == 2
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"s/multirun.yaml", "s/.submitit/7/7_0_log.err"}


@pytest.mark.slow
def test_the_cluster_ends_with_the_process_that_wanted_it(tmp_path: Path) -> None:
    """Killed, it cannot end the daemons itself; and it is up within ten seconds."""
    if reason := missing():
        pytest.skip(reason)
    code = f"""
import os, pathlib, signal, time
from tests.cluster.slurm import slurm
began, folder = time.monotonic(), pathlib.Path({str(tmp_path)!r})
with slurm(folder) as cluster:
    print(time.monotonic() - began, flush=True)
    print(*((folder / f"{{name}}.pid").read_text().strip() for name in ("munge", "slurmctld", "slurmd-node1")))
    cluster.ask("sbatch", "-o/dev/null", "--wrap=sleep 600")
    cluster.wait_for("RUNNING", "wrap")
    print(*cluster.states(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    took, daemons, job = done.stdout.splitlines()
    assert float(took) < 10
    assert job == "1"
    pids = [int(word) for word in daemons.split()]
    assert len(set(pids)) == 3
    deadline = time.monotonic() + 30
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, [psutil.Process(pid) for pid in pids if _is_alive(pid)]
        time.sleep(0.1)
    assert not [one for one in psutil.process_iter(["environ"]) if _belongs(one, tmp_path)]


def _is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _belongs(process: psutil.Process, folder: Path) -> bool:
    environ: dict[str, str] = process.info["environ"] or {}
    return environ.get("SLURM_CONF", "").startswith(str(folder)) and process.pid != os.getpid()
