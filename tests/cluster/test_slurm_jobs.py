"""Sweeps through the real program on a real Slurm: what ends, goes on, and comes back to who waits for it."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dual_policy_plugin.npc.lock import read_lock
from tests.cluster.programs import (
    ENDLESS,
    PRESET,
    errors,
    log_of,
    num_iterations,
    process_of,
    result_of,
    run,
    running,
    sweep,
    wait_until,
)
from tests.cluster.slurm import Cluster
from tests.curriculum.sweeps import FORAGER, RANDOM, state_of, sweep_words
from tests.test_stop_signals import saved_iteration, traces

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


def test_a_sweep_of_four_jobs(tmp_path: Path) -> None:
    done = run(sweep(tmp_path, "seed=1,2,3,4"))
    assert done.returncode == 0, done.stderr
    for number in range(4):
        assert result_of(tmp_path / f"s/{number}")["agent_step"] == 512
        assert f"\nseed: {number + 1}\n" in (tmp_path / f"s/{number}/config.yaml").read_text()
    jobs = sorted(path.parent.name for path in tmp_path.glob("s/.submitit/*/*_result.pkl"))
    assert [job.partition("_")[2] for job in jobs] == ["0", "1", "2", "3"]  # one array
    assert len({job.partition("_")[0] for job in jobs}) == 1
    assert re.search(r"Slurm job \d+_3: ", done.stderr)


def test_a_curriculum_sweep(tmp_path: Path) -> None:
    """With a grid of two jobs of which one fails: its error comes back, and the other goes on to the next stage."""
    words = sweep_words(tmp_path, f"[{RANDOM},{FORAGER}]", "trainer.num_minibatches=4096,2", PRESET)
    done = run([*words, "hydra.sweeper.max_attempts=1"])
    assert done.returncode == 1, done.stderr
    assert len(errors(done.stderr)) == 1
    state = state_of(tmp_path)
    assert [job["status"] for job in state["jobs"]] == ["failed", "finished", "failed", "finished"]
    assert [(gate["job"], gate["decision"]) for gate in state["gates"]] == [(1, "promote"), (3, "stop")]
    assert "job 0 failed: trainer.num_minibatches=4096 is more than the 32 learner rows; use fewer" in done.stderr
    lock = {entry.role: entry for entry in read_lock(tmp_path / "s/3/npc.lock.json")}
    assert lock["initial"].sha256 == state["jobs"][1]["sha256"]


def test_a_preempted_job_ends_as_an_undisturbed_one(tmp_path: Path, cluster: Cluster) -> None:
    """The undisturbed one has no Slurm at all."""
    more = ["trainer.total_timesteps=30720", "trainer.checkpoint_interval=50"]  # 120 iterations
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    with running(sweep(stopped, *more)) as waiting:
        wait_until(lambda: num_iterations(stopped / "s/0") > 10)
        job = cluster.wait_for("RUNNING", "s")
        cluster.ask("sbatch", "-Jurgent", "-phigh", "-N2", "-c4", "-o/dev/null", "--wrap=sleep 2")
        cluster.wait_for("RUNNING", "urgent")
        at = saved_iteration(stopped / "s/0")
        assert 10 < at < 120
        assert cluster.wait_for("PENDING", "s") == job
        assert run(sweep(whole, *more, launcher="hydra/launcher=basic")).returncode == 0
        err = waiting.communicate(timeout=100)[1]
    assert waiting.returncode == 0, err
    log = log_of(stopped, job).read_text()
    assert f"SIGUSR2: saved after iteration {at}" in log
    assert "this job is preempted" in log
    assert log.count("Dual-policy system initialized") == 2
    assert num_iterations(whole / "s/0") == 120
    assert traces(stopped / "s/0") == traces(whole / "s/0")


def test_a_job_out_of_time_goes_on(tmp_path: Path, cluster: Cluster) -> None:
    """Slurm itself sends the warning, when it next looks at the clock: twice a minute."""
    path = tmp_path / "s/0"
    with running(sweep(tmp_path, ENDLESS, "hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=60")):
        wait_until(lambda: num_iterations(path) > 5)
        job = cluster.wait_for("PENDING", "s", timeout_s=70)
        at = saved_iteration(path)
        wait_until(lambda: num_iterations(path) > at + 5)  # the same job, from where it had stopped
        assert cluster.wait_for("RUNNING", "s") == job
        log = log_of(tmp_path, job).read_text()
        assert f"SIGUSR2: saved after iteration {at}" in log
        assert "this job is timed-out" in log
        assert "(999 remaining timeouts)" in log


def test_a_job_without_further_starts_says_so(tmp_path: Path, cluster: Cluster) -> None:
    """The launcher's own preset allows none; a job of ten minutes or less is out of time at every warning."""
    words = sweep(tmp_path, ENDLESS, "hydra.launcher.timeout_min=5", launcher="hydra/launcher=submitit_slurm")
    with running(words) as waiting:
        wait_until(lambda: num_iterations(tmp_path / "s/0") > 5)
        job = cluster.wait_for("RUNNING", "train")
        cluster.ask("scancel", "--signal=USR2", job)
        err = waiting.communicate(timeout=60)[1]
    assert waiting.returncode == 7
    assert errors(err) == [
        f"error: job {job} ran out of its time (hydra.launcher.timeout_min) and is not queued again; its state is "
        "saved and the same command goes on; hydra.launcher.max_num_timeout=N, or hydra/launcher=dual_policy_slurm, "
        "queues it again"
    ]
    assert saved_iteration(tmp_path / "s/0") == num_iterations(tmp_path / "s/0")


