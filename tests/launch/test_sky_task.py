"""Every YAML of `sky/` and every task made from one is a task for SkyPilot, and its words reach the process."""

from __future__ import annotations

import copy
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dual_policy_plugin.errors import LaunchError
from dual_policy_plugin.hydra_app.composition import compose_config
from dual_policy_plugin.launch.sky_task import TASK_DIR, TaskOptions, build_task, read_template
from tests.launch.node import ROOT, make_home

sky: Any = pytest.importorskip("sky")
if not hasattr(sky, "Task"):
    pytest.skip("SkyPilot is not installed: pip install --no-deps -r requirements-sky.txt", allow_module_level=True)

SINGLE = ("train", "train_multinode", "curriculum", "evaluate")
SECRETS = {"WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}


def documents(name: str) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all((TASK_DIR / f"{name}.yaml").read_text()) if "run" in one]


def as_task(config: dict[str, Any], **envs: str) -> Any:
    """The task that SkyPilot makes of a config, which it takes apart."""
    return sky.Task.from_yaml_config(copy.deepcopy(config), env_overrides=list(envs.items()))


def check(task: Any) -> None:
    """All of SkyPilot's own checks but the one that asks the clouds' catalogs."""
    task.validate_name()
    task.validate_run()
    task.expand_and_validate_workdir()
    task.expand_and_validate_file_mounts()


def made(words: list[str] | None = None, template: str = "train", **options: Any) -> dict[str, Any]:
    return build_task(
        read_template(template),
        name="a-task",
        run="x",
        words=["run=x"] if words is None else words,
        options=TaskOptions(**options),
    )


def test_there_are_five_and_no_package() -> None:
    assert {path.stem for path in TASK_DIR.glob("*.yaml")} == {*SINGLE, "sweep_job_group"}
    assert not (TASK_DIR / "__init__.py").exists()  # it would hide SkyPilot's own


