"""`dual-policy launch sky`: what is printed, what is launched, and what ends with one line and launches nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dual_policy_plugin.config import Config
from dual_policy_plugin.hydra_app.composition import compose_config
from dual_policy_plugin.launch import sky_launch
from dual_policy_plugin.launch.checkout import read_checkout
from dual_policy_plugin.launch.preflight import Preflight
from dual_policy_plugin.launch.sky_task import TaskOptions
from dual_policy_plugin.npc.lock import read_lock
from tests.launch.launching import (
    AGAINST,
    MEDIUM,
    URI,
    error_line,
    git,
    launched,
    make_checkout,
    only_this_machine,
)
from tests.launch.node import ROOT
from tests.launch.sky_stand_in import Cloud

sky: Any = pytest.importorskip("sky")
if not hasattr(sky, "Task"):
    pytest.skip("SkyPilot is not installed: pip install --no-deps -r requirements-sky.txt", allow_module_level=True)

USER_LINE = [
    "train", "--gpus=1", "--nodes=1", MEDIUM, "run=my_experiment", "trainer.dual_policy.enabled=true",
]  # fmt: skip
SMALL = [
    "env.num_envs=4", "env.episode_steps=16", "trainer.horizon=8", "trainer.num_minibatches=2", "trainer.threads=1",
    "trainer.precision=fp32", "agent.hidden_size=16", "evals.episodes=0", "device=cpu", "trainer.total_timesteps=512",
    "report=false",
]  # fmt: skip
RECORDER = """#!/bin/bash
printf '%s\\0' "$@" > "$RECORD"
"""


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """A stand-in for SkyPilot's clouds, and a clean checkout to launch from."""
    only_this_machine(tmp_path, monkeypatch)
    monkeypatch.setenv("DUAL_POLICY_VENV", "")
    monkeypatch.chdir(make_checkout(tmp_path / "code"))
    found = Cloud(tmp_path / "cloud")
    found.install(monkeypatch.setattr)
    yield found
    found.end()


def asked(cloud: Cloud) -> list[str]:
    """The calls that begin something."""
    return [one["call"] for one in cloud.calls() if "launch" in one["call"]]


def words_of(script: str) -> list[str]:
    """What the `words` of a task's script hold, as bash reads them."""
    block = script[script.index("words=(") : script.index("\n)\n") + 3]
    done = subprocess.run(
        ["bash", "-c", block + """printf '%s\\0' "${words[@]}" """], capture_output=True, check=True
    )  # fmt: skip
    return done.stdout.decode().split("\0")[:-1]