def test_jobs_that_are_ended_from_outside_are_one_line(tmp_path: Path, cluster: Cluster) -> None:
    """One is cancelled, and saves in the time it is given; one is killed, as the kernel does where memory runs out."""
    with (
        running(sweep(tmp_path, ENDLESS, name="cancelled")) as cancelled,
        running(sweep(tmp_path, ENDLESS, name="killed")) as killed,
    ):
        paths = [tmp_path / name / "0" for name in ("cancelled", "killed")]
        wait_until(lambda: min(map(num_iterations, paths)) > 5)
        jobs = [cluster.wait_for("RUNNING", name) for name in ("cancelled", "killed")]
        before = num_iterations(paths[0])
        cluster.ask("scancel", jobs[0])
        os.kill(json.loads((paths[1] / "run.lock").read_text())["pid"], signal.SIGKILL)
        for process, job, name, state in zip(
            (cancelled, killed), jobs, ("cancelled", "killed"), ("CANCELLED", "FAILED"), strict=True
        ):
            err = process.communicate(timeout=60)[1]
            assert process.returncode == 2
            assert errors(err) == [
                f"error: job {job} ended without a result (state {state}); the same command goes on with what "
                f"has no result; its log is {log_of(tmp_path, job, name=name)}"
            ]
    assert saved_iteration(paths[0]) >= before


def test_two_tasks_train_one_policy(tmp_path: Path) -> None:
    done = run(sweep(tmp_path, "hydra.launcher.nodes=2"))
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path / "s/0")
    assert result["agent_step"] == 512  # two ranks with 8 envs of 4 learners, 8 steps
    assert result["iterations"] == 1
    (job,) = [path.name for path in tmp_path.glob("s/.submitit/*") if (path / f"{path.name}_1_result.pkl").exists()]
    for task in (0, 1):
        assert f"global_rank={task}(2)" in log_of(tmp_path, job, "out", task).read_text()
    script = (tmp_path / f"s/.submitit/{job}/{job}_submission.sh").read_text()
    assert "#SBATCH --requeue\n" in script
    assert "export SLURM_KILL_BAD_EXIT=1\n" in script


def test_two_tasks_are_stopped_and_queued_again(tmp_path: Path, cluster: Cluster) -> None:
    """Task 0 alone queues the job again; that the other leaves with a code of its own makes it no failed one."""
    more = ["trainer.total_timesteps=40960", "hydra.launcher.nodes=2"]  # 80 iterations
    with running(sweep(tmp_path, *more)) as waiting:
        wait_until(lambda: num_iterations(tmp_path / "s/0") > 5)
        job = cluster.wait_for("RUNNING", "s")
        cluster.ask("scancel", "--signal=USR2", job)
        assert cluster.wait_for("PENDING", "s") == job
        at = saved_iteration(tmp_path / "s/0")
        err = waiting.communicate(timeout=100)[1]
    assert waiting.returncode == 0, err
    assert 5 < at < 80
    assert result_of(tmp_path / "s/0")["iterations"] == 80
    assert "Not checkpointing nor requeuing" in log_of(tmp_path, job, "err", task=1).read_text()


def test_a_job_that_lost_a_task_begins_again(tmp_path: Path, cluster: Cluster) -> None:
    """Exit code 75 of a rank that is left: the job is queued again, and who waits for it gets its result."""
    more = ["trainer.total_timesteps=40960", "hydra.launcher.nodes=2", "trainer.state_interval_s=0.1"]  # 80 iterations
    with running(sweep(tmp_path, *more)) as waiting:
        wait_until(lambda: num_iterations(tmp_path / "s/0") > 5)
        job = cluster.wait_for("RUNNING", "s")
        os.kill(process_of(job, task=1), signal.SIGKILL)
        assert cluster.wait_for("PENDING", "s") == job
        at = saved_iteration(tmp_path / "s/0")
        err = waiting.communicate(timeout=100)[1]
    assert waiting.returncode == 0, err
    assert 0 < at < 80
    assert result_of(tmp_path / "s/0")["iterations"] == 80
    log = log_of(tmp_path, job).read_text()
    assert f"job {job} is queued again" in log
    assert len(re.findall(r"^error: .*rank 1", log, re.MULTILINE)) == 1


