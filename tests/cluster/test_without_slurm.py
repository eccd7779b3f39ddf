"""What needs no cluster: the lines where Slurm or its launcher is missing, and what an error of theirs becomes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from submitit.core.utils import FailedJobError, UncompletedJobError

from dual_policy_plugin.cli import main
from dual_policy_plugin.errors import LimitError
from dual_policy_plugin.hydra_app.composition import compose_config, compose_hydra_node
from dual_policy_plugin.hydra_app.overrides import count_jobs
from dual_policy_plugin.slurm.errors import explain, job_error
from dual_policy_plugin.slurm.states import SlurmStates
from tests.curriculum.sweeps import SMALL
from tests.test_bad_input import _clean

__all__ = ["_clean"]  # no variables of the machine's, log handlers as they were


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["hydra/launcher=dual_policy_slurm"],
            "hydra/launcher=dual_policy_slurm starts the jobs of a sweep, of one job too; add -m",
        ),
        (
            ["-m", "hydra/launcher=dual_policy_slurm", "hydra.launcher.gpus=2"],
            "hydra.launcher.gpus is not a known key; `--cfg hydra` lists all keys",
        ),
    ],
)
def test_a_launcher_that_cannot_be_used_so(
    words: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *words, *SMALL, f"train_dir={tmp_path}"]) == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {line}"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["submitit_slurm", "dual_policy_slurm"])
def test_no_slurm_on_this_machine(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["train", "-m", f"hydra/launcher={name}", *SMALL, f"train_dir={tmp_path}", "run=s"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: Slurm's sbatch and srun are not on this machine; start this on a login node of the cluster, or leave "
        "hydra/launcher= away to train here"
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("most", "said"), [(5, ["preparing 6 jobs"]), (6, [])])
def test_a_large_sweep_says_what_it_is_at_before_anything_is_sent(
    most: int, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("dual_policy_plugin.commands.train._MANY_JOBS", most)
    sweep = ["seed=range(1,4)", "run=s", "trainer.learning_rate=0.01,0.02"]
    assert main(["train", "-m", "hydra/launcher=submitit_slurm", *SMALL, f"train_dir={tmp_path}", *sweep]) == 2
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == said


def test_the_jobs_of_a_sweep_are_counted() -> None:
    assert count_jobs([]) == count_jobs(["seed=1", "+x=[1,2]", "~y"]) == 1
    assert count_jobs(["seed=1,2,3", "a=range(1,5)", "b=choice(p,q)"]) == 24
    assert count_jobs(["seed=1,2", "+user=glob(*)", "lr=interval(0,1)"]) == 2  # for others to tell
    assert count_jobs(["seed=1,2", "a=[1,2"]) == 1


@pytest.mark.parametrize("name", ["submitit_slurm", "dual_policy_slurm", "dual_policy_slurm_gpu"])
def test_no_launcher_for_slurm_is_installed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compose_config([])  # Hydra has looked for its plugins
    launchers: dict[str, object] = ConfigStore.instance().repo["hydra"]["launcher"]
    for absent in ("submitit_slurm.yaml", "submitit_local.yaml"):
        monkeypatch.delitem(launchers, absent)
    assert main(["train", "-m", f"hydra/launcher={name}", *SMALL, f"train_dir={tmp_path}"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: hydra/launcher=submitit_slurm comes with hydra-submitit-launcher, which is not installed; "
        "pip install 'dual-policy-plugin[slurm]'"
    ]
    assert list(tmp_path.iterdir()) == []


def test_the_presets() -> None:
    """Queued again after a timeout, which submitit's own is not; and one process for each GPU."""
    plain = compose_hydra_node(["hydra/launcher=submitit_slurm"], "launcher")
    ours = compose_hydra_node(["hydra/launcher=dual_policy_slurm", "run=x"], "launcher")
    gpu = compose_hydra_node(["hydra/launcher=dual_policy_slurm_gpu", "hydra.launcher.gpus_per_node=8"], "launcher")
    assert (plain["max_num_timeout"], ours["max_num_timeout"]) == (0, 1000)
    assert ours["_target_"] == plain["_target_"] == gpu["_target_"]
    assert (ours["tasks_per_node"], ours["gpus_per_node"], ours["name"]) == (1, None, "x")
    assert (gpu["tasks_per_node"], gpu["gpus_per_node"]) == (8, 8)
    assert ours["additional_parameters"] == gpu["additional_parameters"] == {"requeue": True}
    config, _ = compose_config([])
    assert ours["signal_delay_s"] > config.trainer.grace_s
    assert ours["timeout_min"] > 10  # below, submitit takes a preemption for a timeout


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
            "Slurm refuses the job: Invalid account or account/partition combination specified; see "
            "hydra.launcher.account and hydra.launcher.qos; `sacctmgr show assoc user=$USER` lists yours",
        ),
        (
            "sbatch: error: Batch job submission failed: Invalid qos specification",
            "Slurm refuses the job: Invalid qos specification; see hydra.launcher.qos; `sacctmgr show qos` lists them",
        ),
        (
            "sbatch: error: Batch job submission failed: Invalid job array specification",
            "Slurm refuses the job: Invalid job array specification; see `scontrol show config | grep MaxArraySize`, "
            "which a sweep's jobs exceed; divide its values among sweeps",
        ),
        (
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
            "Slurm refuses the job: Unable to contact slurm controller (connect failure)",
        ),
    ],
)
def test_what_sbatch_says(text: str, line: str, tmp_path: Path) -> None:
    folder = tmp_path / "s/.submitit"
    folder.mkdir(parents=True)
    for name in (".submission_file_1.sh", "0123456789abcdef0123456789abcdef.pkl"):
        (folder / name).touch()
    (tmp_path / "s/multirun.yaml").touch()
    error = FailedJobError(text)
    error.__cause__ = subprocess.CalledProcessError(1, ["sbatch", str(folder / ".submission_file_1.sh")])
    assert str(explain(error)) == line
    assert list(tmp_path.iterdir()) == []


