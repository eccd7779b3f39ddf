"""No secret of the user's in anything that the program writes, prints, sends or is started with.

One set of runs for all tests: a user with canaries in the environment and the home, who names some of them in configs
as `${oc.env:...}`, goes through every door. An env of the user's takes them, and witnesses by a digest that they came.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import pickle
import pickletools
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml

from dual_policy_plugin.errors import LaunchError
from dual_policy_plugin.launch.sky_sdk import load_sky
from tests.cluster.slurm import SBIN, Cluster, missing, slurm
from tests.launch.launching import git, make_checkout
from tests.launch.sky_stand_in import Cloud
from tests.security.canaries import CANARIES, ENVIRONMENT, IN_FILES, Watch, found_in, found_under, plant
from tests.services.s3_server import S3Server
from tests.services.wandb_server import WandbServer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TOLL = '''
import hashlib, json, os
from pathlib import Path
import numpy as np
from gymnasium.spaces import Box, Discrete

class Toll:
    """Two agents at a gate; who takes action 1 is paid. Breaks after `breaks` steps, and tells its token."""
    possible_agents, max_episode_steps, agents_leave, roles = ["a", "b"], 8, False, ()
    def __init__(self, breaks, token): self.breaks, self.token, self.time, self.steps = breaks, token, 0, 0
    def observation_space(self, agent): return Box(-1.0, 1.0, (2,), np.float32)
    def action_space(self, agent): return Discrete(2)
    def _seen(self): return {agent: np.float32([self.time / 8, 1]) for agent in self.agents}
    def reset(self, seed=None, options=None):
        self.agents, self.time = list(self.possible_agents), 0
        return self._seen(), {}
    def step(self, actions):
        self.time, self.steps = self.time + 1, self.steps + 1
        if self.breaks and self.steps > self.breaks:
            for path in Path(os.environ["DUAL_POLICY_HEARTBEAT"]).parent.iterdir():
                (Path(os.environ["WITNESS"]) / f"heartbeat {path.name}").write_bytes(path.read_bytes())
            raise RuntimeError(f"the gate broke on {self.token}")
        is_over = dict.fromkeys(self.agents, self.time >= 8)
        paid = {agent: float(action == 1) for agent, action in actions.items()}
        seen = self._seen()
        return seen, paid, is_over, dict.fromkeys(self.agents, False), {}

def texts(value):
    if isinstance(value, str): yield value
    elif value is not None:
        for one in (value.values() if isinstance(value, dict) else value): yield from texts(one)

def make(index, *, breaks=0, **settings):
    given = sorted(texts(settings))
    (Path(os.environ["WITNESS"]) / hashlib.sha256(json.dumps(given).encode()).hexdigest()).touch()
    return Toll(breaks, settings["token"])
'''
USER_FILE = """\
# @package _global_
env:
  filed: ${oc.env:USER_FILE_SECRET}
  dsn: postgres://me:${oc.env:DB_PASSWORD}@db.example.org/x
"""
TASK = """\
name: toll
resources: {cpus: 1+, job_recovery: {strategy: FAILOVER, max_restarts_on_errors: 0, recover_on_exit_codes: [75]}}
setup: "true"
run: |
  words=(
    run=x
  )
  printf '%s\\n' "${words[@]}"
  mkdir -p "STORAGE/$RUN"
  printf %s "$MY_SECRET" | sha256sum > "STORAGE/$RUN/witness"
  echo '{"objective": 0.5}' > "STORAGE/$RUN/result.json"
"""
SEVERAL = """\
import json, sys
from pathlib import Path
if sys.argv[1]:
    from tests.launch.sky_stand_in import Cloud
    Cloud(Path(sys.argv[1])).install(setattr)
from dual_policy_plugin.cli import main
for words in json.loads(sys.argv[2]):
    print(f"{words[:2]} ended with {main(words)}", flush=True)
