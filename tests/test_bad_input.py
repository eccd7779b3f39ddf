"""Bad input through the real program: one line that names key (or file), value and mend, exit code 2, nothing lost.

All bad starts of the table share one run folder beside the folder of a finished run: a start that failed must neither
harm what stands there nor be in the way of the next start.
"""

import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dual_policy_plugin
from dual_policy_plugin import load_policy_from_checkpoint
from dual_policy_plugin.checkpoint import PolicyFile, decode_policy, encode_policy
from dual_policy_plugin.cli import main
from dual_policy_plugin.policies.build import build_policy
from dual_policy_plugin.types import ObservationSpace
from tests.harness import logging_as_it_was

ROOT = Path(dual_policy_plugin.__file__).parent.parent
PCT = "trainer.dual_policy.training_agents_pct"
URI = "trainer.dual_policy.checkpoint_npc.uri"
INITIAL = "trainer.initial_policy.uri"
TOTAL = "trainer.total_timesteps"
STEPS = 128  # learner steps of an iteration of SMALL
SMALL = [
    "env.num_envs=4", "trainer.horizon=8", "trainer.num_minibatches=2", "trainer.threads=1", "trainer.precision=fp32",
    "agent.hidden_size=16", "evals.episodes=0", "device=cpu", "report=false",
]  # fmt: skip
ARENA = [*SMALL, "env.episode_steps=16", "+dual_policy=checkpoint", f"{URI}=builtin://arena/forager"]
TOY = [*SMALL, "env.name=toy_game"]
TOY_MODULE = '''
from types import SimpleNamespace

import numpy as np


class ToyGame:
    """A ParallelEnv that pays 1 a step, and all, the first or the last agent infinity from step `breaks_at` on."""

    def __init__(self, seats, breaks_at, paid):
        self.possible_agents = tuple(f"seat_{i}" for i in range(seats))
        self.breaks_at, self.paid, self.max_episode_steps = breaks_at, paid, 64

    def observation_space(self, agent):
        return SimpleNamespace(shape=(2,), low=0.0, high=1.0)

    def action_space(self, agent):
        return SimpleNamespace(n=2, start=0)

    def _seen(self):
        return {agent: np.full(2, self.t / 64, np.float32) for agent in self.possible_agents}

    def reset(self, seed=None, options=None):
        self.t, self.agents = 0, list(self.possible_agents)
        return self._seen(), {}

    def step(self, actions):
        self.t += 1
        broken = {"first": self.agents[:1], "last": self.agents[-1:]}.get(self.paid, self.agents)
        pay = {agent: float("inf") if agent in broken and self.t >= self.breaks_at else 1.0 for agent in self.agents}
        ends, no = dict.fromkeys(self.agents, self.t >= 64), dict.fromkeys(self.agents, False)
        self.agents = [] if self.t >= 64 else self.agents
        return self._seen(), pay, ends, no, {agent: {} for agent in pay}


def make(index, *, seats=2, breaks_at=1000, paid="all"):
    return ToyGame(seats, breaks_at, paid)
'''


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variables of the machine's; log handlers and level as they were."""
    for name in ("HYDRA_FULL_ERROR", "LOG_LEVEL", "METTA_HOURLY_COST"):
        monkeypatch.delenv(name, raising=False)
    with logging_as_it_was():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run (train_dir/previous), spoiled policy files, and an installed env of a user."""
    folder = tmp_path_factory.mktemp("bad_input")
    assert main(["train", *ARENA, f"train_dir={folder}/train_dir", "run=previous", f"{TOTAL}={STEPS}"]) == 0
    data = (folder / "train_dir/previous/checkpoints/model_0000.safetensors").read_bytes()
    write_policies(folder, data)
    (folder / "a_file").write_text("taken")
    (folder / "site/toy_game-1.dist-info").mkdir(parents=True)
    (folder / "site/toy_game-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: toy_game\nVersion: 1\n")
    (folder / "site/toy_game-1.dist-info/entry_points.txt").write_text("[dual_policy.envs]\ntoy_game = toy_game:make\n")
    (folder / "site/toy_game.py").write_text(TOY_MODULE)
    return folder


def write_policies(folder: Path, data: bytes) -> None:
    """Variants of the policy file `data`, each wrong in one way."""
    file = decode_policy(data, "model_0000")
    (folder / "short.safetensors").write_bytes(data[: len(data) // 2])
    (folder / "empty.safetensors").write_bytes(b"")
    header = struct.unpack("<Q", data[:8])[0]
    nan = data[: 8 + header] + struct.pack("<f", math.nan) + data[12 + header :]
    (folder / "nan.safetensors").write_bytes(nan)
    torch.save(["no", "weights"], folder / "list.pt")

    def made_for(name: str, space: ObservationSpace, actions: tuple[str, ...]) -> None:
        tensors = build_policy("fast", {"hidden_size": 16}, space, actions).state_dict()
        made = PolicyFile(
            architecture="fast",
            args={"hidden_size": 16},
            observation_space=space,
            actions=actions,
            tensors=tensors,
            metadata=file.metadata,
        )
        (folder / name).write_bytes(encode_policy(made))

    own, actions = file.observation_space, file.actions
    made_for("own.safetensors", replace(own, own=("mana", *own.own[1:])), actions)
    made_for("five_actions.safetensors", own, actions[:5])
    made_for("vector.safetensors", ObservationSpace(kind="vector", shape=(2,), features=("x", "y")), actions)
    made_for(
        "tokens.safetensors", ObservationSpace(kind="tokens", shape=(9, 3), features=("x", "y"), window=(5, 5)), actions
    )


@pytest.fixture
def place(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `finished` as the working directory, its env installed."""
    monkeypatch.chdir(finished)
    monkeypatch.syspath_prepend(finished / "site")
    return finished


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of each file by its path; not of run.lock, which says who had the run last."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): b"" if path.name == "run.lock" else path.read_bytes() for path in files}