def test_a_lost_job_is_named_with_its_last_error_and_its_log(tmp_path: Path) -> None:
    (tmp_path / "7_0_log.err").write_text("12:00:00 INFO on its way\nerror: rank 1 is gone\nsrun: error: node2\n")
    text = f"Job 7 (task: 1) with path {tmp_path}/7_1_result.pkl\nhas not produced any output (state: OUT_OF_MEMORY)\n"
    assert str(explain(UncompletedJobError(text))) == (
        "job 7 ended without a result (state OUT_OF_MEMORY); it said: rank 1 is gone; raise "
        "hydra.launcher.mem_gb or lower env.num_envs, then the same command goes on; its log is "
        f"{tmp_path}/7_0_log.err"
    )


def test_a_job_that_could_not_begin() -> None:
    text = (
        "Job (task=0) failed during processing with trace:\n----------------------\nTraceback ...\n"
        "ModuleNotFoundError: No module named 'dual_policy_plugin'\n\n----------------------\n"
        "You can check full logs with 'job.stderr(0)' and 'job.stdout(0)'or at paths:\n  - /x/7_0_log.err\n  - /x/7"
    )
    assert str(explain(FailedJobError(text))) == (
        "a job could not begin: ModuleNotFoundError: No module named 'dual_policy_plugin'; its log is /x/7_0_log.err"
    )


def test_other_errors_are_not_explained() -> None:
    assert explain(RuntimeError("of ours")) is None
    assert explain(ValueError("of the user's")) is None
    assert job_error(RuntimeError("here, in no job")) is None


def test_an_error_in_a_job_names_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": f"{tmp_path}/%j", "SLURM_JOB_ID": "7", "SLURM_PROCID": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    lost = job_error(RuntimeError("first\nsecond"))
    assert str(lost) == f"job 7 ended with RuntimeError: first; its log is {tmp_path}/7/7_1_log.err"
    out_of_time = job_error(UncompletedJobError("Job not requeued because: timed-out too many times."))
    assert isinstance(out_of_time, LimitError)
    assert out_of_time.exit_code == 7


SQUEUE = """#!/bin/sh
cat {folder}/squeue.txt
"""


def test_states_come_from_squeue_and_a_forgotten_job_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Slurm's books, as with submitit's own watcher, who waits for a lost job would wait for ever."""
    for name, text in (("squeue", SQUEUE.format(folder=tmp_path)), ("sacct", "#!/bin/sh\nexit 1\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    listed, states = tmp_path / "squeue.txt", SlurmStates()
    states.register_job("7_0")
    states.register_job("7_1")

    listed.write_text("")
    states.update()
    assert states.get_state("7_0", mode="cache") == "UNKNOWN"  # not yet there, which is no end
    assert not states.is_done("7_0", mode="cache")
    for state, is_done in (
        ("PENDING", False), ("CONFIGURING", False), ("RUNNING", False), ("SUSPENDED", False), ("PREEMPTED", False),
        ("COMPLETING", False), ("REQUEUED", False),
    ):  # fmt: skip
        listed.write_text(f"7_0|{state}|None\n7_1|RUNNING|None\n")
        states.update()
        assert states.get_state("7_0", mode="cache") == state
        assert states.is_done("7_0", mode="cache") is is_done
    listed.write_text("7_0|FAILED|NonZeroExitCode\n7_1|RUNNING|None\n")
    states.update()
    assert states.is_done("7_0", mode="cache")
    assert states.waiting_for() == ["7_1"]
    assert states._shown is not None  # that it is waited for
    listed.write_text("")
    states.update()
    assert states.get_state("7_1", mode="cache") == "ENDED"
    assert states.waiting_for() == []
    assert states._shown is None


def test_a_controller_that_does_not_answer_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "squeue").write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact controller' >&2; exit 1"
    )
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    states = SlurmStates()
    states.register_job("7")
    states._info_dict["7"] = {"State": "RUNNING"}
    states.update()
    assert states.waiting_for() == ["7"]
    states.end_wait()
