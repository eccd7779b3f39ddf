"""Dual-policy training as promised: the NPC acts on its seats, never trains, and nothing of it reaches the update."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dual_policy_plugin
import dual_policy_plugin.train as program
from dual_policy_plugin.checkpoint import decode_policy, read_safetensors
from dual_policy_plugin.config import (
    AgentConfig,
    Config,
    DualPolicyConfig,
    EnvConfig,
    EvalsConfig,
    PolicySource,
    TrainerConfig,
)
from dual_policy_plugin.envs.arena import make_arena
from dual_policy_plugin.envs.build import env_bytes
from dual_policy_plugin.errors import ConfigError, RankLostError, RunError
from dual_policy_plugin.memory import check_memory
from dual_policy_plugin.policies.build import build_policy
from dual_policy_plugin.policies.learner import Learner
from dual_policy_plugin.policies.loading import load_policy_from_checkpoint
from dual_policy_plugin.policies.pool import Npc, NpcPool
from dual_policy_plugin.rollout.assignment import Assignment, assign
from dual_policy_plugin.rollout.collector import collect_rollout
from dual_policy_plugin.run.directory import RunDirectory
from dual_policy_plugin.run_state import STATE_NAME, decode_state
from dual_policy_plugin.train import train
from dual_policy_plugin.types import StepResult, VecEnv
from tests.harness import CPU, Always, Loop, MemoryTask, make_loop

NUM_ENVS, NUM_AGENTS = 12, 8


def arena_loop(split: Assignment, npc: nn.Module | None = None, env: VecEnv | None = None) -> Loop:
    env = env or make_arena(NUM_ENVS, {"episode_steps": 24}, CPU)
    return make_loop(env, split=split, npc=npc, horizon=16, hidden_size=16)


class CountingPolicy(nn.Module):
    """Passes through and counts the rows of every forward step."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy, self.state_size = policy, policy.state_size
        self.rows: list[int] = []

    def pack(self) -> None:
        self.policy.pack()

    def forward_step(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.rows.append(len(obs))
        return self.policy.forward_step(obs, state)


@pytest.mark.parametrize("pct", [1.0, 0.75, 0.5, 0.25])
def test_each_policy_sees_its_own_rows_and_no_more(pct: float) -> None:
    split = assign(NUM_AGENTS, pct)
    loop = arena_loop(split)
    learner = CountingPolicy(loop.mixed.learner)
    loop.mixed.learner = learner
    npc = None
    if loop.mixed.pool is not None:
        npc = CountingPolicy(loop.mixed.pool.npcs[0].policy)
        loop.mixed.pool.npcs[0] = Npc(name="npc", policy=npc)
    loop.collect()
    horizon = loop.experience.horizon
    assert learner.rows == [NUM_ENVS * split.num_learner] * (horizon + 1)  # the last is the bootstrap value
    assert npc is None or npc.rows == [NUM_ENVS * split.num_npc] * horizon
    assert loop.experience.obs.shape[:2] == (horizon + 1, NUM_ENVS * split.num_learner)


class SpoiledNpc(nn.Module):
    """Acts like the policy inside; its values are NaN and it leaves random bytes in the observations it was given."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy, self.state_size = policy, policy.state_size

    def pack(self) -> None:
        self.policy.pack()

    def forward_step(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, values, state = self.policy.forward_step(obs, state)
        obs.random_(0, 256)
        return logits, torch.full_like(values, torch.nan), state


class SpoiledRewards:
    """An env whose NPC seats are paid NaN."""

    def __init__(self, env: VecEnv, npc_seats: tuple[int, ...]) -> None:
        self.env, self.spec, self.npc_seats = env, env.spec, list(npc_seats)

    def __getattr__(self, name: str) -> object:
        return getattr(self.env, name)

    def step(self, actions: Tensor) -> StepResult:
        result = self.env.step(actions)
        rewards = result.rewards.clone()
        rewards[:, self.npc_seats] = torch.nan
        return StepResult(result.rewards * 0 + rewards, result.dones, result.episode_ends, counters=result.counters)


@pytest.mark.parametrize("layout", ["first", "last", "interleaved"])
def test_nothing_of_the_npc_reaches_the_update(layout: str) -> None:
    split = assign(NUM_AGENTS, 0.5, layout)
    plain = arena_loop(split)
    arena = make_arena(NUM_ENVS, {"episode_steps": 24}, CPU)
    spoiled = arena_loop(split, env=SpoiledRewards(arena, split.npc_seats))
    assert spoiled.mixed.pool is not None
    spoiled.mixed.pool.npcs[0] = Npc(name="npc", policy=SpoiledNpc(spoiled.mixed.pool.npcs[0].policy))
    start = plain.ppo.parameters.flat.detach().clone()
    for _ in range(4):
        plain.iterate(1e-3)
        spoiled.iterate(1e-3)
    assert not torch.equal(start, plain.ppo.parameters.flat)
    assert torch.equal(plain.ppo.parameters.flat, spoiled.ppo.parameters.flat)


def test_npc_weights_do_not_change() -> None:
    loop = arena_loop(assign(NUM_AGENTS, 0.5))
    assert loop.mixed.pool is not None
    npc = loop.mixed.pool.npcs[0].policy
    before = {name: tensor.clone() for name, tensor in npc.state_dict().items()}
    for _ in range(3):
        loop.iterate(1e-2)
    assert not npc.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in npc.state_dict().items())
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in npc.parameters())


class RecordingEnv:
    """Keeps the actions that every seat took."""

    def __init__(self, env: VecEnv) -> None:
        self.env, self.spec = env, env.spec
        self.actions: list[Tensor] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.env, name)

    def step(self, actions: Tensor) -> StepResult:
        self.actions.append(actions.clone())
        return self.env.step(actions)


@pytest.mark.parametrize("layout", ["first", "last", "interleaved", [1, 2, 5]])
def test_the_npc_acts_on_its_seats(layout: str | list[int]) -> None:
    split = assign(NUM_AGENTS, 0.375, layout)
    env = RecordingEnv(make_arena(NUM_ENVS, {}, CPU))
    loop = arena_loop(split, npc=Always(env.spec, "north"), env=env)
    loop.collect()
    taken = torch.stack(env.actions)  # (horizon, num_envs, num_agents)
    assert (taken[:, :, list(split.npc_seats)] == env.spec.actions.index("north")).all()
    learner = taken[:, :, list(split.learner_seats)]
    assert torch.equal(learner.flatten(1), loop.experience.actions)
    assert len(learner.unique()) == len(env.spec.actions)


def test_recurrent_states_are_zero_where_an_episode_began() -> None:
    split = assign(4, 0.5)
    loop = make_loop(MemoryTask(6, 4, delay=2), split=split, horizon=8)
    loop.collect()
    assert loop.mixed.pool is not None
    began = loop.experience.dones[-1]
    assert began.any()
    assert not began.all()
    for state, rows in ((loop.mixed.learner_state, began), (loop.mixed.pool.state, began)):
        assert (state[rows] == 0).all()
        assert (state[~rows].abs().sum(dim=1) > 0).all()


def test_pool_draws_a_new_npc_only_at_an_episode_end() -> None:
    env = make_arena(64, {"episode_steps": 8, "num_agents": 4}, CPU)
    split = assign(4, 0.5)
    loop = make_loop(env, split=split, horizon=40, hidden_size=8)
    policies = [Always(env.spec, action) for action in ("north", "south", "attack")]
    pool = NpcPool(
        [Npc(name=f"npc{i}", policy=policy) for i, policy in enumerate(policies)], num_envs=64, num_npc=2, device=CPU
    )
    pool.probabilities.copy_(torch.tensor([0.2, 0.0, 0.8]))
    recording = RecordingEnv(env)
    loop.mixed.pool, loop.metrics.pool = pool, pool
    numbers = loop.mixed.random_numbers(1, 0, 40)
    collect_rollout(recording, loop.mixed, loop.experience, loop.metrics, numbers)
    acting = torch.stack(recording.actions)[:, :, list(split.npc_seats)]  # (horizon, num_envs, 2)
    assert (acting == acting[:, :, :1]).all()  # one NPC an env
    changed = acting[1:, :, 0] != acting[:-1, :, 0]
    ends = loop.experience.dones.view(40, 64, 2)[:-1, :, 0]
    assert changed.any()
    assert not (changed & ~ends).any()
    late = acting[9:]
    assert not (late == env.spec.actions.index("south")).any()  # probability 0
    share = float((late == env.spec.actions.index("attack")).double().mean())
    assert 0.7 < share < 0.9


def small_config(path: Path, run: str = "small", **trainer: object) -> Config:
    settings: dict[str, object] = {
        "total_timesteps": 4096, "horizon": 16, "num_minibatches": 2, "threads": 1, "checkpoint_interval": 2,
    }  # fmt: skip
    npc = trainer.pop("npc", PolicySource(uri="builtin://arena/random"))
    dual = DualPolicyConfig(enabled=True, training_agents_pct=0.5, npc=npc)
    return Config(
        run=run,
        train_dir=path,
        device="cpu",
        env=EnvConfig(num_envs=16, args={"episode_steps": 32}),
        evals=EvalsConfig(episodes=32),
        trainer=TrainerConfig(**(settings | trainer), dual_policy=dual),
    )


def test_a_run_leaves_everything_in_its_directory(tmp_path: Path) -> None:
    result = train(small_config(tmp_path), resolved_yaml="run: small\n")
    run = tmp_path / "small"
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {
        "config.yaml", "npc.lock.json", "metrics.jsonl", "timing.jsonl", "result.json",
        "checkpoints/model_0000.safetensors", "checkpoints/model_0004.safetensors", "checkpoints/latest.safetensors",
    } <= names  # fmt: skip
    assert result["agent_step"] == 4096
    assert result["env_agent_step"] == 8192
    assert result["evals"][0]["episodes"] == 32
    assert 0.0 <= result["objective"] <= 1.0


def test_a_second_run_trains_against_the_first_ones_checkpoint(tmp_path: Path) -> None:
    train(small_config(tmp_path, "first"), resolved_yaml="run: first\n")
    npc = PolicySource(uri=str(tmp_path / "first"))
    result = train(small_config(tmp_path, "second", npc=npc), resolved_yaml="run: second\n")
    assert result["npcs"][0]["uri"].endswith("first/checkpoints/model_0004.safetensors")
    assert len(result["npcs"][0]["sha256"]) == 64


def weights(path: Path) -> dict[str, Tensor]:
    return decode_policy(path.read_bytes(), str(path)).tensors


def test_a_continued_run_ends_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    train(small_config(tmp_path, "whole", anneal_lr=False), resolved_yaml="a: 1\n")
    train(small_config(tmp_path, "parts", anneal_lr=False, total_timesteps=2048), resolved_yaml="a: 1\n")
    train(small_config(tmp_path, "parts", anneal_lr=False), resolved_yaml="a: 1\n")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    last = "checkpoints/model_0004.safetensors"
    assert all(torch.equal(tensor, weights(parts / last)[name]) for name, tensor in weights(whole / last).items())
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()


def test_initial_policy_starts_from_the_checkpoint(tmp_path: Path) -> None:
    train(small_config(tmp_path, "first"), resolved_yaml="a: 1\n")
    first = tmp_path / "first" / "checkpoints"
    config = small_config(tmp_path, "second", initial_policy=PolicySource(uri=str(first / "model_0004.safetensors")))
    train(config, resolved_yaml="a: 1\n")
    start, given = (
        weights(tmp_path / "second/checkpoints/model_0000.safetensors"),
        weights(first / "model_0004.safetensors"),
    )
    assert all(torch.equal(start[name], given[name]) for name in given)


def test_builtin_script_as_npc_is_the_script() -> None:
    env = make_arena(4, {}, CPU)
    policy = build_policy("random", {}, env.spec.observation_space, env.spec.actions)
    obs = torch.zeros(8, 128, dtype=torch.uint8)
    logits, _, _ = policy.forward_step(obs, torch.zeros(8, 0))
    assert torch.equal(logits, logits[:, :1].expand_as(logits))


def state_of(run: Path) -> dict[str, Tensor]:
    path = run / "state" / "training.safetensors"
    return read_safetensors(path.read_bytes(), str(path))[1]


def test_initial_policy_takes_the_optimizer_along_only_where_asked(tmp_path: Path) -> None:
    train(small_config(tmp_path, "first"), resolved_yaml="a: 1\n")
    uri = str(tmp_path / "first/checkpoints/model_0004.safetensors")
    moments = state_of(tmp_path / "first")
    for keep in (True, False):
        # a learning rate of 0 and a run that stops at once leave what the start put there
        source = PolicySource(uri=uri, keep_optimizer=keep)
        config = small_config(tmp_path, f"second_{keep}", initial_policy=source, learning_rate=0.0, total_timesteps=1)
        train(config, resolved_yaml="a: 1\n")
        steps = float(state_of(tmp_path / f"second_{keep}")["adam.step"])
        assert steps == (float(moments["adam.step"]) if keep else 0.0) + 2.0
    early = PolicySource(uri=str(tmp_path / "first/checkpoints/model_0000.safetensors"), keep_optimizer=True)
    with pytest.raises(ConfigError, match=r"keep_optimizer=true .* the optimizer of epoch 4, after which"):
        train(small_config(tmp_path, "third", initial_policy=early), resolved_yaml="a: 1\n")


def test_normalization_statistics_travel_in_the_checkpoint(tmp_path: Path) -> None:
    loop = make_loop(MemoryTask(16, 4, delay=2), agent="mlp")
    learner = Learner(
        policy=loop.mixed.learner,
        inner=loop.mixed.learner,
        agent=AgentConfig(name="mlp", args={"hidden_size": 32}),
        observation_space=loop.env.spec.observation_space,
        actions=loop.env.spec.actions,
    )
    for _ in range(2):
        loop.iterate(1e-3)
        learner.update_statistics(loop.experience, loop.ranks)
    path = tmp_path / "policy.safetensors"
    path.write_bytes(learner.encode({"epoch": 2}))
    frozen = load_policy_from_checkpoint(str(path))
    assert float(frozen.encoder.count) == 2 * 16 * 32
    obs = loop.experience.obs[:-1].flatten(0, 1)
    torch.testing.assert_close(frozen.encoder.mean, obs.mean(0), rtol=0.2, atol=0.05)  # the second of two rollouts
    loop.mixed.learner.pack()
    expected, _, _ = loop.mixed.learner.forward_step(obs, torch.zeros(len(obs), 0))
    torch.testing.assert_close(frozen.forward_step(obs, torch.zeros(len(obs), 0))[0], expected)


def lines_of(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_restart_on_a_dearer_machine_adds_to_the_cost(tmp_path: Path) -> None:
    """Redone work took its time too: the totals go on from timing.jsonl, which nothing cuts back."""
    config = small_config(tmp_path, checkpoint_interval=2)
    train(replace(config, hourly_cost=3.6), resolved_yaml="a: 1\n")
    first = lines_of(tmp_path / "small" / "timing.jsonl")
    longer = replace(config.trainer, total_timesteps=2 * config.trainer.total_timesteps)
    train(replace(config, hourly_cost=36.0, trainer=longer), resolved_yaml="a: 1\n")
    timing = lines_of(tmp_path / "small" / "timing.jsonl")[len(first) :]
    accrued, elapsed = ([line[name] for line in timing] for name in ("cost/accrued_total", "timing/elapsed_s"))
    assert [*accrued, *elapsed] == [*sorted(accrued), *sorted(elapsed)]
    assert accrued[0] > first[-1]["cost/accrued_total"] > 0
    passed_s = elapsed[-1] - first[-1]["timing/elapsed_s"]
    assert accrued[-1] - first[-1]["cost/accrued_total"] == pytest.approx(36.0 / 3600 * passed_s, rel=1e-6)


def test_a_launcher_does_not_begin_a_run_for_ever_that_comes_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten starts after one state are a bad day, the eleventh is a defect; then the user may try again."""
    monkeypatch.setenv("DUAL_POLICY_HEARTBEAT", str(tmp_path / "beat"))
    config = small_config(tmp_path, checkpoint_interval=100, state_interval_s=3600)

    def lost(*_: object) -> None:
        raise RankLostError("rank 1 of 2 has ended")

    with monkeypatch.context() as broken:
        broken.setattr(program, "iteration_figures", lost)
        for _ in range(10):
            with pytest.raises(RankLostError):
                train(config, resolved_yaml="a: 1\n")
        with pytest.raises(RunError, match="has been begun 10 times after iteration 0 and saved no later state"):
            train(config, resolved_yaml="a: 1\n")
    assert train(config, resolved_yaml="a: 1\n")["iterations"] == 4
    for _ in range(12):  # a run that is done may be asked for its result as often as one likes
        train(config, resolved_yaml="a: 1\n")


@pytest.mark.parametrize(("seconds", "saved"), [(0.0, [0, 1, 2, 3, 4]), (3600.0, [0, 4])])
def test_the_state_is_saved_between_checkpoints_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, saved: list[int]
) -> None:
    """What a run that is killed has to do again is `state_interval_s` long, however far apart its checkpoints are."""
    noted: list[int] = []
    save_state = RunDirectory.save_state

    def noting(run: RunDirectory, name: str, data: bytes) -> None:
        if name == STATE_NAME:
            noted.append(decode_state(data, name).counters.iteration)
        save_state(run, name, data)

    monkeypatch.setattr(RunDirectory, "save_state", noting)
    train(small_config(tmp_path, checkpoint_interval=100, state_interval_s=seconds), resolved_yaml="a: 1\n")
    assert noted == saved
    assert sorted(path.name for path in (tmp_path / "small/checkpoints").glob("model_*")) == [
        "model_0000.safetensors",
        "model_0004.safetensors",
    ]