def messages(stderr: str) -> list[str]:
    """The lines on stderr that are no log lines."""
    return [line for line in stderr.splitlines() if not re.match(r"(\d\d:\d\d:\d\d )?(INFO|WARNING) ", line)]


def error_line(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """The one line that `dual-policy train <words>` leaves on stderr before it ends with `code`."""
    capsys.readouterr()
    assert main(["train", *words]) == code
    lines = messages(capsys.readouterr().err)
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


BAD = [
    # shares
    ([f"{PCT}=0"], [f"{PCT}=0.0", "nothing would learn", "for example 0.5"]),
    ([f"{PCT}=-0.5"], [f"{PCT}=-0.5", "above 0 and up to 1"]),
    ([f"{PCT}=1.01"], [f"{PCT}=1.01", "above 0 and up to 1"]),
    ([f"{PCT}=nan"], [f"{PCT}=nan", "above 0 and up to 1"]),
    ([f"{PCT}=0.99"], [f"{PCT}=0.99 leaves no NPC among 8 agents", "use at most 0.9"]),
    ([f"{PCT}=0.01"], [f"{PCT}=0.01 leaves no learner among 8 agents", "use at least 0.1"]),
    ([f"{PCT}=half"], [f"{PCT}='half'", "use a number"]),
    (["trainer.dual_policy.assignment=[0,1,2,9]"], ["assignment=[0, 1, 2, 9]", "seats from 0 to 7"]),
    # policies
    ([f"{URI}=train_dir/gone/model_0000.safetensors"], ["train_dir/gone/model_0000.safetensors", "train_dir holds"]),
    (
        [f"{URI}=train_dir/previous/checkpoints/model_0000.pt"],
        ["model_0000.pt: no such file; model_0000.safetensors stands beside it, name that one"],
    ),
    ([f"{URI}=builtin://arena/hunte"], ["builtin://arena/hunte", "did you mean builtin://arena/hunter?"]),
    ([f"{URI}=gs://bucket/model.safetensors"], ["gs://bucket/model.safetensors", "download it"]),
    ([f"{URI}=short.safetensors"], ["short.safetensors: it is cut short", "copy it again"]),
    ([f"{URI}=empty.safetensors"], ["empty.safetensors: 0 bytes are too few", "copy it again"]),
    ([f"{URI}=list.pt"], ["Checkpoint NPC policy must be a PyTorch module", "list.pt", "dual-policy import"]),
    ([f"{URI}=own.safetensors"], ["only the policy has the own-state bytes mana", "take a policy made for this env"]),
    ([f"{URI}=five_actions.safetensors"], ["it has 5 actions, the env 6", "only the env has the actions attack"]),
    ([f"{URI}=vector.safetensors"], ["vector.safetensors", "are vector float32 (2,), the env's window uint8 (128,)"]),
    ([f"{URI}=tokens.safetensors"], ["tokens.safetensors", "are tokens uint8 (9, 3), the env's window uint8 (128,)"]),
    ([f"{URI}=nan.safetensors"], ["nan.safetensors: tensor bias", "not finite", "take an earlier checkpoint"]),
    ([f"{URI}=null"], [f"{URI} is not set", "for example builtin://arena/medium"]),
    (["evals.opponents=[nothing.safetensors]"], ["nothing.safetensors: no such file"]),
    (["evals.opponents=[five_actions.safetensors]"], ["it has 5 actions, the env 6"]),
    ([f"{INITIAL}=gone.safetensors"], ["gone.safetensors: no such file"]),
    ([f"{INITIAL}=builtin://arena/forager"], [f"{INITIAL}=builtin://arena/forager", "script", "name a checkpoint"]),
    ([f"{INITIAL}=train_dir/previous", "agent=mlp"], [f"{INITIAL}=train_dir/previous", "set agent=fast agent.hidden"]),
    ([f"{INITIAL}=train_dir/previous", "agent.hidden_size=32"], [f"{INITIAL}=train_dir/prev", "agent.hidden_size=16"]),
    # agents
    (["agent=fats"], ["agent/fats", "did you mean agent=fast?"]),
    (["agent.name=fats"], ["agent=fats is not known", "did you mean 'fast'?"]),
    (["agent.name=forager", "agent.hidden_size=null"], ["agent=forager is a script", "use agent=fast or agent=mlp"]),
    (["agent.hidden_siz=32"], ["agent.hidden_siz is not a known key", "did you mean agent.hidden_size?"]),
    (["+agent.hidden_siz=32"], ["agent.hidden_siz=32 is no setting of agent=fast; did you mean agent.hidden_size?"]),
    (["+agent.zzz=32"], ["agent.zzz=32 is no setting of agent=fast; it has hidden_size"]),
    *((
        [f"agent.hidden_size={value}"],
        [f"agent.hidden_size={value} is not possible; use a whole number from 1 to 8192"],
    ) for value in ("abc", "0", "-4", "16.5", str(10**9))),
    # unknown keys and two spellings
    (["trainer.horizn=8"], ["trainer.horizn is not a known key", "did you mean trainer.horizon?"]),
    (["+trainer.horizn=8"], ["trainer.horizn is not a known key", "did you mean trainer.horizon?"]),
    (["env.num_agens=8"], ["env.num_agens is not a known key", "did you mean env.num_agents?"]),
    (["+env.num_agens=8"], ["env.num_agens", "did you mean env.num_agents?"]),
    (["evals.episode=8"], ["evals.episode is not a known key", "did you mean evals.episodes?"]),
    (["wandb.projet=x"], ["wandb.projet is not a known key", "did you mean wandb.project?"]),
    (
        [f"{PCT}=0.5", "trainer.dual_policy.policy_a_percentage=0.5"],
        [f"{PCT}=0.5 and trainer.dual_policy.policy_a_percentage=0.5 are two spellings", "policy_a_percentage=null"],
    ),
    (["trainer.dual_policy.checkpoint_npc.policy_uri=x"], ["uri='builtin://", "policy_uri='x'", "set policy_uri=null"]),
    # envs
    (["env=aren"], ["env/aren", "did you mean env=arena?"]),
    (["env.num_agents=1"], ["env.num_agents=1", "from 2 to 64"]),
    (["env.teams=red"], ["env.teams=red", "use halves, alternating, or a list of 8 zeros and ones"]),
    (["env.teams=[0,1]"], ["env.teams=[0, 1]", "a list of 8 zeros and ones"]),
    (["env.num_envs=0"], ["env.num_envs=0", "from 1 to 65536"]),
    (["env.mines=200"], ["env.mines + env.altars + env.walls=214", "has room for 49"]),
    # the machine
    (
        ["env.num_envs=65536", "trainer.horizon=4096"],
        ["env.num_envs=65536 with trainer.horizon=4096 needs", " GB on cpu", "lower env.num_envs to"],
    ),
    (["device=banana"], ["device=banana", "use auto, cpu, cuda or cuda:N"]),
    (["device=meta"], ["device=meta", "use auto, cpu, cuda or cuda:N"]),
    (["device=cuda:99"], ["device=cuda:99", "use auto or cpu"]),
    (["trainer.threads=100000"], ["trainer.threads=100000", "1024 at most"]),
    (["train_dir=a_file"], ["a_file/bad", "Not a directory", "train_dir="]),
    (["train_dir=/proc/nowhere"], ["/proc/nowhere", "train_dir="]),
    # the rest
    (["trainer.num_minibatches=100"], ["trainer.num_minibatches=100", "the 16 learner rows"]),
    ([f"{TOTAL}=0"], [f"{TOTAL}=0", "from 1"]),
    (["seed=-1"], ["seed=-1", "from 0 to 2147483647"]),
    (["trainer.learning_rate=nan"], ["trainer.learning_rate=nan", "from 0 to 10"]),
    (["run="], ["run=", "for example my_experiment"]),
    (["run=../elsewhere"], ["run=../elsewhere", "inside train_dir"]),
    (["wandb=onlin"], ["wandb/onlin", "did you mean wandb=online?"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "parts"), BAD, ids=[" ".join(words)[:60] for words, _ in BAD])
def test_a_bad_start(words: list[str], parts: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(place / "train_dir/previous")
    run = [] if any(word.startswith("run=") for word in words) else ["run=bad"]
    line = error_line(capsys, *ARENA, f"{TOTAL}={STEPS}", *run, *words)
    for part in parts:
        assert part in line
    assert files_of(place / "train_dir/previous") == before
    assert not (place / "elsewhere").exists()
    left = {name for name in files_of(place / "train_dir") if not name.startswith("previous/")}
    assert left <= {"bad/config.yaml", "bad/npc.lock.json", "bad/run.lock"}


@pytest.mark.parametrize(
    ("name", "value", "mend"),
    [("METTA_HOURLY_COST", "two", "dollars per hour"), ("LOG_LEVEL", "loud", "use DEBUG, INFO, WARNING or ERROR")],
)
def test_a_bad_variable(
    name: str,
    value: str,
    mend: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    line = error_line(capsys, *ARENA, "run=variable")
    assert f"{name}={value}" in line
    assert mend in line
    assert not (place / "train_dir/variable").exists()


def test_a_failed_start_is_not_in_the_way_of_the_next(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*ARENA, "run=mended", f"{TOTAL}={STEPS}"]
    good, policy = place / "train_dir/previous/checkpoints/model_0001.safetensors", place / "npc.safetensors"
    policy.write_bytes(good.read_bytes()[:-10])
    assert "cut short" in error_line(capsys, *words, f"{URI}=npc.safetensors")
    policy.write_bytes(good.read_bytes())  # the mend that the line asked for
    assert main(["train", *words, f"{URI}=npc.safetensors"]) == 0
    policy.write_bytes((good.parent / "model_0000.safetensors").read_bytes())
    line = error_line(capsys, *words, f"{URI}=npc.safetensors")  # now something was trained against the first bytes
    assert "npc.lock.json pins npc as sha256" in line
    assert "start a new run" in line


def test_a_run_continues_under_its_own_config_only(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("train_dir/previous", "train_dir/grown")
    before = files_of(place / "train_dir/grown")
    line = error_line(capsys, *ARENA, "run=grown", f"{TOTAL}={STEPS}", "trainer.gamma=0.5")
    assert "trainer.gamma: 0.99 -> 0.5; use another run= name, or the old values" in line
    line = error_line(capsys, *ARENA, "run=grown", f"{TOTAL}={STEPS}", f"{URI}=builtin://arena/hunter")
    assert '"builtin://arena/forager" -> "builtin://arena/hunter"' in line
    assert files_of(place / "train_dir/grown") == before
    assert main(["train", *ARENA, "run=grown", f"{TOTAL}={3 * STEPS}"]) == 0
    assert iterations("grown") == [1, 2, 3]


def iterations(run: str) -> list[int]:
    lines = Path(f"train_dir/{run}/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["iteration"] for line in lines]


def start_program(*words: str, **environment: str) -> "subprocess.Popen[str]":
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "dual_policy_plugin", "train", *words]
    return subprocess.Popen(
        command,
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job is told to ignore it
    )


@pytest.mark.slow
def test_a_live_run_is_refused_and_an_interrupted_one_continues(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*ARENA, "run=live", "trainer.checkpoint_interval=3"]
    program = start_program(*words, f"{TOTAL}={10**9}")
    try:
        await_file(place / "train_dir/live/checkpoints/model_0003.safetensors", program)
        line = error_line(capsys, *words, f"{TOTAL}={STEPS}")  # short: it would end at once if it were let in
        assert f"train_dir/live is in use by process {program.pid} on " in line
        assert "wait for it, end it, or use another run= name" in line
        assert program.poll() is None
        program.send_signal(signal.SIGINT)
        _, stderr = program.communicate(timeout=30)
    finally:
        program.kill()
    assert program.returncode == 130
    assert messages(stderr) == ["interrupted; the same command continues the run from where it was stopped"]
    seen = iterations("live")
    assert seen == list(range(1, len(seen) + 1))
    assert main(["train", *words, f"{TOTAL}={(len(seen) + 2) * STEPS}"]) == 0
    assert iterations("live") == list(range(1, len(seen) + 3))


def await_file(path: Path, program: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert program.poll() is None, program.stderr and program.stderr.read()
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


def test_the_program_without_a_gpu(place: Path) -> None:
    program = start_program(*ARENA, "run=bad", "device=cuda", CUDA_VISIBLE_DEVICES="")
    _, stderr = program.communicate(timeout=60)
    assert program.returncode == 2
    assert messages(stderr) == ["error: device=cuda is not there, torch sees 0 CUDA devices; use auto or cpu"]


@pytest.mark.slow
def test_wandb_without_a_login_ends_before_the_first_step(place: Path, tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "", "NETRC": ""}
    program = start_program(*ARENA, "run=online", "wandb=online", **environment)
    _, stderr = program.communicate(timeout=60)
    assert program.returncode == 2
    (line,) = messages(stderr)
    assert line.startswith("error: wandb.mode=online finds no W&B login; run `wandb login`, set WANDB_API_KEY, or use")
    assert not (place / "train_dir/online/metrics.jsonl").exists()


# A disk that does not take what a run writes


@contextmanager
def tmpfs(folder: Path) -> Iterator[bool]:
    """`folder` as a disk of its own; gives False where this user cannot have one."""
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)], capture_output=True, check=False
        ).returncode
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """A limit on the size of every file that this process writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("cause", ["disk", "limit"])
def test_a_full_disk_in_the_middle_of_a_run_loses_nothing(
    cause: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    run = disk / "full"
    words = [*ARENA, f"train_dir={disk}", "run=full", "agent.hidden_size=64", "trainer.checkpoint_interval=4"]
    with tmpfs(disk) as is_disk:
        assert main(["train", *words, f"{TOTAL}={2 * STEPS}"]) == 0
        before = files_of(run)
        longer = [*words, f"{TOTAL}={20 * STEPS}"]
        if cause == "disk" and is_disk:
            remount(disk, f"size={(shutil.disk_usage(disk).used >> 10) + 128}k")
            line = error_line(capsys, *longer)
            assert "could not be written: No space left on device; free some space, or lower trainer.keep_ch" in line
            remount(disk, "size=20m")
        else:
            with files_up_to(100_000):
                line = error_line(capsys, *longer)
            assert "could not be written: File too large; raise the limit on file sizes (ulimit -f)" in line
        assert str(run) in line
        after = files_of(run)
        for name in ("checkpoints/model_0002.safetensors", "checkpoints/latest.safetensors", "state/training.safetens"):
            (found,) = (path for path in before if path.startswith(name))
            assert after[found] == before[found]
        assert after["metrics.jsonl"].startswith(before["metrics.jsonl"])
        assert not [name for name in after if name.endswith(".tmp")]
        load_policy_from_checkpoint(str(run / "checkpoints"))
        assert main(["train", *longer]) == 0
        found = [json.loads(line)["iteration"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert found == list(range(1, 21))


def test_a_folder_that_cannot_be_written(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk"
    with tmpfs(disk) as is_disk:
        if is_disk:
            remount(disk, "ro")
        else:
            disk.chmod(0o555)
        line = error_line(capsys, *ARENA, f"train_dir={disk}", "run=bad")
        assert f"{disk}/bad: " in line
        assert "Read-only file system" in line or "Permission denied" in line
        assert "choose another run=, train_dir=" in line


# A user's own env


def test_an_env_with_one_agent(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        *TOY,
        f"{TOTAL}={STEPS}",
        "+env.seats=1",
        "+dual_policy=checkpoint",
        f"{URI}=vector.safetensors",
        "run=alone",
        f"{PCT}=0.6",
    ]
    line = error_line(capsys, *words)
    assert f"{PCT}=0.6 leaves no NPC: the env has one agent; use an env with more, or 1.0" in line
    line = error_line(capsys, *words, f"{PCT}=0.4")
    assert f"{PCT}=0.4 leaves no learner among 1 agents" in line


def test_a_policy_of_another_env(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TOY, f"{TOTAL}={STEPS}", "+dual_policy=checkpoint", "run=other"]
    line = error_line(capsys, *words, f"{URI}=train_dir/previous")
    assert (
        "model_0001.safetensors does not fit the env: its observations are window uint8 (128,), the env's vec" in line
    )
    line = error_line(capsys, *words, f"{URI}=builtin://arena/hunter")
    assert "builtin://arena/hunter does not fit the env: a scripted policy plays the arena only" in line
    assert "take a policy made for this env" in line


@pytest.mark.parametrize("who", ["", "first", "last"])
def test_a_run_that_diverges_keeps_its_last_healthy_checkpoint(
    place: Path, capsys: pytest.CaptureFixture[str], who: str
) -> None:
    """All agents are paid infinity from step 20 on, the learner alone, or the NPC alone, whom no loss knows."""
    run = f"diverged_{who}"
    words = [*TOY, "+env.breaks_at=20", f"run={run}", "trainer.checkpoint_interval=1", f"{TOTAL}=100000"]
    if who:
        # a net for this env to play against
        assert main(["train", *TOY, f"run=npc_{who}", f"{TOTAL}={STEPS}"]) == 0
        words += [f"+env.paid={who}", "+dual_policy=checkpoint", f"{URI}=train_dir/npc_{who}"]
    line = error_line(capsys, *words, code=3)
    assert "iteration 3: reward" in line
    assert ("losses/policy_loss" in line) == (who != "last")
    assert "not finite" in line
    assert "mend the env's rewards" in line
    assert iterations(run) == [1, 2]
    policy = load_policy_from_checkpoint(f"train_dir/{run}/checkpoints")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in policy.state_dict().values())
    newest = decode_policy(Path(f"train_dir/{run}/checkpoints/latest.safetensors").read_bytes(), "latest")
    assert newest.metadata["epoch"] == 2
