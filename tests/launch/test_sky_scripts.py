"""The tasks' own scripts, run for real: what a node does between SkyPilot and a finished run."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from dual_policy_plugin.launch.sky_task import read_template
from tests.launch.node import VENV, make_home, start_script

sky: Any = pytest.importorskip("sky")
if not hasattr(sky, "Task"):
    pytest.skip("SkyPilot is not installed: pip install --no-deps -r requirements-sky.txt", allow_module_level=True)

SMALL = (
    "device=cpu", "agent.hidden_size=16", "env.num_envs=8", "env.episode_steps=12", "evals.episodes=8",
    "trainer.horizon=8", "trainer.threads=1", "trainer.num_minibatches=2", "trainer.checkpoint_interval=5",
    "report=false",
)  # fmt: skip
STEPS = 256  # of an iteration
MINE = {"DUAL_POLICY_VENV": str(VENV), "OVERRIDES": " ".join(SMALL), "OMP_NUM_THREADS": "1"}


def play(task: Mapping[str, Any], home: Path, **envs: str) -> tuple[int, str]:
    """Exit code and output of a task's `run` on one node."""
    with start_script(task["run"], home, task, **MINE | envs) as node:
        output = node.communicate(timeout=120)[0]
    return node.returncode, output


def recover(task: Mapping[str, Any], homes: list[Path], **envs: str) -> list[int]:
    """The exit codes of a managed job that SkyPilot begins again, each time on another machine, as the task says."""
    codes: list[int] = []
    for home in homes:
        codes.append(play(task, home, **envs)[0])
        if codes[-1] not in task["resources"]["job_recovery"]["recover_on_exit_codes"]:
            break
    return codes