"""
WORDS = [
    "env.name=toll", "env.num_envs=2", "agent=mlp", "agent.hidden_size=8", "device=cpu", "trainer.num_workers=1",
    "trainer.horizon=8", "trainer.num_minibatches=1", "trainer.threads=1", "trainer.precision=fp32",
    "trainer.total_timesteps=64", "evals.episodes=2", "+user=secretive", "+env.token='${oc.env:MY_SECRET}'",
    "+env.link='${oc.env:CHAINED_SECRET}'", "+env.chained='x-${env.link}'", "+env.odd='${oc.env:ODD_SECRET}'",
    "+env.listed=[plain,'${oc.env:LISTED_SECRET}',{deep:'${env.listed[1]}'}]",
]  # fmt: skip
_E = ENVIRONMENT
AWS = {"AWS_ACCESS_KEY_ID": "aws id", "AWS_SECRET_ACCESS_KEY": "aws secret", "AWS_SESSION_TOKEN": "aws token"}
"""Variable -> what has the same in a file."""
GIVEN = sorted([
    _E["MY_SECRET"], _E["CHAINED_SECRET"], f"x-{_E['CHAINED_SECRET']}", _E["ODD_SECRET"], "plain", _E["LISTED_SECRET"],
    _E["LISTED_SECRET"], _E["USER_FILE_SECRET"], f"postgres://me:{_E['DB_PASSWORD']}@db.example.org/x",
])  # fmt: skip
"""The texts that the env is given."""
MISPLACED = (
    "trainer.gamma", "trainer.publish_uri", "env.num_envs", "trainer.dual_policy.checkpoint_npc.uri", "+env.breaks",
)  # fmt: skip
"""Keys that cannot take such a text, and say so."""
WITNESS = hashlib.sha256(json.dumps(GIVEN).encode()).hexdigest()
MY_WITNESS = hashlib.sha256(_E["MY_SECRET"].encode()).hexdigest()


@dataclass
class World:
    """A user's machine after everything has been done, and what was seen meanwhile."""

    folder: Path
    env: dict[str, str]
    s3: S3Server
    wandb: WandbServer
    watch: Watch = field(default_factory=Watch)
    outputs: dict[str, str] = field(default_factory=dict)
    """Door -> stdout and stderr."""
    codes: dict[str, int] = field(default_factory=dict)
    slurm: Cluster | None = None

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def checkout(self) -> Path:
        return self.folder / "checkout"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def cloud(self) -> Path:
        return self.folder / "cloud"

    def go(self, door: str, words: Sequence[str], *before: str, **env: str) -> None:
        """Runs `dual-policy <words>`, perhaps behind other words, in the checkout."""
        command = [sys.executable, *(before or ("-m", "dual_policy_plugin")), *words]
        done = subprocess.run(
            command, cwd=self.checkout, env=self.env | env, capture_output=True, text=True, timeout=120, check=False
        )
        self.codes[door], self.outputs[door] = done.returncode, done.stdout + done.stderr

    def go_several(self, door: str, *commands: Sequence[str], cloud: bool = False, **env: str) -> None:
        """Runs several commands in one process, perhaps with the stand-in for SkyPilot."""
        self.go(door, [str(self.cloud) if cloud else "", json.dumps(commands)], "-c", SEVERAL, **env)

    def train(self, run: str, *more: str, npc: bool = True) -> list[str]:
        """The words of a run, against the first run's policy."""
        first = self.runs / "main/checkpoints/model_0000.safetensors"
        against = ["+dual_policy=checkpoint", f"trainer.dual_policy.checkpoint_npc.uri={first}"] if npc else []
        place = [f"run={run}", f"train_dir={self.runs}", f"hydra.searchpath=[file://{self.checkout}/team]"]
        return ["train", *place, *WORDS, *against, *more]