def test_evaluations_inside_a_run_and_the_cost_of_it(tmp_path: Path) -> None:
    config = replace(small_config(tmp_path, evaluate_interval=2), hourly_cost=3.6)
    result = train(config, resolved_yaml="a: 1\n")
    metrics = lines_of(tmp_path / "small" / "metrics.jsonl")
    assert ["evals/random/win_rate" in line for line in metrics] == [False, True, False, False]  # the end has its own
    assert metrics[1]["evals/random/episodes"] == 32
    assert result["evals"][0]["opponent"] == "random"
    timing = lines_of(tmp_path / "small" / "timing.jsonl")
    assert all(line["cost/hourly_total"] == 3.6 for line in timing)
    accrued = [line["cost/accrued_total"] for line in timing]
    assert accrued == sorted(accrued)
    assert accrued[-1] == pytest.approx(3.6 / 3600 * result["elapsed_s"], abs=1e-5)
    assert not any(name.startswith(("cost/", "charts/learner_SPS")) for line in metrics for name in line)


def test_every_documented_metric_is_there(tmp_path: Path) -> None:
    train(small_config(tmp_path), resolved_yaml="a: 1\n")
    names = set().union(*lines_of(tmp_path / "small" / "metrics.jsonl"))
    sides = {
        f"dual_policy/{side}_reward{total}" for side in ("policy_a", "npc", "combined") for total in ("", "_total")
    }
    losses = (
        "policy_loss",
        "value_loss",
        "entropy",
        "approx_kl",
        "clipfrac",
        "explained_variance",
        "grad_norm",
        "weight_norm",
    )
    expected = sides | {f"losses/{name}" for name in losses}
    expected |= {f"charts/{name}" for name in ("agent_step", "env_agent_step", "epoch", "learning_rate")}
    expected |= {f"dual_policy/{name}" for name in ("policy_a_agent_count", "npc_agent_count", "win_rate", "episodes")}
    expected |= {f"env/{side}/{name}" for side in ("policy_a", "npc") for name in ("hearts", "ore")}
    assert expected <= names
    timing = set().union(*lines_of(tmp_path / "small" / "timing.jsonl"))
    assert {"charts/learner_SPS", "charts/env_agent_SPS"} <= timing


