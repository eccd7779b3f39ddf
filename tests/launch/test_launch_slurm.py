"""`dual-policy launch slurm`: what is sent to a real Slurm, and what ends with one line and sends nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dual_policy_plugin.errors import EXIT_AGAIN
from dual_policy_plugin.launch import slurm_job
from dual_policy_plugin.npc.lock import read_lock
from dual_policy_plugin.slurm.requeue import MAX_STARTS, SOON_S, requeue_job
from tests.cluster.conftest import _slurm, cluster  # noqa: F401
from tests.cluster.slurm import Cluster
from tests.launch.launching import AGAINST, MEDIUM, URI, error_line, git, launched, make_checkout, only_this_machine
from tests.launch.node import ROOT

SMALL = [
    "env.num_envs=4", "env.episode_steps=16", "trainer.horizon=8", "trainer.num_minibatches=2", "trainer.threads=1",
    "trainer.precision=fp32", "agent.hidden_size=16", "evals.episodes=0", "device=cpu", "trainer.total_timesteps=512",
    "report=false",
]  # fmt: skip
TINY = ["hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=null"]


@pytest.fixture(autouse=True)
def _code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clean checkout to launch from."""
    only_this_machine(tmp_path, monkeypatch)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.chdir(make_checkout(tmp_path / "code"))


@pytest.fixture
def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Commands of Slurm's that say what a test wants, where no cluster is needed to know the answer."""
    folder = tmp_path / "slurm-bin"
    folder.mkdir()
    for name in ("git", "bash", "sh", "env"):
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(folder))

    def answer(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)

    return answer


def wait_until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.1)


def ended(cluster: Cluster, job: str) -> bool:  # noqa: F811
    return job not in cluster.states()


# on a real Slurm