def make_world(folder: Path, s3: S3Server, wandb: WandbServer) -> World:
    """The user's home, checkout and installed env; the servers are told of nothing but the user's keys."""
    for name in ("home", "tmp", "runs", "witness", "storage", "cloud", "site/toll-1.dist-info"):
        (folder / name).mkdir(parents=True)
    wandb.api_key = ENVIRONMENT["WANDB_API_KEY"]
    s3.client().create_bucket(Bucket="bucket")
    (folder / "site/toll.py").write_text(TOLL)
    (folder / "site/toll-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: toll\nVersion: 1\n")
    (folder / "site/toll-1.dist-info/entry_points.txt").write_text("[dual_policy.envs]\ntoll = toll:make\n")
    checkout = make_checkout(folder / "checkout")
    (checkout / "team/user").mkdir(parents=True)
    (checkout / "team/user/secretive.yaml").write_text(USER_FILE)
    (checkout / "task.yaml").write_text(TASK.replace("STORAGE", str(folder / "storage")))
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "-m", "ours")
    git(checkout, "push", "--quiet")
    git(checkout, "remote", "set-url", "origin", f"https://{IN_FILES['git remote']}@127.0.0.1:9/x.git")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "AWS_", "SLURM"))}
    service = {name: value for name, value in wandb.env.items() if name.startswith("WANDB_")}
    service |= {name: value for name, value in s3.env.items() if name in ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")}
    for name in ("WANDB_API_KEY", "WANDB_DISABLE_GIT", "WANDB_DISABLE_CODE", "WANDB__DISABLE_META", "WANDB_CONFIG_DIR"):
        service.pop(name, None)
    own = {
        "TMPDIR": str(folder / "tmp"),
        "WITNESS": str(folder / "witness"),
        "DUAL_POLICY_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join((str(folder / "site"), str(ROOT))),
        "OMP_NUM_THREADS": "1",
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
    }
    return World(folder=folder, env=kept | service | plant(folder / "home") | own, s3=s3, wandb=wandb)


def has_sky() -> bool:
    try:
        load_sky()
    except LaunchError:
        return False
    return True


def through_slurm(world: World, folder: Path, stack: ExitStack) -> None:
    """A curriculum sweep, a launched job and a dry run on a real Slurm."""
    if missing():
        return
    world.slurm = stack.enter_context(slurm(folder))
    env = {"SLURM_CONF": str(world.slurm.conf), "MASTER_ADDR": "127.0.0.1", "PATH": SBIN}
    launch = ["launch", "slurm", "--partition=main", "--skip-git-check", *world.train("queued")[1:]]
    world.go_several("launch slurm", [*launch, "--dry-run"], launch, **env)
    ladder = f"hydra.sweeper.ladder=[{world.runs}/main]"
    sweeper = ["hydra/sweeper=dual_policy_curriculum", ladder, "hydra.sweeper.episodes=4", "hydra.sweeper.promote_at=0"]
    words = world.train("sweep", "-m", "hydra/launcher=dual_policy_slurm", *sweeper, npc=False)
    world.go("curriculum sweep", words, **env)
    deadline = time.monotonic() + 60
    while world.slurm.states() and time.monotonic() < deadline:
        time.sleep(0.1)


def through_sky(world: World) -> None:
    """A dry run, a launch and a sweep on the stand-in for SkyPilot, by a user whose keys are in files alone."""
    if not has_sky():
        return
    bucket = "trainer.sync_uri=s3://bucket/sky/"
    launch = ["launch", "sky", "train", "--gpus=0", "--jobs", "--secret=MY_SECRET", *world.train("far", bucket)[1:]]
    launch += ["wandb=online", "--skip-git-check"]
    job = ["hydra/launcher=skypilot", f"hydra.launcher.sync_uri={world.folder}/storage", "hydra.launcher.poll_s=0.1"]
    job += ["hydra.launcher.template=task.yaml", "hydra.launcher.skip_git_check=true"]
    job += ["hydra.launcher.secrets=[MY_SECRET]", "hydra.launcher.envs={PLAIN: 5}"]
    world.go_several(
        "sky", [*launch, "--dry-run"], launch, world.train("skysweep", "-m", *job),
        world.train("refused", "-m", *job, "trainer.gamma='${oc.env:MY_SECRET}'"),
        world.train("refused", "-m", *job, "+hydra.launcher.envs.TOKEN='${oc.env:MY_SECRET}'"),
        [*launch[:-1], "--git-ref=main"], cloud=True,
        **dict.fromkeys(("WANDB_API_KEY", "WANDB_BASE_URL", *AWS), ""),
    )  # fmt: skip


def through_cheap_doors(world: World) -> None:
    """What composes, pins, refuses or evaluates, without a run."""
    words, first = world.train("other"), world.runs / "main"
    players = [word for word in words if word.partition("=")[0].split(".")[0].lstrip("+") in ("env", "user", "hydra")]
    wrong = [f"{key}='${{oc.env:MY_SECRET}}'" for key in MISPLACED]
    world.go_several(
        "words",
        [*words, "--cfg", "job"],
        [*words, "--cfg", "all"],
        [*words, "--info", "all"],
        ["npc", "lock", "-o", f"{world.folder}/lock.json", *words[1:]],
        ["npc", "cache", "ls"],
        ["evaluate", f"policies=[{first},{first}/checkpoints/model_0000.safetensors]", "episodes=4", "device=cpu",
         f"out={world.folder}/evaluated.json", *players],
        *([*words, word] for word in wrong),
        ["train", "-m", *words[1:], wrong[-1], "seed=1"],
        ["npc", "lock", "-o", f"{world.folder}/none.json", *words[1:], wrong[0]],
        ["launch", "slurm", "--skip-git-check", *words[1:], wrong[0]],
        LOG_LEVEL="DEBUG", HYDRA_FULL_ERROR="1",
    )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("canaries")
    services = folder.with_name(f"{folder.name}-services")
    services.mkdir()
    with S3Server() as s3, WandbServer(services) as wandb, ExitStack() as stack:
        world = make_world(folder, s3, wandb)
        stack.enter_context(world.watch.on())
        first = ["wandb=online", "trainer.publish_uri=s3://bucket/policies/", "trainer.sync_uri=s3://bucket/runs/"]
        world.go("train", world.train("main", *first, npc=False), LOG_LEVEL="DEBUG")
        assert world.codes["train"] == 0, world.outputs["train"][-3000:]
        watched = ["watch", "--heartbeat-timeout-seconds=60", "--", sys.executable, "-m", "dual_policy_plugin"]
        doors = [
            lambda: through_slurm(world, services / "slurm", stack),
            lambda: through_sky(world),
            lambda: through_cheap_doors(world),
            lambda: world.go("crash", [*watched, *world.train("crash", "+env.breaks=20")], HYDRA_FULL_ERROR="1"),
            lambda: world.go("sweep", world.train("local", "-m", "hydra/launcher=submitit_local", "wandb=offline")),
        ]
        with ThreadPoolExecutor(3) as pool:
            for one in [pool.submit(door) for door in doors]:
                one.result()
        yield world
        Cloud(world.cloud).end()


def codes_of(world: World, door: str) -> list[int]:
    """The exit codes of several commands."""
    return [int(code) for code in re.findall(r" ended with (-?\d+)", world.outputs[door])]


def test_every_door_was_gone_through(world: World) -> None:
    codes = dict(world.codes)
    assert codes.pop("crash") == 2, world.outputs["crash"]
    assert set(codes.values()) == {0}, {door: world.outputs[door][-2000:] for door, code in codes.items() if code}
    assert codes_of(world, "words") == [0] * 6 + [2] * 8, world.outputs["words"][-3000:]
    assert "RuntimeError: the gate broke on ${oc.env:MY_SECRET}" in world.outputs["crash"], "with its traceback"
    assert " DEBUG " in world.outputs["train"]
    for run in ("main", "local/0"):
        assert json.loads((world.runs / run / "result.json").read_text())["agent_step"] == 64, run


def test_the_secrets_did_travel(world: World) -> None:
    """What is not found below was there to be found."""
    assert {path.name for path in (world.folder / "witness").iterdir()} == {WITNESS, "heartbeat heartbeat"}
    keys = [exchange.headers for exchange in world.s3.exchanges]
    assert any(ENVIRONMENT["AWS_SESSION_TOKEN"] in str(headers) for headers in keys)
    assert any("Authorization" in exchange.headers for exchange in world.wandb._http.exchanges)
    assert len(CANARIES) >= 25
    assert len(set(CANARIES.values())) == len(CANARIES)


def test_no_file_holds_one(world: World) -> None:
    assert found_under(world.folder, besides=[world.home, world.checkout / ".git", world.cloud]) == []
    names = {str(path.relative_to(world.folder)) for path in world.folder.rglob("*") if path.is_file()}
    for pattern in (
        r"runs/main/config.yaml", r"runs/main/wandb/run-.*/files/config.yaml", r"runs/main/.*\.safetensors",
        r"runs/main/state/.*", r"runs/local/\.submitit/.*_submitted\.pkl", r"runs/local/\.submitit/.*_result\.pkl",
        r"runs/local/0/wandb/offline-run-.*\.wandb", "evaluated.json", "lock.json",
    ):  # fmt: skip
        assert any(re.fullmatch(pattern, name) for name in names), pattern
    for path in ("runs/main", "runs/local/0"):
        text = (world.folder / path / "config.yaml").read_text()
        assert "token: ${oc.env:MY_SECRET}" in text
        assert "chained: x-${oc.env:CHAINED_SECRET}" in text


def test_files_with_keys_stay_the_users(world: World) -> None:
    """None of ours has one; those of the home are what they were, for nobody else to read."""
    holding = {line.partition(": ")[0] for line in found_under(world.home)}
    planted = {".netrc", ".aws/credentials", ".config/gh/hosts.yml", ".config/wandb/settings", ".git-credentials"}
    assert holding == planted | {".cache/huggingface/token"}
    assert {(world.home / name).stat().st_mode & 0o777 for name in holding} == {0o600}


def test_nothing_printed_one(world: World) -> None:
    assert {door: found_in(text.encode()) for door, text in world.outputs.items() if found_in(text.encode())} == {}
    assert "trainer.gamma='${oc.env:MY_SECRET}' is not possible; use a number" in world.outputs["words"]


def test_no_server_was_told_one(world: World) -> None:
    client = world.s3.client()
    keys = [one["Key"] for one in client.list_objects_v2(Bucket="bucket")["Contents"]]
    assert any(key.startswith("policies/") for key in keys)
    assert any(key == "runs/main/config.yaml" for key in keys)
    for key in keys:
        answer = client.get_object(Bucket="bucket", Key=key)
        shown = json.dumps([key, answer["Metadata"], answer["ResponseMetadata"]], default=str).encode()
        assert found_in(answer["Body"].read()) + found_in(shown) == [], key
    store = world.wandb.store
    (run,) = (run for project in store.projects.values() for run in project.runs.values())
    assert run.config["env"]["value"]["token"] == "${oc.env:MY_SECRET}"
    assert found_in(repr((store.projects, store.artifacts)).encode()) == []
    assert [path for path, blob in store.blobs.items() if found_in(blob)] == []
    bodies = [exchange.body for exchange in world.wandb._http.exchanges]
    assert any(b"${oc.env:MY_SECRET}" in body for body in bodies)
    assert [name for body in bodies for name in found_in(body)] == []


def test_no_command_line_had_one(world: World) -> None:
    """Besides git's own, whose helper is given the remote's URL as it stands in .git/config."""
    assert [line for line in world.watch.found() if "git remote" not in line] == []
    lines = b"\n".join(world.watch.seen)
    for word in (b"dual_policy_plugin.envs.worker_process", b"submitit.core._submit", b"dual_policy_plugin\0watch"):
        assert word in lines, word


def strings_of(pickle: bytes) -> list[str]:
    """All texts in a pickle, without running it."""
    return [argument for _, argument, _ in pickletools.genops(pickle) if isinstance(argument, str)]


def test_pickles_hold_no_environment(world: World) -> None:
    """Not even what is no secret in it; the overrides stand there as they were typed."""
    pickles = sorted(world.runs.glob("*/.submitit/**/*_submitted.pkl"))
    assert {path.relative_to(world.runs).parts[0] for path in pickles} >= {"local"}
    for path in pickles:
        strings = strings_of(path.read_bytes())
        assert any("${oc.env:MY_SECRET}" in text for text in strings)
        assert not any(world.env["WITNESS"] in text or "WANDB_API_KEY" in text for text in strings), path


def test_slurm_alone_carries_the_environment(world: World) -> None:
    """It is sbatch that hands on its environment, by default; Slurm keeps that where only its own user reads."""
    if world.slurm is None:
        pytest.skip(missing())
    assert codes_of(world, "launch slurm") == [0, 0]
    assert json.loads((world.runs / "queued/result.json").read_text())["agent_step"] == 64
    assert json.loads((world.runs / "sweep/curriculum.json").read_text())["status"] == "finished"
    scripts = [path.read_text() for path in world.runs.glob("*/.submitit/**/*.sh")]
    assert len(scripts) >= 2
    assert not any("--export" in text or "WANDB" in text or "SECRET" in text for text in scripts)
    for line in found_under(world.slurm.folder):
        path = world.slurm.folder / line.partition(": ")[0]
        assert path.suffix != ".log", line
        assert any(one.stat().st_mode & 0o077 == 0 for one in (path, *path.parents)), line


def test_skypilot_gets_them_as_secrets_alone(world: World) -> None:
    if not has_sky():
        pytest.skip("SkyPilot is not installed: pip install --no-deps -r requirements-sky.txt")
    assert codes_of(world, "sky") == [0, 0, 0, 2, 2, 2]
    calls = [json.loads(line) for line in (world.cloud / "calls.jsonl").read_text().splitlines()]
    tasks = [one["task"] for one in calls if "task" in one]
    tasks += [json.loads(path.read_text()) for path in world.cloud.glob("jobs/*/task.json")]
    given = []
    for task in tasks:
        given.append(task.pop("secrets"))
        assert found_in(json.dumps(task).encode()) == []
    keys = {"WANDB_API_KEY": IN_FILES["netrc wandb password"], "MY_SECRET": ENVIRONMENT["MY_SECRET"]}
    assert given[0] == keys | {name: IN_FILES[name_there] for name, name_there in AWS.items()}
    assert [name for name, value in given[1].items() if value] == ["MY_SECRET"]
    rest = [path for path in world.cloud.rglob("*") if path.is_file() and path.name not in ("calls.jsonl", "task.json")]
    assert [path.name for path in rest if found_in(path.read_bytes())] == []
    assert (world.folder / "storage/skysweep/0/witness").read_text().split()[0] == MY_WITNESS
    assert (world.runs / "skysweep/skypilot_jobs.json").exists()


def test_the_search_would_find_them() -> None:
    """In every form in which a text may stand in bytes."""
    secret = ENVIRONMENT["ODD_SECRET"]
    for data in (
        secret.encode(), quote(secret).encode(), json.dumps(secret).encode(), yaml.safe_dump({"a": secret}).encode(),
        base64.b64encode(b"me:" + secret.encode()), base64.urlsafe_b64encode(b"user:" + secret.encode() + b":x"),
        gzip.compress(secret.encode()), secret.encode().hex().encode(), shlex.quote(secret).encode(),
        pickle.dumps({"a": secret}), repr(secret).encode(),
    ):  # fmt: skip
        assert found_in(b"... " * (data[:2] != b"\x1f\x8b") + data) == ["ODD_SECRET"], data
