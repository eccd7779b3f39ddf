"""The jobs of a sweep in SkyPilot's queue: each launched once, at most so many at a time, found again."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dual_policy_plugin.errors import DualPolicyError, LaunchError, RunError
from dual_policy_plugin.launch import sky_jobs, sky_sdk
from dual_policy_plugin.launch.sky_jobs import Outcome, SkyJob, run_jobs
from dual_policy_plugin.launch.sky_record import RECORD_NAME, job_name, read_record
from dual_policy_plugin.launch.sky_sdk import load_sky
from dual_policy_plugin.launch.sky_settings import SkyLauncherConfig
from tests.launch.sky_stand_in import Cloud

try:
    sky = load_sky()
except LaunchError:
    pytest.skip("SkyPilot is not installed: pip install --no-deps -r requirements-sky.txt", allow_module_level=True)

SETTINGS = SkyLauncherConfig(poll_s=0.03, max_parallel=8)


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    one = Cloud(tmp_path / "cloud")
    one.install(monkeypatch.setattr)
    yield one
    one.end()


class Sweep:
    """A sweep of jobs that run a line of shell; `$OUT` is where a job's result goes."""

    def __init__(self, folder: Path, scripts: list[str], settings: SkyLauncherConfig = SETTINGS) -> None:
        self.folder, self.scripts, self.settings = folder, scripts, settings
        folder.mkdir(exist_ok=True)

    def job(self, num: int, before: str | None = None) -> SkyJob:
        out = self.folder / str(num)
        out.mkdir(exist_ok=True)
        task = {
            "run": self.scripts[num],
            "envs": {"OUT": str(out)},
            "resources": {"job_recovery": {"strategy": "FAILOVER", "recover_on_exit_codes": [75]}},
        }
        return SkyJob(num=num, run=f"s/{num}", sync_uri="", words=(f"a={num}",), make_task=lambda: task, before=before)

    def run(self, nums: list[int] | None = None, before: str | None = None) -> dict[int, Outcome]:
        jobs = [self.job(num, before) for num in (range(len(self.scripts)) if nums is None else nums)]
        record = read_record(self.folder, self.settings.cluster)
        return run_jobs(jobs, record, self.settings, collect=self._collect)

    def _collect(self, job: SkyJob, before: str | None) -> dict[str, Any] | None:
        path = self.folder / str(job.num) / "result.json"
        return json.loads(path.read_text()) if path.exists() and path.read_text() != before else None

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / RECORD_NAME).read_text())["jobs"]
        return found


def result(objective: float, sleep_s: float = 0.0) -> str:
    """A job that writes its result after a while."""
    return f"sleep {sleep_s}; echo '{{\"objective\": {objective}}}' > $OUT/result.json"