def timing_of(home: Path) -> list[dict[str, float]]:
    """Of the run x of a node."""
    lines = (home / "sky_workdir/train_dir/x/timing.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_one_node_trains_and_its_run_is_in_the_synced_place(tmp_path: Path) -> None:
    task, home, synced = read_template("train"), make_home(tmp_path / "node"), tmp_path / "synced it"
    synced.mkdir()
    with start_script(task["setup"], home, task, **MINE) as node:
        assert "dual-policy 0." in node.communicate(timeout=60)[0]
    assert node.returncode == 0
    code, output = play(
        task, home, RUN="a b", NPC_URI="builtin://arena/weak", TOTAL_TIMESTEPS=str(2 * STEPS), SYNC_URI=str(synced)
    )
    assert code == 0, output
    result = json.loads((synced / "a b/result.json").read_text())
    assert (result["agent_step"], result["npcs"][0]["uri"]) == (2 * STEPS, "builtin://arena/weak")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_two_nodes_train_one_policy(tmp_path: Path) -> None:
    task, synced, port = read_template("train_multinode"), tmp_path / "synced", str(free_port())
    synced.mkdir()
    envs = MINE | {"RUN": "two", "TOTAL_TIMESTEPS": str(4 * STEPS), "SYNC_URI": str(synced), "MASTER_PORT": port}
    nodes = [
        start_script(task["run"], make_home(tmp_path / f"{rank}"), task, rank=rank, ips=["127.0.0.1"] * 2, **envs)
        for rank in (0, 1)
    ]
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert json.loads((synced / "two/result.json").read_text())["iterations"] == 2  # of 256 steps on each
    assert not list((tmp_path / "1").rglob("metrics.jsonl"))


def test_a_users_mistake_is_not_started_again(tmp_path: Path) -> None:
    homes = [make_home(tmp_path / f"{i}") for i in range(2)]
    assert recover(read_template("train"), homes, NPC_URI="/no/such/policy") == [2]


@pytest.mark.slow
def test_a_users_mistake_keeps_its_exit_code_through_torchrun(tmp_path: Path) -> None:
    homes = [make_home(tmp_path / f"{i}") for i in range(2)]
    task = read_template("train_multinode")
    assert recover(task, homes, NPC_URI="/no/such/policy", MASTER_PORT=str(free_port())) == [2]


@pytest.mark.parametrize("code", [0, 7])
def test_a_mounted_bucket_has_everything_before_the_task_ends(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SkyPilot puts lines of its own behind the script, which wait until what the mount has cached is uploaded."""
    monkeypatch.setattr("sky.skylet.constants.RCLONE_CACHE_REFRESH_INTERVAL", 1)
    task, home = read_template("train"), make_home(tmp_path / "node")
    programs, logs = tmp_path / "venv/bin", home / ".sky/rclone_log"
    for name, script in (("dual-policy", f"exit {code}"), ("findmnt", "echo one mount")):
        programs.mkdir(parents=True, exist_ok=True)
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)
    logs.mkdir(parents=True)
    line = "INFO  : vfs cache: cleaned: objects 3 (was 3) in use {0}, to upload {0}, uploading {0}, total size 1Mi\n"
    (logs / "1.log").write_text(line.format(1) * 2000)  # of hours
    with start_script(task["run"], home, task, DUAL_POLICY_VENV=str(programs.parent)) as node:
        time.sleep(4)
        assert node.poll() is None, node.communicate()[0]
        with (logs / "1.log").open("a") as log:
            log.write(line.format(0))
        output = node.communicate(timeout=30)[0]
    assert (node.returncode, "upload complete" in output) == (code, True), output


def trainer_of(node: subprocess.Popen[str]) -> psutil.Process:
    (found,) = [
        one for one in psutil.Process(node.pid).children(recursive=True) if one.cmdline()[2:3] == ["train"]
    ]  # fmt: skip
    return found


@pytest.mark.slow
def test_a_job_that_hangs_goes_on_on_another_machine_until_its_time_is_over(tmp_path: Path) -> None:
    """The other machine has another price: neither the time nor the cost begins anew."""
    first, second = make_home(tmp_path / "1"), make_home(tmp_path / "2")
    task, synced = read_template("train"), tmp_path / "synced/x"
    synced.parent.mkdir()
    envs = MINE | {"RUN": "x", "SYNC_URI": str(synced.parent), "TOTAL_TIMESTEPS": str(10_000 * STEPS)}
    with start_script(
        task["run"], first, task, **envs, METTA_HOURLY_COST="36000", HEARTBEAT_TIMEOUT_SECONDS="2"
    ) as node:
        deadline = time.monotonic() + 60
        while not (synced / "checkpoints/model_0010.safetensors").exists():
            assert time.monotonic() < deadline
            assert node.poll() is None, node.communicate()[0]
            time.sleep(0.1)
        training = trainer_of(node)
        training.suspend()  # it hangs,
        time.sleep(8)
        training.resume()  # and comes to when it has been told to end
        output = node.communicate(timeout=60)[0]
    assert node.returncode == 75, output
    assert "watch: no sign of life for " in output
    before = timing_of(first)[-1]
    limit_s = before["timing/elapsed_s"] + 8
    code, output = play(task, second, **envs | {"METTA_HOURLY_COST": "36", "MAX_RUNTIME_HOURS": str(limit_s / 3600)})
    assert code == 7, output
    assert "watch: --max-runtime-hours=" in output
    times = timing_of(second)
    assert times[: len(timing_of(first))] == timing_of(first)  # it went on from there, and nothing was cut
    assert times[-1]["timing/elapsed_s"] < limit_s + 2.5
    costs = [one["cost/accrued_total"] for one in times]
    assert costs == sorted(costs)
    assert costs[-1] - before["cost/accrued_total"] == pytest.approx(
        (times[-1]["timing/elapsed_s"] - before["timing/elapsed_s"]) / 100
    )
    assert before["cost/accrued_total"] == pytest.approx(before["timing/elapsed_s"] * 10)


@pytest.mark.slow
def test_a_lost_node_ends_the_other_one_and_both_go_on_until_the_time_is_over(tmp_path: Path) -> None:
    task, synced, port = read_template("train_multinode"), tmp_path / "synced", str(free_port())
    synced.mkdir()
    envs = MINE | {"RUN": "x", "SYNC_URI": str(synced), "MASTER_PORT": port}
    envs["TOTAL_TIMESTEPS"] = str(100_000 * STEPS)
    homes = [make_home(tmp_path / f"{rank}") for rank in (0, 1)]

    def start(**more: str) -> list[subprocess.Popen[str]]:
        ips = ["127.0.0.1"] * 2
        return [
            start_script(task["run"], home, task, rank=rank, ips=ips, **envs | more) for rank, home in enumerate(homes)
        ]

    first, other = start()
    deadline = time.monotonic() + 90
    while not (synced / "x/checkpoints/model_0010.safetensors").exists():
        assert time.monotonic() < deadline
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.1)
    for process in [*psutil.Process(other.pid).children(recursive=True), psutil.Process(other.pid)]:
        process.kill()
    other.communicate(timeout=30)
    start_s = time.monotonic()
    output = first.communicate(timeout=90)[0]
    assert first.returncode == 75, output
    assert time.monotonic() - start_s < 60
    before = timing_of(homes[0])
    nodes = start(MAX_RUNTIME_HOURS=str((before[-1]["timing/elapsed_s"] + 12) / 3600))
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert nodes[0].returncode == 7, outputs
    assert nodes[1].returncode in (1, 7), outputs  # either way the job is not begun again
    assert timing_of(homes[0])[: len(before)] == before