def test_no_checkpoint_stands_without_the_metrics_it_was_made_at(tmp_path: Path) -> None:
    """A run that dies while it saves has the iteration's line already: else a continued run would never write it."""
    blocked = tmp_path / "small" / "checkpoints" / "best.safetensors" / "in the way"
    blocked.mkdir(parents=True)
    with pytest.raises(RunError, match=r"best\.safetensors could not be written"):
        train(small_config(tmp_path, total_timesteps=8192, checkpoint_interval=4), resolved_yaml="a: 1\n")
    assert (tmp_path / "small/checkpoints/model_0004.safetensors").exists()
    assert [line["iteration"] for line in lines_of(tmp_path / "small/metrics.jsonl")] == [1, 2, 3, 4]


def test_a_continued_run_does_not_look_for_its_optimizer_again(tmp_path: Path) -> None:
    train(small_config(tmp_path, "first"), resolved_yaml="a: 1\n")
    source = PolicySource(uri=str(tmp_path / "first/checkpoints/model_0004.safetensors"), keep_optimizer=True)
    train(small_config(tmp_path, "second", initial_policy=source), resolved_yaml="a: 1\n")
    train(small_config(tmp_path, "first", total_timesteps=8192), resolved_yaml="a: 1\n")  # its optimizer goes on
    longer = small_config(tmp_path, "second", initial_policy=source, total_timesteps=8192)
    assert train(longer, resolved_yaml="a: 1\n")["agent_step"] == 8192