def killed(run: Callable[[], object]) -> int:
    """Runs it in a fork that is expected to die; gives the signal."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def test_all_jobs_run_and_their_results_come_back_by_number(cloud: Cloud, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "s", [result(0.5, 0.2), result(1.5), "true"])
    assert sweep.run() == {0: {"objective": 0.5}, 1: {"objective": 1.5}, 2: None}
    assert cloud.names() == [sweep.record[str(num)]["name"] for num in range(3)]
    assert [one["status"] for one in sweep.record.values()] == ["SUCCEEDED"] * 3
    assert cloud.history(1) == ["PENDING", "RUNNING", "SUCCEEDED"]


@pytest.mark.parametrize("limit", [1, 2])
def test_no_more_than_max_parallel_are_launched_at_a_time(cloud: Cloud, tmp_path: Path, limit: int) -> None:
    settings = replace(SETTINGS, max_parallel=limit)
    sweep = Sweep(tmp_path / "s", [result(num, 0.15) for num in range(4)], settings)
    assert sorted(sweep.run()) == [0, 1, 2, 3]
    assert cloud.most_at_once() == limit


def test_a_job_that_fails_does_not_end_the_others_and_is_launched_again_next_time(cloud: Cloud, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "s", ["[ -e $OUT/again ] && echo '{}' > $OUT/result.json", result(2.0, 0.3)])
    outcomes = sweep.run()
    error = outcomes[0]
    assert isinstance(error, LaunchError)
    name = sweep.record["0"]["name"]
    assert str(error) == (
        f"job 0 ({name}, id 1) ended as FAILED (Job exited with exit code 1 (user program failure)); "
        "`sky jobs logs 1` has its log"
    )
    assert outcomes[1] == {"objective": 2.0}
    (tmp_path / "s" / "0" / "again").touch()
    assert sweep.run() == {0: {}, 1: {"objective": 2.0}}
    assert len(cloud.jobs()) == 3, "the second job, which succeeded, is not launched again"
    assert sweep.record["0"]["attempt"] == 2
    assert cloud.names()[2] == name.removesuffix("-1") + "-2"


def test_a_lost_machine_and_exit_code_75_are_recovered_by_the_cloud_alone(cloud: Cloud, tmp_path: Path) -> None:
    again = "[ -e $OUT/mark ] || { touch $OUT/mark; exit 75; }; " + result(3.0)
    preempted = "[ -e $OUT/mark ] || { touch $OUT/mark; exec sleep 60; }; " + result(4.0)
    sweep = Sweep(tmp_path / "s", [again, preempted])
    watcher = os.fork()
    if watcher == 0:
        try:
            cloud.wait_for((tmp_path / "s" / "1" / "mark").exists)
            cloud.preempt(2)
        finally:
            os._exit(0)
    assert sweep.run() == {0: {"objective": 3.0}, 1: {"objective": 4.0}}
    os.waitpid(watcher, 0)
    for job in (1, 2):
        assert cloud.history(job) == ["PENDING", "RUNNING", "RECOVERING", "RUNNING", "SUCCEEDED"]
    assert len(cloud.calls("jobs.launch")) == 2


@pytest.mark.parametrize(
    ("call", "number", "when", "launched"),
    [
        ("jobs.launch", 2, "before", 1),
        ("jobs.launch", 2, "after", 2),
        ("jobs.launch", 2, "late", 2),
        ("jobs.queue_v2", 2, "after", 3),
    ],
)
def test_a_killed_sweep_finds_its_jobs_again_and_launches_none_twice(
    cloud: Cloud, tmp_path: Path, call: str, number: int, when: str, launched: int
) -> None:
    sweep = Sweep(tmp_path / "s", [result(num, 0.4) for num in range(3)])
    cloud.fault(call, number, when)
    assert killed(sweep.run) == signal.SIGKILL
    assert len(cloud.jobs()) == launched
    assert sweep.run() == {num: {"objective": num} for num in range(3)}
    assert len(cloud.jobs()) == 3
    assert len(set(cloud.names())) == 3


def test_jobs_that_ended_while_no_sweep_was_there_are_taken_without_a_launch(cloud: Cloud, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "s", [result(1.0, 0.2), "exit 2"])
    cloud.fault("jobs.queue_v2", 1, "before")
    assert killed(sweep.run) == signal.SIGKILL
    cloud.wait_for(lambda: {cloud.status(1), cloud.status(2)} == {"SUCCEEDED", "FAILED"})
    outcomes = sweep.run()
    assert outcomes[0] == {"objective": 1.0}
    assert "exit code 2" in str(outcomes[1])
    assert len(cloud.jobs()) == 2


def test_a_running_job_with_other_words_is_refused(cloud: Cloud, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "s", [result(1.0, 30)])
    cloud.fault("jobs.queue_v2", 1, "before")
    assert killed(sweep.run) == signal.SIGKILL
    job = replace(sweep.job(0), words=("a=other",))
    with pytest.raises(RunError, match=r"job 0 of this sweep was launched with other words .*`sky jobs cancel 1`"):
        run_jobs([job], read_record(sweep.folder, None), SETTINGS, collect=lambda *_: None)
    assert len(cloud.jobs()) == 1
    with pytest.raises(RunError, match="knows of managed jobs that have not ended"):
        read_record(sweep.folder, "c")


def test_a_job_that_the_queue_has_forgotten_is_said_to_be_gone(cloud: Cloud, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "s", [result(1.0, 30), result(2.0)])
    cloud.fault("jobs.queue_v2", 1, "before")
    assert killed(sweep.run) == signal.SIGKILL
    cloud.end()
    os.rename(cloud.folder / "jobs" / "1", tmp_path / "elsewhere")
    outcomes = sweep.run([0])
    assert "is not in the queue any more" in str(outcomes[0])
    assert sweep.record["0"]["status"] == "GONE"


def test_a_refused_launch_lets_the_launched_ones_end(cloud: Cloud, tmp_path: Path) -> None:
    refusal = sky.exceptions.ResourcesUnavailableError("No H100 in sight.")
    cloud.errors["jobs.launch"] = lambda number: refusal if number == 2 else None
    sweep = Sweep(tmp_path / "s", [result(1.0, 0.2), result(2.0), result(3.0)])
    outcomes = sweep.run()
    assert outcomes[0] == {"objective": 1.0}
    for num in (1, 2):
        assert str(outcomes[num]).startswith(f"job {sweep.record['1']['name']} could not be launched: No H100 in sight")
    assert len(cloud.calls("jobs.launch")) == 2, "no further one is tried"
    assert sweep.run() == {num: {"objective": num + 1.0} for num in range(3)}
    assert len(cloud.jobs()) == 3
    assert sweep.record["1"]["attempt"] == 1


def test_a_first_launch_that_is_refused_is_the_sweeps_error(cloud: Cloud, tmp_path: Path) -> None:
    cloud.errors["jobs.launch"] = lambda _: sky.exceptions.NoCloudAccessError("No cloud is enabled.")
    with pytest.raises(LaunchError, match=r"could not be launched: No cloud is enabled; `sky check` says"):
        Sweep(tmp_path / "s", ["true", "true"]).run()
    assert cloud.jobs() == []


def test_a_queue_out_of_reach_is_asked_again(cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep(tmp_path / "s", [result(1.0, 0.1)])
    cloud.errors["jobs.queue_v2"] = lambda number: ConnectionError("no route") if number <= 3 else None
    assert sweep.run() == {0: {"objective": 1.0}}
    monkeypatch.setattr(sky_jobs, "UNREACHABLE_S", 0.05)
    cloud.errors["jobs.queue_v2"] = lambda _: ConnectionError("no route")
    other = Sweep(tmp_path / "t", ["sleep 30"])
    with pytest.raises(LaunchError, match="no route; the jobs go on, and the same command finds them again"):
        other.run()


def interrupt(_: float) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("answer", "is_cancelled"), [("c\n", True), ("\n", False), (None, False)])
def test_an_interrupt_asks_at_a_terminal_whether_the_jobs_are_left_or_cancelled(
    cloud: Cloud,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: str | None,
    is_cancelled: bool,
) -> None:
    sweep = Sweep(tmp_path / "s", ["sleep 30"])
    for name, text in (("stdin", answer or ""), ("stderr", "")):
        stream = io.StringIO(text)
        stream.isatty = lambda: answer is not None  # type: ignore[method-assign]
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(KeyboardInterrupt):
        run_jobs([sweep.job(0)], read_record(sweep.folder, None), SETTINGS, collect=lambda *_: None, sleep=interrupt)
    name, said = cloud.names()[0], sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert (f"{name} (id 1): leave running or cancel? [L/c]" in said) == (answer is not None)
    if is_cancelled:
        cloud.wait_for(lambda: cloud.status(1) == "CANCELLED")
        assert f"cancelled {name} (id 1); the same command launches them again" in said
        assert sweep.record["0"]["status"] == "CANCELLED"
    else:
        assert f"left running: {name} (id 1); the same command finds them again, `sky jobs cancel 1` cancels" in said
        assert cloud.calls("jobs.cancel") == []
        assert sweep.record["0"]["status"] is None


def test_a_job_that_was_cancelled_elsewhere_is_a_failed_one(cloud: Cloud, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "s", ["sleep 30"])
    cancelled = []

    def cancel_once(_: float) -> None:
        if not cancelled:
            cancelled.append(sky.jobs.cancel(job_ids=[1]))
            sky.get(cancelled[0])
        time.sleep(0.05)

    outcomes = run_jobs(
        [sweep.job(0)], read_record(sweep.folder, None), SETTINGS, collect=lambda *_: None, sleep=cancel_once
    )
    assert "ended as CANCELLED" in str(outcomes[0])


def test_jobs_on_a_cluster(cloud: Cloud, tmp_path: Path) -> None:
    settings = replace(SETTINGS, mode="cluster", cluster="mine", idle_minutes=3, down=True)
    sweep = Sweep(tmp_path / "s", [result(1.0, 0.2), "exit 3"], settings)
    cloud.fault("launch", 2, "after")
    assert killed(sweep.run) == signal.SIGKILL
    outcomes = sweep.run()
    assert outcomes[0] == {"objective": 1.0}
    assert "ended as FAILED; `sky logs mine 2` has its log" in str(outcomes[1])
    assert len(cloud.jobs()) == 2
    call = cloud.calls("launch")[0]
    assert (call["cluster_name"], call["idle_minutes_to_autostop"], call["down"]) == ("mine", 3, True)


def test_the_jobs_of_a_cluster_that_has_ended_meanwhile_are_launched_again(
    cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sky_jobs, "UNREACHABLE_S", 0.05)
    settings = replace(SETTINGS, mode="cluster", cluster="mine")
    sweep = Sweep(tmp_path / "s", ["[ -e $OUT/again ] || exit 1; " + result(1.0)], settings)
    cloud.fault("queue", 1, "before")
    assert killed(sweep.run) == signal.SIGKILL
    cloud.wait_for(lambda: cloud.status(1) == "FAILED")
    end_clusters(cloud)
    assert "is not in the queue any more" in str(sweep.run()[0])
    (tmp_path / "s" / "0" / "again").touch()
    assert sweep.run() == {0: {"objective": 1.0}}
    assert sweep.record["0"]["attempt"] == 2


def end_clusters(cloud: Cloud) -> None:
    """All queues end with their clusters, which were idle for long enough; the next ones count from 1 again."""
    os.rename(cloud.folder / "jobs", cloud.folder / f"jobs-{time.monotonic()}")
    (cloud.folder / "jobs").mkdir()


def test_a_job_of_another_sweep_under_the_same_id_is_not_taken_for_ours(cloud: Cloud, tmp_path: Path) -> None:
    """A cluster that is made anew counts from 1 again."""
    settings = replace(SETTINGS, mode="cluster", cluster="mine")
    sweep = Sweep(tmp_path / "s", ["sleep 30"], settings)
    cloud.fault("queue", 1, "before")
    assert killed(sweep.run) == signal.SIGKILL
    cloud.end()
    end_clusters(cloud)
    other = Sweep(tmp_path / "t", ["sleep 30"], settings)
    record = read_record(other.folder, "mine")
    others = replace(other.job(0), run="t/0")
    with pytest.raises(KeyboardInterrupt):
        run_jobs([others], record, settings, collect=lambda *_: None, sleep=interrupt)
    assert (other.record["0"]["job"], sweep.record["0"]["job"]) == (1, 1)
    assert "is not in the queue any more" in str(sweep.run()[0])
    assert sweep.record["0"]["status"] == "GONE"
    assert read_record(other.folder, "mine").entries[0].status is None


def test_a_cluster_that_a_launch_makes_anew_gives_two_jobs_one_id(cloud: Cloud, tmp_path: Path) -> None:
    settings = replace(SETTINGS, mode="cluster", cluster="mine")
    sweep = Sweep(tmp_path / "s", ["sleep 30", result(2.0, 0.2)], settings)
    cloud.fault("launch", 2, "before")
    assert killed(sweep.run) == signal.SIGKILL
    cloud.end()
    end_clusters(cloud)
    outcomes = sweep.run()
    assert "(id 1)" not in str(outcomes[0])
    assert f"job 0 ({sweep.record['0']['name']}, id 1) is not in the queue any more" in str(outcomes[0])
    assert outcomes[1] == {"objective": 2.0}
    assert [one["job"] for one in sweep.record.values()] == [1, 1]


def test_an_interrupt_cancels_no_job_of_another_sweep(
    cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, mode="cluster", cluster="mine")
    sweep = Sweep(tmp_path / "s", ["sleep 30"], settings)

    def end_and_interrupt(_: float) -> None:
        cloud.end()
        end_clusters(cloud)
        sky_sdk.start_cluster({"name": "theirs", "run": "sleep 30"}, "mine", down=False, idle_minutes=None)
        raise KeyboardInterrupt

    monkeypatch.setattr(sky_jobs, "_asks_to_cancel", lambda _: True)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(
            [sweep.job(0)],
            read_record(sweep.folder, "mine"),
            settings,
            collect=lambda *_: None,
            sleep=end_and_interrupt,
        )
    assert cloud.names() == ["theirs"]
    assert cloud.calls("cancel") == []


@pytest.mark.parametrize("is_old", [False, True])
def test_a_result_that_a_job_left_before_the_queue_forgot_it_is_taken(
    cloud: Cloud, tmp_path: Path, is_old: bool
) -> None:
    sweep = Sweep(tmp_path / "s", [result(1.0)], replace(SETTINGS, mode="cluster", cluster="mine"))
    cloud.fault("queue", 1, "before")
    assert killed(lambda: sweep.run(before='{"objective": 1.0}\n' if is_old else None)) == signal.SIGKILL
    cloud.wait_for(lambda: cloud.status(1) == "SUCCEEDED")
    end_clusters(cloud)
    (outcome,) = sweep.run().values()
    if is_old:  # of an earlier run: it stood there when this job was launched
        assert "is not in the queue any more" in str(outcome)
    else:
        assert outcome == {"objective": 1.0}
    assert sweep.record["0"]["status"] == ("GONE" if is_old else "SUCCEEDED")
    assert cloud.jobs() == []


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / RECORD_NAME).write_text('{"version": 1, "jobs": {"0": {}}}')
    with pytest.raises(RunError, match=r"skypilot_jobs.json is not as a sweep writes it"):
        read_record(tmp_path, None)


def test_names_are_what_skypilot_takes_and_tell_jobs_apart() -> None:
    names = {job_name("Übung/run 1/0", digest, attempt) for digest in ("a" * 64, "b" * 64) for attempt in (1, 2)}
    assert len(names) == 4
    for name in names:
        assert len(name) <= 50
        sky.utils.common_utils.check_cluster_name_is_valid(name)
    assert job_name("///", "c" * 64, 1) == "dp-cccccccccc-1"


def test_an_error_of_ours_while_a_result_is_fetched_stops_the_sweep_and_loses_nothing(
    cloud: Cloud, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path / "s", [result(1.0)])

    def broken(*_: object) -> dict[str, Any] | None:
        raise RunError("the disk is full")

    with pytest.raises(DualPolicyError, match="the disk is full"):
        run_jobs([sweep.job(0)], read_record(sweep.folder, None), SETTINGS, collect=broken)
    assert sweep.run() == {0: {"objective": 1.0}}
    assert len(cloud.jobs()) == 1
