"""Sweeps of `dual-policy train` on SkyPilot: real runs on the stand-in's nodes, and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from safetensors import safe_open

from dual_policy_plugin.cli import main
from dual_policy_plugin.errors import LaunchError
from dual_policy_plugin.launch import sky_sweep
from dual_policy_plugin.launch.sky_jobs import SkyJob
from dual_policy_plugin.launch.sky_prepare import SweepJob
from dual_policy_plugin.launch.sky_sdk import load_sky
from dual_policy_plugin.npc.lock import read_lock
from dual_policy_plugin.npc.sources.local import file_digest
from tests.launch.sky_stand_in import Cloud

try:
    sky = load_sky()
except LaunchError:
    pytest.skip("SkyPilot is not installed: pip install --no-deps -r requirements-sky.txt", allow_module_level=True)

REPOSITORY = Path(__file__).resolve().parent.parent.parent
STAND_IN = Path(__file__).with_name("sky_stand_in.py")
SMALL = [
    "env.num_envs=8", "env.episode_steps=16", "trainer.horizon=8", "trainer.num_minibatches=2", "trainer.threads=1",
    "trainer.precision=fp32", "trainer.total_timesteps=300", "agent.hidden_size=16", "evals.episodes=8", "device=cpu",
    "report=false",
]  # fmt: skip
NPC = ["+dual_policy=checkpoint", "trainer.dual_policy.checkpoint_npc.uri=builtin://arena/random"]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what a node begins with, as the working directory."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "sky").symlink_to(REPOSITORY / "sky")
    (tmp_path / "storage").mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def cloud(tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    one = Cloud(tmp_path / "cloud")
    one.install(monkeypatch.setattr)
    yield one
    one.end()


def sweep_words(folder: Path, *more: str) -> list[str]:
    """The words of a sweep under `folder`."""
    envs = f"{{DUAL_POLICY_VENV: '{sys.prefix}', OMP_NUM_THREADS: 1}}"
    launcher = [
        "hydra/launcher=skypilot", f"hydra.launcher.sync_uri={folder / 'storage'}", "hydra.launcher.gpus=0",
        "hydra.launcher.poll_s=0.1", "hydra.launcher.skip_git_check=true", f"hydra.launcher.envs={envs}",
    ]  # fmt: skip
    return ["train", "-m", *launcher, *SMALL, f"train_dir={folder / 'train_dir'}", "run=s", *more]


def results(folder: Path) -> dict[str, Any]:
    paths = sorted((folder / "train_dir" / "s").glob("*/result.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


@pytest.mark.slow
def test_four_runs_come_back_with_their_results_and_policies(cloud: Cloud, tmp_path: Path) -> None:
    words = sweep_words(tmp_path, *NPC, "hydra.launcher.max_parallel=2", "seed=1,2", "trainer.horizon=8,16")
    assert main(words) == 0
    found = results(tmp_path)
    assert list(found) == ["0", "1", "2", "3"]
    assert cloud.most_at_once() == 2
    for num, result in found.items():
        folder = tmp_path / "train_dir" / "s" / num
        with safe_open(folder / result["checkpoint"], "np") as policy:
            assert policy.keys()
        config = (folder / "config.yaml").read_text()
        assert f"run: s/{num}" in config
        assert f"seed: {1 + int(num) % 2}" in config
        assert [entry.requested for entry in read_lock(folder / "npc.lock.json")] == ["builtin://arena/random"]
    digests = {file_digest(tmp_path / "train_dir" / "s" / num / one["checkpoint"]) for num, one in found.items()}
    assert len(digests) == 4
    calls = len(cloud.calls("jobs.launch"))
    assert main(words) == 0, "the same command takes the results that are there"
    assert len(cloud.calls("jobs.launch")) == calls == 4


@pytest.mark.slow
def test_a_curriculum_walks_through_its_rungs_on_nodes(cloud: Cloud, tmp_path: Path) -> None:
    ladder = "[builtin://arena/random,builtin://arena/random]"
    gate = ["hydra.sweeper.episodes=64", "hydra.sweeper.promote_at=0.2"]
    words = ["hydra/sweeper=dual_policy_curriculum", f"hydra.sweeper.ladder={ladder}", *gate]
    assert main(sweep_words(tmp_path, *words)) == 0
    state = json.loads((tmp_path / "train_dir" / "s" / "curriculum.json").read_text())
    assert (state["status"], len(state["jobs"]), len(cloud.jobs())) == ("finished", 2, 2)
    task = json.loads((cloud.folder / "jobs" / "2" / "task.json").read_text())
    first = tmp_path / "train_dir" / "s" / state["jobs"][0]["checkpoint"]
    carried = {place: source for place, source in task["file_mounts"].items() if place.endswith(".safetensors")}
    assert carried == {f"~/.dual-policy-launch/{file_digest(first)}.safetensors": str(first)}
    second = tmp_path / "train_dir" / "s" / "1" / "npc.lock.json"
    assert {entry.role: entry.sha256 for entry in read_lock(second)}["initial"] == file_digest(first)


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_with_the_runs_it_launched(cloud: Cloud, tmp_path: Path) -> None:
    words = sweep_words(tmp_path, *NPC, "seed=1,2")
    cloud.fault("jobs.launch", 2, "after")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    killed = subprocess.run(
        [sys.executable, str(STAND_IN), str(cloud.folder), *words], env=environment, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert len(cloud.jobs()) == 2
    assert main(words) == 0
    assert len(cloud.jobs()) == 2
    assert list(results(tmp_path)) == ["0", "1"]


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a sweep that ends with exit code 2."""
    assert main(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=1,2", "hydra.launcher.sync_uri=null"], "job 0: hydra.launcher.sync_uri is not set, and no run"),
        (["seed=1,2", "hydra.launcher.sync_uri=/nowhere"], "job 0: hydra.launcher.sync_uri=/nowhere is no folder"),
        (
            ["hydra.launcher.sync_uri=null", "trainer.sync_uri=/nowhere"],
            "job 0: trainer.sync_uri=/nowhere is no folder",
        ),
        (["trainer.sync_uri=gs://b/x"], "job 0: trainer.sync_uri=gs://b/x is not possible"),
        (["hydra.launcher.sync_uri=gs://b/x"], "hydra.launcher.sync_uri=gs://b/x is not possible"),
        (["trainer.gamma=0.9,1.5"], "job 1 (trainer.gamma=1.5): trainer.gamma=1.5 is not possible"),
        (["env.episode_steps=16,0"], "job 1: env.episode_steps=0 is not possible"),
        (["trainer.dual_policy.checkpoint_npc.uri=builtin://arena/weak,builtin://arena/x"], "job 1: "),
        (["hydra.launcher.mode=cluster"], "hydra.launcher.mode=cluster needs a name"),
        (["hydra.launcher.cluster=x"], "hydra.launcher.cluster=x has no effect with mode=jobs"),
        (["hydra.launcher.max_parallel=0"], "hydra.launcher.max_parallel=0 is not possible"),
        (["hydra.launcher.secrets=['A=b']"], "hydra.launcher: 'A' is no variable's name"),
        (["hydra.launcher.template=trian"], "job 0: trian is no SkyPilot task; there are"),
        (["hydra.launcher.gpus=many:x"], "job 0: hydra.launcher.gpus=many:x is not possible"),
        (["hydra.launcher.infra=mars"], "hydra.launcher.infra=mars is not possible; use CLOUD, CLOUD/REGION or"),
        (["hydra.launcher.skip_git_check=false"], "is no git checkout; cd into your checkout, or send the folder as"),
        (["hydra.searchpath=[file://FOLDER/elsewhere]"], "job 0: the configs in "),
    ],
)
def test_a_mistake_is_one_line_and_launches_nothing(
    cloud: Cloud,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    (tmp_path / "elsewhere").mkdir()
    words = [word.replace("FOLDER", str(tmp_path)) for word in words]
    line = refused(sweep_words(tmp_path, *NPC, *words), capsys)
    assert said in line
    assert "--" not in line, "flags of another command"
    assert cloud.calls("jobs.launch") == []
    assert not (tmp_path / "train_dir" / "s").exists()


def test_a_refused_sweep_leaves_what_stood_in_its_folder(
    cloud: Cloud, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "train_dir" / "s" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    refused(sweep_words(tmp_path, *NPC, "hydra.launcher.infra=mars"), capsys)
    assert {path.name for path in notes.parent.iterdir()} == {"notes.txt", "multirun.yaml"}


def test_a_result_that_stood_in_the_storage_before_is_known_by_its_digest(
    cloud: Cloud, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "storage" / "s" / "0" / "result.json"
    old.parent.mkdir(parents=True)
    old.write_text('{"objective": 0.25}')
    cloud.errors["jobs.launch"] = lambda _: sky.exceptions.NoCloudAccessError("none")
    words = sweep_words(tmp_path, *NPC, "seed=1,2")
    refused(words, capsys)
    entries = json.loads((tmp_path / "train_dir" / "s" / "skypilot_jobs.json").read_text())["jobs"]
    assert entries["0"]["before"] == file_digest(old)
    job = SkyJob(num=0, run="s/0", sync_uri=str(tmp_path / "storage"), words=(), make_task=dict)
    composed = OmegaConf.create({"trainer": {}, "agent": {}, "env": {}, "run": "s"})
    ours = SweepJob(num=0, overrides=(), config=composed, folder=tmp_path / "here")
    assert sky_sweep._fetch(job, ours, file_digest(old)) is None
    assert not ours.folder.exists()
    assert sky_sweep._fetch(job, ours, "another") == sky_sweep._fetch(job, ours, None) == {"objective": 0.25}


def test_keys_that_a_node_needs_must_be_here(
    cloud: Cloud, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith(("AWS_", "WANDB_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    words = sweep_words(tmp_path, *NPC, "seed=1,2")
    assert "needs a W&B login on the node, and none is here" in refused([*words, "wandb=online"], capsys)
    line = refused([*words, "hydra.launcher.sync_uri=s3://bucket/x/"], capsys)
    assert "needs an AWS login on the node, and none is here" in line
    assert cloud.calls("jobs.launch") == []


def test_without_skypilot_one_line_says_how_to_install_it(
    cloud: Cloud, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sky", types.ModuleType("sky"))  # as a folder of that name imports
    assert refused(sweep_words(tmp_path, "seed=1,2"), capsys).startswith("SkyPilot is not installed here; `pip install")


def test_without_access_to_a_cloud_one_line_says_what_to_ask(
    cloud: Cloud, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud.errors["jobs.launch"] = lambda _: sky.exceptions.NoCloudAccessError(
        "\x1b[31mCloud access is not set up.\x1b[0m"
    )
    line = refused(sweep_words(tmp_path, *NPC, "seed=1,2"), capsys)
    assert re.fullmatch(
        r"job dp-s-0-[0-9a-f]{10}-1 could not be launched: Cloud access is not set up; "
        r"`sky check` says which clouds can be used, and what each of them wants",
        line,
    )
    assert cloud.jobs() == []


def test_what_a_node_is_told(cloud: Cloud, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cloud.errors["jobs.launch"] = lambda _: sky.exceptions.NoCloudAccessError("none")
    more = ["seed=7", "+user=demo", "hydra.launcher.spot=true", "hydra.launcher.infra=aws/us-east-1"]
    limits = ["hydra.launcher.max_runtime_hours=1.5", "hydra.launcher.heartbeat_timeout_seconds=60"]
    refused([*sweep_words(tmp_path, *NPC, *more, *limits), "run=2025_11_21", "hydra.launcher.gpus=H100:2"], capsys)
    (call,) = cloud.calls("jobs.launch")
    words = call["task"]["run"].partition("words=(\n")[2].partition("\n)\n")[0].split("\n  ")
    said = [word.strip() for word in words]
    assert "seed=7" in said
    assert "+user=demo" in said
    assert "'run=\"2025_11_21/0\"'" in said
    assert f"'trainer.sync_uri=\"{tmp_path / 'storage'}\"'" in said
    assert [word for word in said if "train_dir" in word or "launcher" in word] == []
    resources = call["task"]["resources"]
    assert (resources["infra"], resources["use_spot"]) == ("aws/us-east-1", True)
    assert resources["accelerators"] == {"H100": 2}
    assert resources["job_recovery"]["recover_on_exit_codes"] == [75]
    envs = call["task"]["envs"]
    assert (envs["MAX_RUNTIME_HOURS"], envs["HEARTBEAT_TIMEOUT_SECONDS"]) == ("1.5", "60")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_ended_by_a_signal_leaves_its_jobs(cloud: Cloud, tmp_path: Path, how: int) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    words = [*sweep_words(tmp_path, *NPC, "seed=1"), "trainer.total_timesteps=1000000"]
    with subprocess.Popen(
        [sys.executable, str(STAND_IN), str(cloud.folder), *words],
        env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as sweep:  # fmt: skip
        cloud.wait_for(lambda: len(cloud.calls("jobs.queue_v2")) >= 2)
        sweep.send_signal(how)
        _, said = sweep.communicate(timeout=30)
    assert sweep.returncode == (130 if how == signal.SIGINT else -how)
    time.sleep(0.1)
    assert cloud.status(1) == "RUNNING"
    if how == signal.SIGINT:
        assert f"left running: {cloud.names()[0]} (id 1); the same command finds them again" in said
        assert "interrupted; the same command continues the run" in said


def test_the_launcher_composes_for_every_app() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "dual_policy_plugin", "train", "hydra/launcher=skypilot", "--cfg", "hydra"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "_target_: hydra_plugins.dual_policy.skypilot_launcher.SkyPilotLauncher" in shown.stdout
    assert shown.stderr == ""


@pytest.mark.slow
def test_a_run_whose_machine_is_taken_away_goes_on_on_another(cloud: Cloud, tmp_path: Path) -> None:
    saved = tmp_path / "storage" / "s" / "0" / "checkpoints" / "model_0040.safetensors"

    def take_away() -> None:
        cloud.wait_for(saved.exists, 120)
        cloud.preempt(1)

    thread = threading.Thread(target=take_away)
    thread.start()
    more = ["seed=1", "trainer.total_timesteps=40000", "trainer.checkpoint_interval=20", "trainer.state_interval_s=1"]
    assert main(sweep_words(tmp_path, *NPC, *more)) == 0
    thread.join()
    assert cloud.history(1) == ["PENDING", "RUNNING", "RECOVERING", "RUNNING", "SUCCEEDED"]
    assert results(tmp_path)["0"]["agent_step"] >= 40000
    lines = (tmp_path / "train_dir" / "s" / "0" / "metrics.jsonl").read_text().splitlines()
    iterations = [json.loads(line)["iteration"] for line in lines]
    assert iterations == list(range(iterations[0], iterations[0] + len(iterations)))
    log = (cloud.folder / "jobs" / "1" / "run.log").read_text()
    assert log.count("Dual-policy system initialized") == 2
    assert log.count("win rate against random") == 1, "the first machine's processes ended with it"
    goes_on = re.search(r"continues from its mirror .*: iteration (\d+),", log)
    assert goes_on is not None
    assert int(goes_on[1]) >= 20