def test_opponents_of_one_name_are_told_apart(tmp_path: Path) -> None:
    builtins = {"one": "weak", "two": "strong"}
    for folder, name in builtins.items():
        (tmp_path / folder).mkdir()
        shutil.copy(
            Path(dual_policy_plugin.__file__).parent / f"builtin/arena/{name}.safetensors",
            tmp_path / folder / "old.safetensors",
        )
    opponents = [str(tmp_path / folder / "old.safetensors") for folder in builtins]
    config = small_config(tmp_path, total_timesteps=2048, evaluate_interval=1, best_metric="evals/old-2/win_rate")
    result = train(replace(config, evals=EvalsConfig(episodes=32, opponents=opponents)), resolved_yaml="a: 1\n")
    assert [match["opponent"] for match in result["evals"]] == ["old", "old-2"]
    first = lines_of(tmp_path / "small/metrics.jsonl")[0]
    assert {"evals/old/win_rate", "evals/old-2/win_rate"} <= first.keys()


def test_opponents_without_a_seat_are_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    trainer = replace(config.trainer, dual_policy=DualPolicyConfig())
    evals = EvalsConfig(episodes=32, opponents=["builtin://arena/weak"])
    with pytest.raises(ConfigError, match=r"evals.opponents=.* would find no seat: all agents learn"):
        train(replace(config, trainer=trainer, evals=evals), resolved_yaml="a: 1\n")


