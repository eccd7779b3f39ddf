"""The main job on foreign envs, end to end: train, train against that, and what the collector keeps of every step."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from dual_policy_plugin.cli import main
from dual_policy_plugin.config import (
    AgentConfig,
    Config,
    DualPolicyConfig,
    EnvConfig,
    EvalsConfig,
    PolicySource,
    TrainerConfig,
)
from dual_policy_plugin.envs.build import make_env
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.evaluation.matches import play_pairings, seatings_of
from dual_policy_plugin.experience import allocate_experience
from dual_policy_plugin.policies.pool import Npc
from dual_policy_plugin.ranks.distributed import Ranks
from dual_policy_plugin.rollout.assignment import assign
from dual_policy_plugin.rollout.collector import collect_rollout, start_rollouts
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy
from dual_policy_plugin.train import train
from dual_policy_plugin.types import StepResult, VecEnv
from tests.envs.toy_envs import make_late_puffer, make_script
from tests.harness import CPU, Always, Loop, children, logging_as_it_was, make_loop
from tests.rl.real_env_hosts import make_clock, make_logged, make_surveyed

ROOT = Path(__file__).parents[2]
SMALL = (
    "trainer.total_timesteps=256", "trainer.horizon=8", "trainer.num_minibatches=2", "trainer.threads=1",
    "trainer.num_workers=1", "agent.hidden_size=16", "env.num_envs=2", "evals.episodes=4", "report=false",
)  # fmt: skip


@pytest.fixture(autouse=True)
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[psutil.Process]]:
    """A folder of its own as cwd, log handlers as they were, no worker left behind; what other tests keep running."""
    before = children()
    monkeypatch.chdir(tmp_path)
    with logging_as_it_was():
        yield before
    assert children() <= before


@pytest.fixture
def build() -> Iterator[Callable[..., VecEnv]]:
    """Makes a worker env of a function, or of a name and args, and closes it."""
    envs = []

    def make(make_host: Callable[..., Any] | None, *, name: str = "toy", num_envs: int = 4, **args: Any) -> VecEnv:
        config = EnvConfig(name=name, num_envs=num_envs, args=args)
        envs.append(make_env(config, device="cpu", num_workers=2, make_host=make_host))
        return envs[-1]

    yield make
    for env in envs:
        env.close()


def result_of(run: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(Path("train_dir", run, "result.json").read_text())
    return result


def train_twice(*env: str, small: tuple[str, ...] = SMALL) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run `a`, in which all agents learn, and run `b` against its checkpoint, by the real command line."""
    assert main(["train", "run=a", *env, *small]) == 0
    uri = f"trainer.dual_policy.checkpoint_npc.uri={Path('train_dir/a').resolve()}"
    assert main(["train", "+dual_policy=checkpoint", uri, "run=b", *env, *small]) == 0
    return result_of("a"), result_of("b")