def test_a_mistake_in_a_job_is_one_line(tmp_path: Path) -> None:
    done = run(sweep(tmp_path, "trainer.num_minibatches=4096,2"))
    assert done.returncode == 2
    assert errors(done.stderr) == ["error: trainer.num_minibatches=4096 is more than the 32 learner rows; use fewer"]
    assert result_of(tmp_path / "s/1")["agent_step"] == 512
    assert not (tmp_path / "s/0/result.json").exists()


def test_a_crash_in_a_job_is_one_line_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/safetensors.py").write_text("raise OSError('the disk of this node is gone')\n")
    done = run(sweep(tmp_path, f'hydra.launcher.setup=["export PYTHONPATH={tmp_path}/broken"]'))
    assert done.returncode == 2
    (line,) = errors(done.stderr)
    match = re.fullmatch(r"error: job (\d+) ended with OSError: the disk of this node is gone; its log is (\S+)", line)
    assert match is not None, line
    assert Path(match[2]) == log_of(tmp_path, match[1])
    assert "safetensors.py" in Path(match[2]).read_text()  # the traceback


def test_who_stops_waiting_is_told_what_goes_on(tmp_path: Path, cluster: Cluster) -> None:
    with running(sweep(tmp_path, ENDLESS)) as waiting:
        wait_until(lambda: num_iterations(tmp_path / "s/0") > 0)
        job = cluster.wait_for("RUNNING", "s")
        waiting.send_signal(signal.SIGINT)
        err = waiting.communicate(timeout=20)[1]
    assert waiting.returncode == 130
    assert "Traceback" not in err
    assert f"the Slurm jobs {job} go on; `scancel {job}` ends them" in err
    assert cluster.states() == {job: "RUNNING"}


def test_the_same_command_after_its_end_waits_for_the_jobs_that_go_on(tmp_path: Path, cluster: Cluster) -> None:
    """The second array's jobs have the results of the first one's, without training again."""
    words = sweep(tmp_path, "seed=1,2", MORE)
    with _left_behind(words, tmp_path, cluster), running(words) as waiting:
        logs = _waiting_logs(tmp_path)
        _go_on(tmp_path)
        err = waiting.communicate(timeout=100)[1]
    assert waiting.returncode == 0, err
    assert errors(err) == []
    for number, path in enumerate(_paths(tmp_path)):
        assert result_of(path)["iterations"] == num_iterations(path) == 160
        timing = [json.loads(line) for line in (path / "timing.jsonl").read_text().splitlines()]
        trained = [line["iteration"] for line in timing if "timing/rollout_s" in line]
        assert trained == list(range(1, 161))  # each once, by the first job
        (line,) = re.findall(r"WARNING (.* is in use by .*)", logs[number].read_text())
        assert re.fullmatch(rf"{path} is in use by process \d+ on \S+ since \S+; this job waits until it ends", line)


def test_a_curriculum_that_was_killed_waits_for_its_jobs(tmp_path: Path, cluster: Cluster) -> None:
    words = sweep_words(tmp_path, f"[{RANDOM}]", "seed=1,2", PRESET, MORE)
    with _left_behind(words, tmp_path, cluster), running(words) as waiting:
        _waiting_logs(tmp_path)
        _go_on(tmp_path)
        err = waiting.communicate(timeout=100)[1]
    assert waiting.returncode == 0, err
    assert errors(err) == []
    state = state_of(tmp_path)
    assert [job["status"] for job in state["jobs"]] == ["finished", "finished"]
    assert [gate["decision"] for gate in state["gates"]] == ["promote"]
    assert [num_iterations(path) for path in _paths(tmp_path)] == [160, 160]


MORE = "trainer.total_timesteps=40960"  # 160 iterations


def _paths(folder: Path) -> list[Path]:
    return [folder / f"s/{number}" for number in range(2)]


@contextmanager
def _left_behind(words: list[str], folder: Path, cluster: Cluster) -> Iterator[None]:
    """Two jobs whose waiting command was killed; they stand still until `_go_on`."""
    with running(words) as killed:
        wait_until(lambda: min(map(num_iterations, _paths(folder))) > 0)
        _signal_runs(folder, signal.SIGSTOP)
        killed.kill()
    assert sorted(cluster.states().values()) == ["RUNNING", "RUNNING"]
    assert max(map(num_iterations, _paths(folder))) < 160
    yield


def _go_on(folder: Path) -> None:
    _signal_runs(folder, signal.SIGCONT)


def _signal_runs(folder: Path, signum: int) -> None:
    for path in _paths(folder):
        os.kill(json.loads((path / "run.lock").read_text())["pid"], signum)


def _waiting_logs(folder: Path) -> list[Path]:
    """The logs of the two jobs that wait for a run, by number, once both do."""

    def found() -> list[Path]:
        logs = sorted(folder.glob("s/.submitit/*/*_0_log.err"), key=lambda path: path.name.split("_")[1])
        return [path for path in logs if "this job waits" in path.read_text()]

    wait_until(lambda: len(found()) == 2)
    return found()