def test_best_by_an_evaluation_that_happens_at_the_end_only_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"best_metric=evals/random/win_rate .* set trainer.evaluate_interval"):
        train(small_config(tmp_path, best_metric="evals/random/win_rate"), resolved_yaml="a: 1\n")


def test_a_layout_waits_while_the_npc_is_switched_off(tmp_path: Path) -> None:
    config = small_config(tmp_path, total_timesteps=1)
    dual = DualPolicyConfig(enabled=False, assignment=[4, 5, 6, 7])
    result = train(replace(config, trainer=replace(config.trainer, dual_policy=dual)), resolved_yaml="a: 1\n")
    assert result["metrics"]["dual_policy/policy_a_agent_count"] == 8


def test_equal_runs_make_equal_checkpoints_byte_for_byte(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        train(small_config(tmp_path / folder), resolved_yaml="a: 1\n")
    files = [tmp_path / folder / "small/checkpoints/model_0004.safetensors" for folder in ("one", "other")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_from_python_keeps_its_config_and_refuses_another(tmp_path: Path) -> None:
    train(small_config(tmp_path))
    with pytest.raises(RunError, match=r"trainer.gamma: 0.99 -> 0.9"):
        train(small_config(tmp_path, gamma=0.9))
    train(small_config(tmp_path, total_timesteps=5120))


def test_an_env_that_will_not_fit_is_refused_before_it_is_built(tmp_path: Path) -> None:
    config = replace(small_config(tmp_path), env=EnvConfig(num_envs=65536, args={"height": 64, "width": 64}))
    need = env_bytes(config.env)
    assert need > 7e9  # about what was measured at this size
    with pytest.raises(ConfigError, match=r"env.num_envs=65536 .* lower env.num_envs to \d+"):
        check_memory({"env": need}, 4_000_000_000, "cpu", num_envs=65536, horizon=0)