@pytest.mark.parametrize(
    ("env", "num_agents"),
    [
        (("env=mettagrid", "env.steps=16"), 8),
        (("env=pettingzoo", "env.id=simple_tag_v3", "env.max_episode_steps=16"), 4),
        (("env=pettingzoo", "env.id=knights_archers_zombies_v11", "env.max_episode_steps=16"), 4),
    ],
    ids=["mettagrid", "simple_tag", "knights_archers_zombies"],
)
def test_a_second_run_trains_against_the_first_ones_checkpoint(env: tuple[str, ...], num_agents: int) -> None:
    first, second = train_twice(*env)
    assert first["npcs"] == first["evals"] == []
    checkpoint = Path("train_dir/a", first["checkpoint"])
    (npc,) = second["npcs"]
    assert npc["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert npc["uri"] == f"file://{checkpoint.resolve()}"
    assert second["agent_step"] >= 256
    assert second["metrics"]["dual_policy/npc_agent_count"] == num_agents / 2
    (match,) = second["evals"]
    assert match["episodes"] == 4
    assert match["opponent"] == npc["name"]
    assert 0 <= match["low"] <= match["win_rate"] <= match["high"] <= 1
    assert second["objective"] == match["win_rate"]


def test_a_users_own_env_in_python() -> None:
    """`train(config, make_host=...)` twice; the second plays against the first one's checkpoint."""

    def config(run: str, dual: DualPolicyConfig) -> Config:
        trainer = TrainerConfig(
            total_timesteps=256, horizon=8, num_minibatches=2, threads=1, num_workers=1, dual_policy=dual
        )
        env = EnvConfig(name="clock", num_envs=2, args={"length": 8})
        agent = AgentConfig(args={"hidden_size": 16})
        return Config(run=run, device="cpu", agent=agent, env=env, evals=EvalsConfig(episodes=4), trainer=trainer)

    train(config("a", DualPolicyConfig()), make_host=make_clock)
    dual = DualPolicyConfig(enabled=True, npc=PolicySource(uri="train_dir/a"))
    result = train(config("b", dual), make_host=make_clock)
    assert result["npcs"][0]["uri"].endswith(result_of("a")["checkpoint"])
    (match,) = result["evals"]
    assert (match["learner_return"], match["opponent_return"]) == (36, 36)  # 1 + 2 + ... + 8 for everybody
    assert match["win_rate"] == 0.5


def test_torch_leaves_the_workers_their_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for num_workers, threads in ((3, None), (3, 2), (9, None)):
        trainer = TrainerConfig(total_timesteps=64, num_workers=num_workers, threads=threads)
        config = Config(run=f"r{num_workers}", device="cpu", env=EnvConfig(num_envs=9, name="no_such"), trainer=trainer)
        with pytest.raises(ConfigError):
            train(config)
    assert taken == [5, 2, 1]


# The NPC acts on its seats, and only there


class Recorded:
    """Keeps every step's result, and the observations after it, of an env that is stepped as a whole."""

    def __init__(self, env: VecEnv) -> None:
        self.env, self.spec = env, env.spec
        self.results: list[StepResult] = []
        self.observations: list[Tensor] = []
        self.actions: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        if name == "halves":
            raise AttributeError
        return getattr(self.env, name)

    def step(self, actions: Tensor) -> StepResult:
        result = self.env.step(actions)
        copies = {name: getattr(result, name) for name in StepResult.__slots__}
        self.results.append(StepResult(**{k: None if v is None else v.clone() for k, v in copies.items()}))
        space = self.spec.observation_space
        seen = torch.zeros(self.spec.num_envs * self.spec.num_agents, *space.shape, dtype=getattr(torch, space.dtype))
        self.env.observe(torch.arange(self.spec.num_agents), seen)
        self.observations.append(seen.view(self.spec.num_envs, self.spec.num_agents, *space.shape))
        self.actions.append(actions.clone())
        return result


def two_habits(env: VecEnv, layout: str | list[int], pct: float, learner: str, npc: str, steps: int) -> Recorded:
    """One rollout in which every learner seat takes one action and every NPC seat another."""
    recorded = Recorded(env)
    split = assign(env.spec.num_agents, pct, layout)
    loop = make_loop(recorded, split=split, npc=Always(env.spec, npc), horizon=steps, hidden_size=8)
    loop.mixed.learner = Always(env.spec, learner)
    env.reset(1)
    loop.collect()
    return recorded


@pytest.mark.parametrize("layout", ["first", "last", [1, 2, 5]])
def test_in_mettagrid_the_npc_seats_go_north_and_the_others_south(
    build: Callable[..., VecEnv], layout: str | list[int]
) -> None:
    """Read off the simulator's own grid: each agent stays in its column and ends at its wall, or behind another."""
    env = build(make_surveyed, num_envs=8)
    split = assign(6, 0.5, layout)
    recorded = two_habits(env, layout, 0.5, "move_south", "move_north", 10)
    last = recorded.results[-1]
    assert last.episode_ends.all()
    assert last.counters is not None
    free = 0
    for places in last.counters.int().tolist():
        taken = {(row, column) for row, column, _, _ in places}
        for seat, (row, column, first_row, first_column) in enumerate(places):
            assert column == first_column
            way, wall = (-1, 1) if seat in split.npc_seats else (1, 8)
            assert row == wall or (row + way, column) in taken
            assert (row - first_row) * way >= 0
            free += row != first_row
    assert free > 24  # of 48, most had somewhere to go


@pytest.mark.parametrize("layout", ["first", "last"])
def test_in_a_puffer_env_the_npc_seat_takes_its_action(build: Callable[..., VecEnv], layout: str) -> None:
    env = build(make_late_puffer)
    recorded = two_habits(env, layout, 0.5, "action_1", "action_4", 7)
    paid = torch.stack([result.rewards for result in recorded.results])  # (7, 4, 2): 1 + action
    npc = assign(2, 0.5, layout).npc_seats[0]
    assert (paid[:, :, npc] == 5).all()
    assert (paid[:, :, 1 - npc] == 2).all()


@pytest.mark.parametrize("layout", ["first", "last"])
def test_in_a_pettingzoo_env_the_npc_seats_go_where_their_action_says(
    build: Callable[..., VecEnv], layout: str
) -> None:
    """simple_tag: the first two numbers of an observation are the agent's velocity; action_1 is west, action_2 east.
    A hunter's acceleration of 3 over 0.1 s is a velocity of 0.3, the runner's of 4 is 0.4; who collides is pushed."""
    env = build(None, name="pettingzoo", num_envs=16, id="simple_tag_v3")
    recorded = two_habits(env, layout, 0.5, "action_2", "action_1", 1)
    velocity = recorded.observations[0][:, :, 0].median(dim=0).values
    expected = torch.tensor([0.3, 0.3, 0.3, 0.4])
    expected[list(assign(4, 0.5, layout).npc_seats)] *= -1
    assert torch.allclose(velocity, expected, atol=1e-3)


def test_both_seatings_are_played(build: Callable[..., VecEnv]) -> None:
    recorded = Recorded(build(make_clock, length=4))
    spec = recorded.spec
    npcs = [Npc(name=name, policy=Always(spec, name)) for name in ("north", "south")]
    (record,) = play_pairings(
        npcs, [(0, 1)], lambda numbers: recorded, seatings_of(assign(2, 0.5), spec), episodes=16, seed=1,
        max_envs=spec.num_envs, device=CPU,
    )  # fmt: skip
    actions = torch.stack(recorded.actions)  # (4 rounds x 4 steps, 4, 2)
    assert (record.episodes, actions.shape[0]) == (16, 16)
    assert (actions[:, :2] == torch.tensor([1, 2])).all()
    assert (actions[:, 2:] == torch.tensor([2, 1])).all()


# What the collector keeps (D13)


class Counting(nn.Module):
    """Its state counts the steps since it was zeroed; V = 100 * state + 10 * (first number seen) + 1, before the step.
    Always takes action 1."""

    state_size = 1

    def pack(self) -> None:
        pass

    def forward_step(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.full((len(obs), 3), -torch.inf)
        logits[:, 1] = 0.0
        return logits, 100 * state[:, 0] + 10 * obs[:, 0] + 1, state + 1


def test_a_truncation_is_valued_at_its_final_observation_with_the_state_from_before_the_reset(
    build: Callable[..., VecEnv],
) -> None:
    """Two envs of 4 steps; staggered, env 0 is cut after 2. After L steps the state is L and the clock shows L."""
    env = build(make_clock, num_envs=2, length=4)
    split = assign(2, 0.5)
    mixed = MixedPolicy(Counting(), None, split, env.spec, CPU)
    mixed.npc_seats = mixed.npc_seats[:0]
    experience = allocate_experience(env.spec, horizon=10, num_rows=2, state_size=1, device=CPU)
    metrics = EpisodeMetrics(env.spec, split, None, CPU, count_first=False, count_later=True)
    env.reset(1, stagger=True)
    start_rollouts(env, mixed, experience)
    collect_rollout(env, mixed, experience, metrics, mixed.random_numbers(1, 0, 10))

    v = [110 * step + 1 for step in range(5)]  # V after `step` steps of an episode
    env_0 = [v[0], v[1], v[0], v[1], v[2], v[3], v[0], v[1], v[2], v[3]]
    env_1 = [v[0], v[1], v[2], v[3], v[0], v[1], v[2], v[3], v[0], v[1]]
    assert experience.values.t().tolist() == [env_0, env_1]
    assert experience.dones.t().nonzero().tolist() == [[0, 1], [0, 5], [0, 9], [1, 3], [1, 7]]
    assert experience.final_values is not None
    assert experience.final_values.t().tolist() == [
        [0, v[2], 0, 0, 0, v[4], 0, 0, 0, v[4]],
        [0, 0, 0, v[4], 0, 0, 0, v[4], 0, 0],
    ]
    assert experience.last_values.tolist() == [v[0], v[2]]
    # Staggered first episodes do not count, even env 1's, which was as long as any: two of env 0, one of env 1.
    figures = metrics.take(Ranks())
    assert figures["dual_policy/episodes"] == 3
    assert figures["dual_policy/policy_a_reward"] == 1 + 2 + 3 + 4


def test_final_values_are_those_of_a_direct_forward(build: Callable[..., VecEnv]) -> None:
    """The real net with its real memory, replayed row by row from the segment's start."""
    env = build(make_clock, num_envs=4, length=6)
    loop = make_loop(env, split=assign(2, 0.5), horizon=12, hidden_size=16)
    loop.collect()
    experience, learner = loop.experience, loop.mixed.learner
    assert experience.final_values is not None
    state = experience.initial_state.clone()
    steps = torch.zeros(4)
    checked = 0
    for t in range(12):
        _, values, state = learner.forward_step(experience.obs[t], state)
        assert torch.allclose(values, experience.values[t], atol=1e-6)
        steps += 1
        for row in experience.dones[t].nonzero().flatten().tolist():
            final = torch.tensor([[steps[row], float(experience.actions[t, row])]])
            _, value, _ = learner.forward_step(final, state[row : row + 1])
            assert torch.allclose(value, experience.final_values[t, row : row + 1], atol=1e-6)
            _, wrong, _ = learner.forward_step(final, torch.zeros(1, 32))
            assert (value - wrong).abs() > 1e-4  # the memory has its say
            checked += 1
        state[experience.dones[t]] = 0.0
        steps[experience.dones[t]] = 0.0
    assert checked == int(experience.dones.sum()) == 8
    assert (experience.final_values[~experience.dones] == 0).all()


def script_loop(build: Callable[..., VecEnv]) -> Loop:
    """Agents b and c of the toy whose agents die and join learn; a is the NPC."""
    return make_loop(build(make_script, num_envs=8), split=assign(3, 2 / 3, "last"), horizon=24, hidden_size=16)


def test_steps_of_empty_seats_have_no_weight_and_no_say_in_the_update(build: Callable[..., VecEnv]) -> None:
    """Seat b acts in steps 1, 2 and 6 of an episode of 6, c in 4, 5 and 6. Whatever stands where nobody acted
    changes nothing: observations, actions, rewards and values there are overwritten, the update is the same bit by bit.
    """
    loops = [script_loop(build), script_loop(build)]
    for loop in loops:
        loop.env.reset(1)  # no staggered starts: all episodes are whole
        start_rollouts(loop.env, loop.mixed, loop.experience)
        loop.collect()
        weights = loop.experience.weights
        assert weights is not None
        b, c = [1.0, 1, 0, 0, 0, 1], [0.0, 0, 0, 1, 1, 1]
        assert weights.view(4, 6, 8, 2)[:, :, :, 0].unique(dim=2).squeeze(2).tolist() == [b] * 4
        assert weights.view(4, 6, 8, 2)[:, :, :, 1].unique(dim=2).squeeze(2).tolist() == [c] * 4
    plain, spoiled = loops
    empty = spoiled.experience.weights == 0
    torch.manual_seed(0)
    for buffer in (spoiled.experience.rewards, spoiled.experience.values, spoiled.experience.log_probs):
        buffer[empty] = 5 * torch.randn(int(empty.sum()))
    spoiled.experience.obs[:-1][empty] = torch.randn(int(empty.sum()), 3)
    spoiled.experience.actions[empty] = 3
    start = plain.ppo.parameters.flat.detach().clone()
    for loop in loops:
        loop.ppo.update(loop.experience, 1e-2)
    assert not torch.equal(plain.ppo.parameters.flat, start)
    assert torch.equal(plain.ppo.parameters.flat, spoiled.ppo.parameters.flat)


# A worker that dies; a user's own package; the pages that say how


def install(target: Path, pyproject: Path, modules: list[Path]) -> None:
    """Puts a package where `pip install --target` would: its modules and its entry points."""
    project = tomllib.loads(pyproject.read_text())["project"]
    for module in modules:
        (target / module.name).write_bytes(module.read_bytes())
    name, version = project["name"].replace("-", "_"), project["version"]
    info = target / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n")
    points = project["entry-points"]["dual_policy.envs"].items()
    (info / "entry_points.txt").write_text("\n".join(["[dual_policy.envs]", *(f"{k} = {v}" for k, v in points)]))


@pytest.mark.parametrize(
    ("kind", "words"),
    [("raise", ["ValueError: the toy broke", "toy_envs.py"]), ("kill", ["was killed by SIGKILL"])],
)
def test_a_worker_that_dies_ends_the_run_with_exit_code_2(
    kind: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    others: set[psutil.Process],
) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text(
        '[project]\nname = "t"\nversion = "1"\n[project.entry-points."dual_policy.envs"]\n'
        'trouble = "tests.envs.toy_envs:make_trouble"\n'
    )
    install(tmp_path, pyproject, [])
    monkeypatch.syspath_prepend(tmp_path)
    line = ["train", "run=t", "env.name=trouble", "+env.where=1", *SMALL]
    assert main([*line, f"+env.kind={kind}"]) == 2
    errors = capsys.readouterr().err
    assert "error: env worker 0 (envs 0 to 1)" in errors
    assert all(word in errors for word in words)
    assert "train.py" not in errors  # the worker's traceback, not ours
    assert children() <= others
    assert not Path("train_dir/t/result.json").exists()
    assert Path("train_dir/t/checkpoints/model_0000.safetensors").exists()
    assert main([*line, f"+env.kind={kind}"]) == 2  # nothing holds the run: it starts again, and gets as far
    assert "error: env worker 0 (envs 0 to 1)" in capsys.readouterr().err


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page."""
    return re.findall(r"```(\w*)\n(.*?)```", (ROOT / page).read_text("utf-8"), re.S)


def run_train_lines(text: str, *more: str) -> list[str]:
    """Runs the `dual-policy train` lines of a block in this process, with `more` behind; gives the other lines."""
    lines = text.replace("\\\n", " ").strip().splitlines()
    for line in lines:
        if line.startswith("dual-policy "):
            assert main([*shlex.split(line)[1:], *more]) == 0, line
    return [line for line in lines if not line.startswith("dual-policy ")]


QUICK = ("trainer.total_timesteps=4096", "trainer.threads=1", "agent.hidden_size=16", "evals.episodes=64")


def test_the_commands_of_the_example_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = ROOT / "examples" / "own_env"
    install(tmp_path, example / "pyproject.toml", [example / "berry_race.py"])
    monkeypatch.syspath_prepend(tmp_path)
    others = [line for _, text in blocks("examples/own_env/README.md") for line in run_train_lines(text, *QUICK)]
    assert others == ["pip install ./examples/own_env"]
    npc = result_of("berries2")["npcs"][0]
    assert npc["sha256"] == hashlib.sha256(Path(npc["uri"].removeprefix("file://")).read_bytes()).hexdigest()
    assert "/berries/checkpoints/" in npc["uri"]


@pytest.mark.slow
def test_the_page_on_own_envs_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are written as it says, its package is found, its commands and its script do what it says."""
    commands = ""
    for language, text in blocks("docs/own_env.md"):
        if language == "sh":
            commands += text
        else:
            Path(text.splitlines()[0].removeprefix("# ")).write_text(text)
    assert sorted(path.name for path in Path().glob("*")) == ["my_env.py", "pyproject.toml", "train_my_env.py"]
    install(tmp_path / "site", Path("pyproject.toml"), [])
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path)
    assert run_train_lines(commands, *QUICK, "+env.size=30") == ["pip install ."]
    assert "/first/checkpoints/" in result_of("second")["npcs"][0]["uri"]
    script = Path("train_my_env.py").read_text().replace("50_000", "2_048").replace("episodes=256", "episodes=32")
    Path("train_my_env.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "train_my_env.py"], capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"win rate \d\.\d\d", done.stdout.strip().splitlines()[-1])


def test_a_continued_run_plays_new_episodes(tmp_path: Path) -> None:
    seeds = tmp_path / "seeds"

    def config(steps: int) -> Config:
        trainer = TrainerConfig(total_timesteps=steps, horizon=8, num_minibatches=2, threads=1, num_workers=1)
        env = EnvConfig(name="logged", num_envs=2, args={"path": str(seeds)})
        return Config(
            run="a", train_dir=tmp_path, device="cpu", env=env, trainer=trainer, evals=EvalsConfig(episodes=0)
        )

    train(config(320), resolved_yaml="a: 1\n", make_host=make_logged)
    before = seeds.read_text().split()
    seeds.unlink()
    train(config(640), resolved_yaml="a: 1\n", make_host=make_logged)
    after = seeds.read_text().split()
    assert len(before) == len(set(before)) >= 2 * 10
    assert after[:2] == before[:2]  # every run makes its envs ready with its own seed
    assert len(set(after[2:])) == len(after[2:]) >= 2 * 10
    assert not set(before) & set(after[2:])