@pytest.mark.parametrize("name", [*SINGLE, "sweep_job_group"])
def test_every_yaml_is_a_task(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # workdir: .
    for config in documents(name):
        task = as_task(config)
        check(task)
        assert task.num_nodes == (2 if name == "train_multinode" else 1)
        assert set(task.secrets) == SECRETS
        assert not any(secret.get_secret_value() for secret in task.secrets.values())
        for resources in task.resources:
            assert resources.job_recovery == {
                "strategy": "FAILOVER", "max_restarts_on_errors": 0, "recover_on_exit_codes": [75],
            }  # fmt: skip
            assert name == "sweep_job_group" or resources.autostop_config.idle_minutes == 10
        scripts = config["setup"] + config["run"] + (TASK_DIR / "node.sh").read_text()
        scripts += (TASK_DIR / "setup.sh").read_text()
        unread = {key for key in config["envs"] if not re.search(rf"\b{key}\b", scripts)}
        assert unread <= {"METTA_HOURLY_COST", "AWS_ENDPOINT_URL"}


def test_what_the_readme_says() -> None:
    uri = "wandb://entity/project/model/name:v3"
    task = sky.Task.from_yaml_config(read_template("train"), env_overrides=[("RUN", "x"), ("NPC_URI", uri)])
    assert (task.envs["RUN"], task.envs["NPC_URI"]) == ("x", uri)


def test_the_sweep_is_a_job_group() -> None:
    from sky.utils import dag_utils

    group = dag_utils.load_job_group_from_yaml(str(TASK_DIR / "sweep_job_group.yaml"), [("RUN", "mine")])
    assert (group.name, group.is_job_group(), group.inter_connection) == ("dual-policy-sweep", True, False)
    assert [task.name for task in group.tasks] == ["seed-1", "seed-2", "seed-3"]
    assert {task.envs["RUN"] for task in group.tasks} == {"mine"}
    one, *others = documents("sweep_job_group")
    for number, other in enumerate(others, 2):
        assert other.pop("name") == f"seed-{number}"
        assert other["run"].replace(f"seed-{number}", "seed-1").replace(f"seed={number}", "seed=1") == one["run"]
        assert other | {"run": "", "name": ""} == one | {"run": "", "name": ""}  # they are one job but for the seed


@pytest.mark.parametrize(
    ("gpus", "accelerators"),
    [
        ("0", None),
        ("2", {"L4": 2, "A10G": 2, "L40S": 2, "A100": 2, "A100-80GB": 2, "H100": 2, "H200": 2}),
        ("H100:8", {"H100": 8}),
        ("A100-80GB", {"A100-80GB": 1}),
    ],
)
def test_gpus(gpus: str, accelerators: dict[str, int] | None) -> None:
    resources = as_task(made(gpus=gpus)).resources
    got = {kind: count for one in resources for kind, count in (one.accelerators or {}).items()}
    assert got == (accelerators or {})


@pytest.mark.parametrize("gpus", ["", "H100:", "H100:x", ":2", "H100:0", "H100:1:2", "-1", "1.5", "a b"])
def test_gpus_that_cannot_be(gpus: str) -> None:
    with pytest.raises(LaunchError, match=re.escape(f"--gpus={gpus} is not possible; use a count")):
        made(gpus=gpus)


def test_options_reach_the_task(tmp_path: Path) -> None:
    task = as_task(
        made(nodes=3, spot=True, cpus="8+", gpus="L4:1", infra="aws/us-east-1", max_runtime_hours=1.5,
             heartbeat_timeout_s=600, workdir=tmp_path)
    )  # fmt: skip
    (resources,) = task.resources
    assert (task.name, task.num_nodes, task.workdir) == ("a-task", 3, str(tmp_path))
    assert (resources.use_spot, resources.cpus, str(resources.infra.to_str())) == (True, "8+", "aws/us-east-1")
    assert resources.autostop_config.down
    assert task.envs["MAX_RUNTIME_HOURS"] == "1.5"
    assert task.envs["HEARTBEAT_TIMEOUT_SECONDS"] == "600"
    assert task.envs["RUN"] == "x"
    assert not {"NPC_URI", "TOTAL_TIMESTEPS", "SYNC_URI"} & set(task.envs)  # the words say it


@pytest.mark.parametrize(("infra", "down"), [("aws", False), (None, False), ("k8s/mine", True), ("slurm/mine", True)])
def test_an_idle_cluster_keeps_its_disk_where_it_can(infra: str | None, down: bool) -> None:
    assert made(infra=infra)["resources"]["autostop"] == {"idle_minutes": 10, **({"down": True} if down else {})}


def test_a_git_ref_is_fetched_by_the_node() -> None:
    task = as_task(made(git_ref="v1.2", git_url="https://example.com/a.git"))
    assert task.workdir == {"url": "https://example.com/a.git", "ref": "v1.2"}
    with pytest.raises(LaunchError, match=r"the nodes cannot fetch v1\.2: the repository has no remote; add one"):
        made(git_ref="v1.2")


def test_files_and_variables(tmp_path: Path) -> None:
    (tmp_path / "npc.lock.json").write_text("{}")
    template = read_template("train")
    before = copy.deepcopy(template)
    config = build_task(
        template, name="a", run="x", words=["run=x"], options=TaskOptions(),
        files={"~/npc.lock.json": tmp_path / "npc.lock.json"}, envs={"METTA_HOURLY_COST": "2.5"},
    )  # fmt: skip
    task = as_task(config)
    check(task)
    assert task.file_mounts == {"~/npc.lock.json": str(tmp_path / "npc.lock.json")}
    assert task.envs["METTA_HOURLY_COST"] == "2.5"
    assert template == before


def test_no_such_template() -> None:
    with pytest.raises(LaunchError, match="tarin is no SkyPilot task; there are curriculum, evaluate, sweep_job_group"):
        read_template("tarin")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a `dual-policy` that writes down the words it was given."""
    home = make_home(tmp_path_factory.mktemp("node"))
    stand_in = home / "venv/bin/dual-policy"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text('#!/bin/bash\nprintf "%s\\0" "$@" > "$HOME/words"\n')
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    return home


# what a command line can hold: no NUL, and nothing that is no text
WORDS = st.lists(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from(["'", '"', "$HOME", "`id`", "$(id)", "*", "[ab]", "{a,b}", "~", "!", "\\", "\n", "a\n)\n", "#"]),
    max_size=5,
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(words=WORDS)
def test_words_reach_the_process(home: Path, words: list[str]) -> None:
    """Through SkyPilot's own reading and writing of the task, and a real shell."""
    written = yaml.safe_dump(made(words))
    script = as_task(yaml.safe_load(written)).to_yaml_config()["run"]
    envs = {"HOME": str(home), "PATH": os.environ["PATH"], "DUAL_POLICY_VENV": str(home / "venv")}
    envs |= {"HEARTBEAT_TIMEOUT_SECONDS": "0", "MAX_RUNTIME_HOURS": "0", "SKYPILOT_NUM_NODES": "1"}
    subprocess.run(["bash", "-c", script], cwd=home / "sky_workdir", env=envs, check=True, capture_output=True)
    got = (home / "words").read_bytes().decode().split("\0")[:-1]
    assert got[got.index("--") + 1 :] == ["dual-policy", "train", *words]


def words_of(config: dict[str, Any], home: Path, **envs: str) -> list[str]:
    """What stands behind `--` when a task's `run` calls the watch, but for the program's name."""
    variables = config["envs"] | config["secrets"] | envs | {"HOME": str(home), "PATH": os.environ["PATH"]}
    variables |= {"DUAL_POLICY_VENV": str(home / "venv"), "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}
    variables |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    subprocess.run(["bash", "-c", config["run"]], cwd=home / "sky_workdir", env=variables, check=True)
    words = (home / "words").read_bytes().decode().split("\0")[:-1]
    return words[words.index("--") + 1 :]


@pytest.mark.parametrize("name", ["train", "train_multinode", "sweep_job_group"])
def test_the_inputs_reach_the_config(name: str, home: Path) -> None:
    inputs = {"RUN": "a run", "NPC_URI": "s3://b/k=1/x.pt", "TOTAL_TIMESTEPS": "512", "SYNC_URI": "s3://bucket/k=1/"}
    for number, document in enumerate(documents(name), 1):
        words = words_of(document, home, **inputs)
        if name == "train_multinode":
            assert " ".join(words[: words.index("train")]) == (
                "torchrun --nnodes 1 --node-rank 0 --nproc-per-node 1 --master-addr 10.0.0.1 --master-port 29500 "
                "-m dual_policy_plugin"
            )
        config, _ = compose_config(words[words.index("train") + 1 :])
        assert config.run == ("a run" if name != "sweep_job_group" else f"a run-seed-{number}")
        assert config.seed == number
        assert config.trainer.dual_policy.sources[0].uri == "s3://b/k=1/x.pt"
        assert (config.trainer.total_timesteps, config.trainer.sync_uri) == (512, "s3://bucket/k=1/")
        plain, _ = compose_config(words_of(document, home)[words.index("train") + 1 :])
        assert plain.trainer.sync_uri is None


def test_several_gpus_mean_several_processes(home: Path) -> None:
    words = words_of(documents("train")[0], home, SKYPILOT_NUM_GPUS_PER_NODE="4")
    assert words[:7] == ["torchrun", "--nnodes", "1", "--node-rank", "0", "--nproc-per-node", "4"]


def test_the_inputs_of_a_curriculum_and_of_an_evaluation(home: Path) -> None:
    words = words_of(documents("curriculum")[0], home, RUN="c", SWEEP="curriculum_self_play", SYNC_URI="s3://b/")
    assert words == ["dual-policy", "train", "+sweep=curriculum_self_play", 'run="c"', 'trainer.sync_uri="s3://b/"']
    words = words_of(documents("evaluate")[0], home, POLICIES="a,b", EPISODES="8", OUT="c.json")
    assert words == ["dual-policy", "evaluate", "policies=[a,b]", "episodes=8", "out=c.json"]


def test_a_word_with_nul_is_refused() -> None:
    with pytest.raises(LaunchError, match="has a NUL character"):
        made(["a\0b"])


def test_the_installed_click_is_one_that_sky_launch_works_with() -> None:
    """A later one gives False for an option that was not given, and `sky launch` refuses every task."""
    program = (
        "from sky.client.cli.command import launch\n"
        "print(launch.make_context('launch', ['sky/train.yaml']).params['backend_name'])"
    )
    words = [sys.executable, "-W", "ignore", "-c", program]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "None\n"