@pytest.mark.slow
def test_a_run_as_a_job(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    source = next((ROOT / "dual_policy_plugin/builtin/arena").glob("weak*.safetensors"))
    shutil.copy(source, "../my npc.safetensors")
    words = [*SMALL, *AGAINST[:1], f"{URI}='../my npc.safetensors'", "run='a b/1'", 'wandb.tags=["*","x y"]']
    printed = launched(capsys, "slurm", "--dry-run", "--partition=main", "--timeout-hours=1.5", *TINY, *words)
    assert "#SBATCH --partition=main\n" in printed
    assert "#SBATCH --time=90\n" in printed
    assert "# npc" in printed
    assert not Path("train_dir").exists()

    began = time.monotonic()
    said = launched(capsys, "slurm", "--partition=main", *TINY, *words)
    assert time.monotonic() - began < 20  # it does not wait for the run
    job = said.split("Slurm job ")[1].split(";")[0]
    assert said == (
        f"run a b/1: Slurm job {job}; logs {Path.cwd()}/train_dir/a b/1/.submitit/{job}/{job}_0_log.out and "
        f"{job}_0_log.err; `scancel {job}` ends it\n"
    )
    run = Path("train_dir/a b/1")
    wait_until(lambda: (run / "result.json").exists() or ended(cluster, job))
    log = run / f".submitit/{job}/{job}_0_log.err"
    assert (run / "result.json").exists(), log.read_text()
    result = json.loads((run / "result.json").read_text())
    assert (result["run"], result["agent_step"]) == ("a b/1", 512)
    (lock,) = (run / ".submitit").glob("*.npc.lock.json")
    ((mine,), (its,)) = read_lock(lock), read_lock(run / "npc.lock.json")
    assert (mine.uri, mine.sha256) == (its.uri, its.sha256)
    assert f"code: commit {git(Path.cwd(), 'rev-parse', 'HEAD')}" in log.read_text()
    wait_until(lambda: ended(cluster, job))


@pytest.mark.slow
def test_a_preempted_job_goes_on_in_its_run(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    words = [word for word in SMALL if "total_timesteps" not in word]
    said = launched(
        capsys, "slurm", "--partition=main", *TINY, *words, MEDIUM, "run=long", "trainer.total_timesteps=100000000"
    )
    job, run = said.split("Slurm job ")[1].split(";")[0], Path("train_dir/long")
    lines = lambda: (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").exists() else 0  # noqa: E731
    wait_until(lambda: lines() > 3)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    log = run / f".submitit/{job}/{job}_0_log.err"
    wait_until(lambda: "Requeued job" in (run / f".submitit/{job}/{job}_0_log.out").read_text() + log.read_text())
    seen = lines()
    wait_until(lambda: lines() > seen + 3)
    subprocess.run(["scancel", job], check=True)
    wait_until(lambda: ended(cluster, job))
    iterations = [json.loads(line)["iteration"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert iterations == list(range(1, len(iterations) + 1))  # no iteration twice, none left out


@pytest.mark.slow
def test_what_slurm_refuses_leaves_nothing(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    words = [*SMALL, MEDIUM, "run=refused"]
    line = error_line(capsys, "slurm", "--partition=nowhere", *words)
    assert line == "error: --partition=nowhere is not on this cluster; there are main, short, high\n"
    for option, says in (
        ("--nodes=9", "Requested node configuration is not available (hydra.launcher has partition=main, nodes=9, "),
        ("--cpus=99", "Requested node configuration is not available"),
        ("hydra.launcher.constraint=quantum", "Invalid feature specification"),
        ("--gpus=1", "Invalid generic resource (gres) specification"),
    ):
        for dry in ([], ["--dry-run"]):
            line = error_line(capsys, "slurm", option, "--partition=main", *dry, *words)
            assert line.startswith(f"error: Slurm refuses the job: {says}"), line
    assert cluster.states() == {}
    assert not Path("train_dir").exists()


# without one


def stub_cluster(answer: Callable[[str, str], None]) -> None:
    answer("sinfo", "echo main; echo gpu")
    answer("srun", "exit 1")
    answer("sbatch", '[ "$1" = --test-only ] || cp "$1" "$HOME/script"; echo "Submitted batch job 77"')


def test_the_script_and_what_it_starts(
    answering: Callable[[str, str], None],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stub_cluster(answering)
    monkeypatch.setenv("WANDB_API_KEY", "canary-key")
    (tmp_path / "home/.netrc").write_text("machine api.wandb.ai login user password canary-netrc\n")
    answering("cp", f'{sys.executable} -c "import shutil,sys; shutil.copy(*sys.argv[1:])" "$@"')
    options = [
        "--gpus=4",
        "--nodes=2",
        "--cpus=6",
        "--partition=gpu",
        "hydra.launcher.qos=high",
        "--copies=2",
        "wandb=online",
    ]
    printed = launched(capsys, "slurm", *options, "--dry-run", MEDIUM, "run=big", "seed=3")
    for flag in ("gpus-per-node=4", "nodes=2", "ntasks-per-node=4", "cpus-per-task=6", "partition=gpu", "qos=high",
                 "job-name=big/0", "job-name=big/1", "requeue"):  # fmt: skip
        assert f"#SBATCH --{flag}\n" in printed, flag
    assert printed.startswith("#!/bin/bash\n# Role")
    assert "# cost: not known; METTA_HOURLY_COST is not set\n" in printed
    assert not Path("train_dir").exists()
    said = launched(capsys, "slurm", *options, MEDIUM, "run=big", "seed=3")
    assert [line.split(";")[0] for line in said.splitlines()] == [f"run big/{i}: Slurm job 77" for i in range(2)]
    assert "srun" in (tmp_path / "home/script").read_text()
    written = [path for path in Path("train_dir").rglob("*") if path.is_file()]
    assert {path.suffix for path in written} == {".json", ".pkl", ".sh"}
    assert not any(b"canary" in path.read_bytes() for path in written)
    assert "canary" not in printed + said


def test_the_cost_is_of_all_nodes(
    answering: Callable[[str, str], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_cluster(answering)
    monkeypatch.setenv("METTA_HOURLY_COST", "2.5")
    printed = launched(capsys, "slurm", "--nodes=2", "--copies=3", "--timeout-hours=4", "--dry-run", MEDIUM)
    assert "# cost: $15.00 an hour (METTA_HOURLY_COST=2.5 a node), for each start of 4 h\n" in printed


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--partition=nowhere"], "--partition=nowhere is not on this cluster; there are main, gpu"),
        (["trainer.horizn=1"], "did you mean trainer.horizon?"),
        ([*AGAINST, f"{URI}=nobody.safetensors"], "nobody.safetensors"),
        (["hydra.launcher.partitoin=x"], "hydra.launcher.partitoin"),
        (["hydra/launcher=submitit_local"], "hydra/launcher=submitit_local is not one of Slurm's; use"),
        (["hydra/launcher=nobody"], "there is no hydra/launcher/nobody; "),
        (["--git-ref=main"], "unrecognized arguments: --git-ref=main; see `dual-policy launch slurm --help`"),
        (
            ["-m"],
            "-m: one launch is one run; add --copies=N for several seeds, or sweep with `dual-policy train -m ",
        ),
        (["wandb=online"], "wandb.mode=online needs a W&B login on the node, and none is here"),
    ],
)
def test_one_line_and_nothing_sent(
    words: list[str], says: str, answering: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    stub_cluster(answering)
    answering("sbatch", '[ "$1" = --test-only ] || touch "$HOME/sent"')
    assert says in error_line(capsys, "slurm", *words)
    assert not Path("train_dir").exists()
    assert not Path("~/sent").expanduser().exists()


@pytest.mark.parametrize("is_new", [True, False])
def test_a_late_refusal_leaves_nothing(
    is_new: bool, answering: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    stub_cluster(answering)
    answering("sbatch", '[ "$1" = --test-only ] || { echo "sbatch: error: invalid account" >&2; exit 1; }')
    folder = Path("train_dir/x/.submitit")
    if not is_new:
        folder.mkdir(parents=True)
        (folder / "older").write_text("")
    from dual_policy_plugin.cli import main

    assert main(["launch", "slurm", MEDIUM, "run=x"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: Slurm refuses the job: ")
    assert "invalid account" in last
    assert [path.name for path in Path("train_dir").rglob("*") if path.is_file()] == ([] if is_new else ["older"])
    assert folder.exists() != is_new


def test_uncommitted_code_is_refused(answering: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]) -> None:
    stub_cluster(answering)
    Path("new.py").write_text("")
    assert "uncommitted: new.py" in error_line(capsys, "slurm", MEDIUM)
    assert "with changes" in launched(capsys, "slurm", MEDIUM, "--skip-git-check", "--dry-run")


def test_without_slurm(answering: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, "slurm", MEDIUM)
    assert "sbatch" in line
    answering("srun", "")
    answering("sbatch", "")
    answering("sinfo", "echo 'sinfo: error: Unable to contact slurm controller' >&2; exit 1")
    line = error_line(capsys, "slurm", MEDIUM)
    assert line.startswith("error: Slurm does not answer: Unable to contact slurm controller; is its controller up")


def test_without_submitit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "launching on Slurm needs submitit: `pip install " in error_line(capsys, "slurm", MEDIUM)


def test_a_job_ends_with_the_runs_exit_code_and_is_queued_again_on_75(
    answering: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering("scontrol", f'echo "$@" >> {tmp_path}/asked')
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    for exit_code in (0, 2, 3, 7, EXIT_AGAIN):
        main = lambda words, exit_code=exit_code: exit_code if words == ["train", "x"] else 99  # noqa: E731
        job = slurm_job.TrainJob(main, ["train", "x"])
        if exit_code:
            with pytest.raises(SystemExit) as caught:
                job()
            assert caught.value.code == exit_code
        else:
            job()
        assert (tmp_path / "asked").exists() == (exit_code == EXIT_AGAIN)
    assert (tmp_path / "asked").read_text() == "requeue 41\n"
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(MAX_STARTS))
    with pytest.raises(SystemExit):
        job()
    assert (tmp_path / "asked").read_text() == "requeue 41\n"


def test_a_long_run_with_many_starts_is_queued_again(
    answering: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm counts timeouts and preemptions too; only what is soon lost again and again is left to somebody's eyes."""
    answering("scontrol", f'echo "$@" >> {tmp_path}/asked')
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(10 * MAX_STARTS))
    for lasted_s, is_queued in ((SOON_S - 60, False), (SOON_S + 60, True)):
        monkeypatch.setenv("SLURM_JOB_START_TIME", str(int(time.time() - lasted_s)))
        assert requeue_job() == is_queued
        assert (tmp_path / "asked").exists() == is_queued


@pytest.mark.parametrize(
    ("script", "is_queued", "line"),
    [
        ("echo Requested operation is presently disabled for job 41 >&2; exit 1", False, "is presently disabled"),
        ("echo Job is pending execution for job 41 >&2; exit 1", True, "job 41 is queued again"),
        ("", True, "job 41 is queued again"),
        ("kill -KILL $$", False, "exit code -9"),
        ("kill -TERM $$; echo Requested operation is presently disabled >&2; exit 1", False, "is presently disabled"),
        (None, False, "not found"),
    ],
)
def test_what_slurm_says_to_a_requeue(
    script: str | None,
    is_queued: bool,
    line: str,
    answering: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if script is not None:
        answering("scontrol", script)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    with caplog.at_level("WARNING"):
        assert requeue_job() == is_queued
    assert line in caplog.messages[0]
    assert "\n" not in caplog.messages[0]


def test_what_a_requeue_begins_is_the_same_command() -> None:
    job = slurm_job.TrainJob(len, ["train", "run=x"])
    again = job.checkpoint()
    assert again.function is job
    assert again.args == ()