def test_the_users_line_as_it_stands(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    text = launched(capsys, "sky", *USER_LINE, "--dry-run")
    task = yaml.safe_load(text)
    as_task = sky.Task.from_yaml_config(json.loads(json.dumps(task)))
    as_task.expand_and_validate_workdir()
    as_task.expand_and_validate_file_mounts()
    comments = [line for line in text.splitlines() if line.startswith("# ")]
    head = git(Path.cwd(), "rev-parse", "HEAD")
    assert comments[0].split() == ["#", "Role", "Name", "SHA-256", "Size", "URI"]
    assert comments[1].split()[:3] == ["#", "npc", "medium"]
    assert comments[2] == f"# code: {head}"
    assert comments[3].startswith("# cost: not known; SkyPilot has no price for these machines here, and METTA_HOURLY")
    assert (task["name"], task["num_nodes"], task["workdir"]) == ("my_experiment", 1, str(Path.cwd()))
    assert set(task["resources"]["accelerators"].values()) == {1}
    assert task["envs"]["DUAL_POLICY_COMMIT"] == head
    ((place, lock),) = task["file_mounts"].items()
    assert words_of(task["run"]) == [*USER_LINE[3:], f'trainer.dual_policy.lock="{place}"']
    assert [one.uri for one in read_lock(Path(lock))] == ["builtin://arena/medium"]
    assert asked(cloud) == []


def test_options_reach_the_task(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    text = launched(
        capsys, "sky", "train", "--gpus=H100:8", "--nodes", "2", "--spot", "--cpus=16+", "--infra=aws/us-east-1",
        "--max-runtime-hours=12.5", "--heartbeat-timeout-seconds=90", "--dry-run", MEDIUM, "run=a/b c",
    )  # fmt: skip
    task = yaml.safe_load(text)
    resources = task["resources"]
    assert (task["name"], task["num_nodes"], task["envs"]["RUN"]) == ("a-b-c-0af99a60", 2, "a/b c")
    assert (resources["accelerators"], resources["use_spot"], resources["cpus"]) == ({"H100": 8}, True, "16+")
    assert resources["infra"] == "aws/us-east-1"
    assert (task["envs"]["MAX_RUNTIME_HOURS"], task["envs"]["HEARTBEAT_TIMEOUT_SECONDS"]) == ("12.5", "90")
    assert yaml.safe_load(launched(capsys, "sky", "train", "--no-spot", "--dry-run"))["resources"]["use_spot"] is False


def test_the_cost(cloud: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["sky", "train", "--gpus=H100:1", "--nodes=2", "--copies=2", "--max-runtime-hours=10", "--dry-run"]

    def cost() -> tuple[str, set[str]]:
        text = launched(capsys, *words)
        line = next(line for line in text.splitlines() if line.startswith("# cost"))
        return line, {task["envs"]["METTA_HOURLY_COST"] for task in yaml.safe_load_all(text)}

    monkeypatch.setenv("METTA_HOURLY_COST", "2.5")
    assert cost() == ("# cost: $10.00 an hour, up to $100.00 in 10 h (METTA_HOURLY_COST=2.5 a node)", {"2.500000"})
    offer = SimpleNamespace(price=3.0, spot_price=1.0)
    cloud.prices = {"H100": [offer, SimpleNamespace(price=4.0, spot_price=0.5)]}
    assert cost() == ("# cost: $12.00 an hour, up to $120.00 in 10 h (SkyPilot's price)", {"3.000000"})
    words.append("--spot")
    assert cost()[0] == "# cost: $2.00 an hour, up to $20.00 in 10 h (SkyPilot's price)"
    monkeypatch.delenv("METTA_HOURLY_COST")
    cloud.errors["list_accelerators"] = lambda _: ConnectionError("no\nroute")
    assert cost() == ("# cost: not known; the price cannot be had: no route, and METTA_HOURLY_COST is not set", {""})


def test_a_cluster_and_a_managed_job(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    said = launched(capsys, "sky", *USER_LINE)
    assert said == (
        "run my_experiment: job 1 on cluster my_experiment; `sky logs my_experiment 1`, `sky cancel my_experiment 1`, "
        "`sky down my_experiment`\n"
    )
    (call,) = cloud.calls("launch")
    assert (call["cluster_name"], call["down"], call["task"]["name"]) == ("my_experiment", False, "my_experiment")
    said = launched(capsys, "sky", *USER_LINE, "--jobs")
    assert said == "run my_experiment: managed job 2; `sky jobs logs 2`, `sky jobs cancel 2`\n"
    assert cloud.calls("jobs.launch")[0]["name"] == "my_experiment"
    launched(capsys, "sky", *USER_LINE, "--cluster", "shared")
    assert cloud.calls("launch")[1]["cluster_name"] == "shared"


def test_copies_have_seeds_and_names_of_their_own(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    launched(capsys, "sky", *USER_LINE, "seed=7", "--copies=3", "--jobs")
    tasks = [one["task"] for one in cloud.calls("jobs.launch")]
    names = [one["name"] for one in cloud.calls("jobs.launch")]
    assert names == ["my_experiment-0-a6e2878b", "my_experiment-1-2839bbd6", "my_experiment-2-b305e0a3"]
    assert [task["envs"]["RUN"] for task in tasks] == [f"my_experiment/{i}" for i in range(3)]
    for i, task in enumerate(tasks):
        config, _ = compose_config([word for word in words_of(task["run"]) if "lock=" not in word])
        assert (config.run, config.seed) == (f"my_experiment/{i}", 7 + i)


def test_an_error_between_copies_names_those_that_run(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    cloud.errors["jobs.launch"] = lambda number: RuntimeError("no quota") if number == 2 else None
    from dual_policy_plugin.cli import main

    assert main(["launch", "sky", *USER_LINE, "--copies=3", "--jobs"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        "error: job my_experiment-1-2839bbd6 could not be launched: no quota (1 of 3 copies are launched, see above)"
    )
    assert len(asked(cloud)) == 2


def test_a_ref_is_fetched_and_not_sent(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    first = git(Path.cwd(), "rev-parse", "HEAD")
    Path("new.py").write_text("")
    task = yaml.safe_load(launched(capsys, "sky", *USER_LINE, "--git-ref=main", "--dry-run"))
    assert task["workdir"] == {"url": git(Path.cwd(), "remote", "get-url", "origin"), "ref": first}
    assert task["envs"]["DUAL_POLICY_COMMIT"] == first


def test_a_curriculum_is_pinned_in_its_words(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    rungs = Path("../old run/checkpoints")
    rungs.mkdir(parents=True)
    source = next((ROOT / "dual_policy_plugin/builtin/arena").glob("weak*.safetensors"))
    for epoch in (3, 12):
        (rungs / f"model_{epoch:04d}.safetensors").write_bytes(source.read_bytes())
    given_words = [
        "+sweep=curriculum_wandb", "hydra.sweeper.ladder.uri='../old run'", "hydra.sweeper.ladder.type=latest",
        "hydra.sweeper.ladder.range=2", "seed=1,2", "run=walk", "trainer.initial_policy.uri='../old run'",
        "evals.held_out=[builtin://arena/strong]",
    ]  # fmt: skip
    text = launched(capsys, "sky", "curriculum", "--dry-run", *given_words)
    task = yaml.safe_load(text)
    words = words_of(task["run"])
    assert words[: len(given_words)] == given_words
    place = next(iter(task["file_mounts"]))
    assert place.startswith("~/.dual-policy-launch/")
    assert len(task["file_mounts"]) == 1  # both files have the same bytes
    assert f'hydra.sweeper.ladder=["file://{place}","file://{place}"]' in words
    assert [line.split()[2] for line in text.splitlines()[1:5]] == [
        "old_run.model_0003", "old_run.model_0012", "old_run.model_0012-2", "strong",
    ]  # fmt: skip
    from dual_policy_plugin.hydra_app.composition import compose_hydra_node
    from dual_policy_plugin.launch.other_tasks import _first_values

    node = compose_hydra_node(_first_values(words), "sweeper")
    assert node["ladder"] == [f"file://{place}"] * 2
    assert compose_config(_first_values(words))[0].trainer.initial_policy.uri == f"file://{place}"  # type: ignore[union-attr]


def test_players_are_pinned_in_their_word(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    source = next((ROOT / "dual_policy_plugin/builtin/arena").glob("weak*.safetensors"))
    Path("../mine.safetensors").write_bytes(source.read_bytes())
    text = launched(
        capsys, "sky", "evaluate", "--dry-run", "policies=[builtin://arena/weak,../mine.safetensors]", "episodes=8",
        "env.num_agents=4",
    )  # fmt: skip
    task = yaml.safe_load(text)
    (place,) = task["file_mounts"]
    assert words_of(task["run"]) == [
        f'policies=["builtin://arena/weak","file://{place}"]', "episodes=8", "env.num_agents=4",
    ]  # fmt: skip


LETTERS = st.characters(blacklist_characters="\0", blacklist_categories=["Cs"])
TEXTS = st.lists(st.text(LETTERS, max_size=20), max_size=6)
NASTY = [
    "a b", "'", '"', "*", "?[a-z]", "{1,2}", "$HOME", "`id`", "$(id)", "\\", "!x", "#", "~", "\n", "a\tb", "", "-n",
    "--", ")", "words=(", "x=[1, 'a b']", "é", "\u2028", "\x85", "\ufeff", "\r", "&&", ";", "|", "<x", "%s",
]  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given_words=TEXTS | st.lists(st.sampled_from(NASTY), max_size=8) | st.just(NASTY))
def test_words_reach_the_program_as_they_are(given_words: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.getbasetemp() / "words"
    recorder = home / ".dual-policy/bin/dual-policy"
    if not recorder.exists():
        recorder.parent.mkdir(parents=True)
        recorder.write_text(RECORDER)
        recorder.chmod(0o755)
    launch = sky_launch.plan_launch(
        "train",
        Preflight(config=Config(run="x"), words=tuple(given_words), entries=()),
        read_checkout(ROOT, skip_check=True),
        TaskOptions(workdir=ROOT),
    )
    printed = yaml.safe_load(sky_launch.as_yaml(launch))
    assert printed["run"] == launch.task["run"]
    task = sky.Task.from_yaml_config(printed)
    variables = {"HOME": str(home), "PATH": os.environ["PATH"], "RECORD": str(home / "record"), "OVERRIDES": ""}
    variables |= {key: str(value) for key, value in task.envs.items()} | {"SKYPILOT_NUM_NODES": "1"}
    subprocess.run(["bash", "-c", task.run], cwd=ROOT, env=variables, check=True)
    came = (home / "record").read_bytes().decode().split("\0")[:-1]
    assert came[came.index("--") + 1 :] == ["dual-policy", "train", *given_words]


def test_hydra_reads_what_was_typed(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    typed = [MEDIUM, "run='it is $HOME'", 'wandb.tags=["a b","*","it\'s"]', "evals.opponents=['builtin://arena/weak']"]
    task = yaml.safe_load(launched(capsys, "sky", "train", "--dry-run", *typed))
    config, _ = compose_config(words_of(task["run"])[:-1])
    assert config == compose_config(typed)[0]
    assert (config.run, config.wandb.tags) == ("it is $HOME", ["a b", "*", "it's"])


CANARIES = {
    "WANDB_API_KEY": "canary-wandb-" + "0" * 27, "AWS_ACCESS_KEY_ID": "CANARYAWSID",
    "AWS_SESSION_TOKEN": "canary-token", "AWS_SECRET_ACCESS_KEY": "canary-aws-secret",
    "GITHUB_TOKEN": "canary-github", "MY_TOKEN": "canary-mine",
    "WANDB_BASE_URL": "https://user:canary-url@wandb.example.org",
}  # fmt: skip


def test_keys_go_to_skypilot_and_nowhere_else(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "home/.netrc").write_text("machine api.wandb.ai login user password canary-netrc\n")
    words = [*USER_LINE, "wandb=online", "trainer.publish_uri=s3://bucket/x/", "--secret=MY_TOKEN"]
    printed = launched(capsys, "sky", *words, "--dry-run")
    assert yaml.safe_load(printed)["secrets"].keys() >= {"WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_TOKEN"}
    assert (
        "# needs: sky launch --secret AWS_ACCESS_KEY_ID --secret AWS_SECRET_ACCESS_KEY --secret AWS_SESSION_TOKEN "
        "--secret MY_TOKEN --secret WANDB_API_KEY --secret WANDB_BASE_URL ..."
    ) in printed
    seen: list[dict[str, str]] = []
    launch = sky.launch
    monkeypatch.setattr(sky, "launch", lambda task, **more: (seen.append(dict(task.secrets)), launch(task, **more))[1])
    from dual_policy_plugin.cli import main

    assert main(["launch", "sky", *words]) == 0
    output = capsys.readouterr()
    written = [path.read_text() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    scripts = [json.dumps({key: one["task"][key] for key in ("run", "setup", "envs")}) for one in cloud.calls("launch")]
    for text in (printed, output.out, output.err, *scripts, *written):
        assert not any("canary" in line.lower() for line in text.splitlines()), text
    (secrets,) = seen
    plain = {name: value.get_secret_value() for name, value in secrets.items()}
    assert plain == {name: value for name, value in CANARIES.items() if name != "GITHUB_TOKEN"}
    launched(capsys, "sky", *USER_LINE)
    assert not any(secret.get_secret_value() for secret in seen[1].values())  # a run that needs none gets none


@pytest.mark.slow
def test_a_launched_run_trains_on_its_node(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    node = Path("sky/node.sh")
    node.write_text(f"export DUAL_POLICY_VENV={sys.prefix} OMP_NUM_THREADS=1\n{node.read_text()}")  # as an image has it
    git(Path.cwd(), "commit", "--quiet", "-am", "an image")
    git(Path.cwd(), "push", "--quiet")
    (tmp_path / "mirror").mkdir()
    source = next((ROOT / "dual_policy_plugin/builtin/arena").glob("weak*.safetensors"))
    Path("../an npc.safetensors").write_bytes(source.read_bytes())
    launched(
        capsys, "sky", "train", "--gpus=0", "--jobs", *AGAINST[:1], f"{URI}='../an npc.safetensors'", "run='one two'",
        f"trainer.sync_uri={tmp_path}/mirror", *SMALL,
    )  # fmt: skip
    cloud.wait_for(lambda: cloud.status(1) in ("SUCCEEDED", "FAILED"))
    log = (cloud.folder / "jobs/1/run.log").read_text()
    assert cloud.status(1) == "SUCCEEDED", log
    assert f"code: commit {git(Path.cwd(), 'rev-parse', 'HEAD')}" in log
    result = json.loads((tmp_path / "mirror/one two/result.json").read_text())
    (npc,) = result["npcs"]
    assert npc["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert npc["uri"].startswith(f"file://{cloud.folder}/jobs/1/node0/.dual-policy-launch/")
    assert result["agent_step"] == 512


@pytest.mark.slow
def test_a_dry_run_is_quick_and_the_entry_point_is_the_same(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, ROOT / "devops/skypilot/launch.py", *USER_LINE, "--dry-run"],
        env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == launched(capsys, "sky", *USER_LINE, "--dry-run")
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)
    assert re.search(r"\| +sky$", done.stderr, re.MULTILINE)
    assert (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    )  # of work; others may share the cores


def refuse(cloud: Cloud, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line for words that launch nothing, in a dry run and without."""
    line = error_line(capsys, "sky", *words)
    assert asked(cloud) == []
    assert not (Path(os.environ["DUAL_POLICY_CACHE"]) / "launches").exists()
    return line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian", MEDIUM], "'trian' is no task that can be checked; did you mean train? there are train, train_multi"),
        (["sweep_job_group"], "'sweep_job_group' is no task that can be checked; there are train,"),
        (["train", "--gpu=1"], "unrecognized arguments: --gpu=1; did you mean --gpus? see `dual-policy launch sky"),
        (["train", "--gpu=1", "run=x"], "unrecognized arguments: --gpu=1; did you mean --gpus? see"),
        (["train", "run=x", "--gpu", "1", "--clustr=c"], "arguments: --gpu --clustr=c; did you mean --gpus? see"),
        (["train", "--infra=mars"], "--infra=mars is not possible; use CLOUD, CLOUD/REGION or"),
        (["train", "--dry-runn"], "unrecognized arguments: --dry-runn"),
        (["train", "--nodes=0"], "argument --nodes: '0' is no count of 1 or more"),
        (["train", "--gpus=a b"], "--gpus=a b is not possible"),
        (["train", "--max-runtime-hours=long"], "'long' is no number of hours"),
        (["train", "--jobs", "--cluster=x"], "--cluster=x has no effect with --jobs"),
        (["train", "--git-ref=main", "--skip-git-check"], "remove one of them"),
        (["train", "--git-ref=nowhere"], "--git-ref=nowhere is not on the remote"),
        (["train", "-m", "seed=1,2"], "-m: one launch is one run; add --copies=N for several seeds, or sweep with"),
        (["train", "run"], "'run' cannot be read; an override is key=value"),
        (["train", "trainer.horizn=1"], "did you mean trainer.horizon?"),
        (["train", "env.num_agents=1"], "env.num_agents=1"),
        (["train", *AGAINST, f"{URI}=nobody.safetensors"], "nobody.safetensors"),
        (["train", *AGAINST, f"{URI}=wandb://a/b/model/c:v1"], "wandb"),
        (["train", "wandb=online"], "wandb.mode=online needs a W&B login on the node, and none is here"),
        (["train", "trainer.sync_uri=s3://bucket/x/"], "trainer.sync_uri needs an AWS login on the node, "),
        (["train", "--secret=MISSING_ONE"], "--secret=MISSING_ONE: the variable MISSING_ONE is not set here"),
        (["train", "--secret=A=canary"], "argument --secret: 'A' is no variable's name; give no value with it"),
        (["curriculum"], "hydra.sweeper.ladder is not set; add +sweep=curriculum_builtin"),
        (["evaluate"], "policies= is there 0 times; name the players once"),
        (["train", "--confirm"], "--confirm asks at a terminal, and standard input is none"),
    ],
)  # fmt: skip
def test_one_line_and_nothing_launched(
    words: list[str], says: str, cloud: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    if words[-1] == "--confirm":
        from dual_policy_plugin.cli import main

        assert main(["launch", "sky", *words]) == 2
        assert says in capsys.readouterr().err.splitlines()[-1]
        assert asked(cloud) == []
        return
    assert says in refuse(cloud, capsys, *words)


def test_uncommitted_code_is_refused(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    Path("new.py").write_text("")
    assert "uncommitted: new.py; commit and push first" in refuse(cloud, capsys, *USER_LINE)
    head = git(Path.cwd(), "rev-parse", "HEAD")
    text = launched(capsys, "sky", *USER_LINE, "--skip-git-check", "--dry-run")
    assert yaml.safe_load(text)["envs"]["DUAL_POLICY_COMMIT"] == f"{head} with changes"


def test_another_folder_is_refused(cloud: Cloud, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    os.chdir(tmp_path / "home")  # the fixture's chdir is undone
    assert "has no sky/setup.sh, which a node begins with" in refuse(cloud, capsys, *USER_LINE, "--skip-git-check")


def test_without_skypilot(cloud: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sky", ModuleType("sky"))  # what `import sky` finds in a checkout without it
    assert "SkyPilot is not installed here; " in error_line(capsys, "sky", *USER_LINE)


def test_confirm_asks(cloud: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from dual_policy_plugin.cli import main

    for answer, code in (("n", 2), ("", 2), ("y", 0)):
        stdin = SimpleNamespace(isatty=lambda: True, readline=lambda answer=answer: f"{answer}\n")
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["launch", "sky", *USER_LINE, "--confirm"]) == code
        assert "launch? [y/N] " in capsys.readouterr().err
        assert len(asked(cloud)) == (answer == "y")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    from dual_policy_plugin.cli import main

    assert main(["launch", "--help"]) == 0
    assert "slurm" in capsys.readouterr().out
    assert main(["launch", "sky", "--help"]) == 0
    assert "--heartbeat-timeout-seconds" in capsys.readouterr().out


def test_names_stay_apart() -> None:
    for kept in ("x", "my_experiment", "a-b", "v1.2", "run-1", "a" * 56):
        assert sky_launch.task_name(kept) == kept
    runs = [f"{'long ' * 20}{i}" for i in range(3)] + [
        "a/b",
        "a b",
        "a-b",
        "a-b/",
        "-a",
        "a",
        "a.",
        "1",
        "run-1",
        "日本",
    ]
    runs += ["///", "run", "/", "1" * 57, "1" * 80, "a" * 56, "a" * 57, "_"]
    names = [sky_launch.task_name(run) for run in runs]
    assert len(set(names)) == len(runs)
    for name in names:
        assert len(name) <= 60
        sky.utils.common_utils.check_cluster_name_is_valid(name)
