"""The collector with env workers: two halves in turn give what the whole gives, bit for bit, and take less time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dual_policy_plugin.config import EnvConfig
from dual_policy_plugin.envs.build import make_env
from dual_policy_plugin.envs.workers import WorkerVecEnv
from dual_policy_plugin.experience import Experience, allocate_experience
from dual_policy_plugin.policies.build import build_policy
from dual_policy_plugin.policies.pool import Npc, NpcPool
from dual_policy_plugin.rollout.assignment import assign
from dual_policy_plugin.rollout.collector import collect_rollout, start_rollouts
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy
from dual_policy_plugin.types import AsyncVecEnv, EnvSpec, ObservationSpace, StepResult, VecEnv
from tests.envs.toy_envs import make_script, make_sleepy, make_trouble, make_walker
from tests.harness import CPU


class Whole:
    """An env that is never stepped in halves."""

    def __init__(self, env: VecEnv) -> None:
        self.spec, self.env = env.spec, env
        self.reset, self.observe, self.observe_final, self.close = env.reset, env.observe, env.observe_final, env.close

    def step(self, actions: Tensor) -> StepResult:
        return self.env.step(actions)


class Exact(nn.Module):
    """Works with whole numbers only, so that no number of rows rounds otherwise: its state sums what it saw."""

    state_size = 2

    def __init__(self, spec: EnvSpec, stride: int) -> None:
        super().__init__()
        self.stride, self.num_actions = stride, len(spec.actions)

    def pack(self) -> None:
        pass

    def forward_step(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = (obs[:, 0] + 3 * obs[:, 1]).unsqueeze(1)
        new_state = torch.cat([state[:, :1] + 1, (state[:, 1:] * 2 + seen) % 8191], dim=1)
        logits = (new_state.sum(dim=1, keepdim=True) + self.stride * torch.arange(self.num_actions)) % 3
        return logits, new_state[:, 1] + 10 * state[:, 0], new_state


class Play:
    """All that a rollout reads and writes, for one env; `collect` plays the next one."""

    def __init__(
        self, env: VecEnv, learner: nn.Module, npcs: list[nn.Module], *, horizon: int = 7, num_learner: int = 1,
        stagger: bool = True, first_env: int = 0,
    ) -> None:  # fmt: skip
        spec = env.spec
        split = assign(spec.num_agents, num_learner / spec.num_agents, "last")
        pool = None
        if npcs:
            named = [Npc(name=f"npc{k}", policy=npc, is_greedy=k == 1) for k, npc in enumerate(npcs)]
            pool = NpcPool(named, num_envs=spec.num_envs, num_npc=split.num_npc, device=CPU)
        self.env, self.pool, self.first_env, self.num_rollouts = env, pool, first_env, 0
        self.mixed = MixedPolicy(learner, pool, split, spec, CPU)
        self.experience = allocate_experience(
            spec, horizon=horizon, num_rows=self.mixed.num_learner_rows, state_size=learner.state_size, device=CPU
        )
        self.metrics = EpisodeMetrics(spec, split, pool, CPU, count_first=False, count_later=True)
        env.reset(5, stagger=stagger)
        start_rollouts(env, self.mixed, self.experience)

    def collect(self) -> None:
        horizon = self.experience.horizon
        numbers = self.mixed.random_numbers(3, self.num_rollouts * horizon, horizon, first_env=self.first_env)
        collect_rollout(self.env, self.mixed, self.experience, self.metrics, numbers)
        self.num_rollouts += 1

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all that the rollout wrote."""
        found = {field.name: getattr(self.experience, field.name) for field in fields(Experience)}
        found |= {"learner_state": self.mixed.learner_state, "returns": self.metrics.returns}
        found |= {"is_counting": self.metrics.is_counting, "sums": self.metrics.sums}
        if self.pool is not None:
            found |= {"npc_state": self.pool.state, "npc_of_env": self.pool.npc_of_env}
        return {name: tensor.clone() for name, tensor in found.items() if tensor is not None}


Build = Callable[..., WorkerVecEnv]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Iterator[Build]:
    """Makes worker envs, on what they take for a machine with cores enough for halves to pay, and closes them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    envs = []

    def make(make_host: Callable[..., Any], *, num_envs: int, num_workers: int = 2, first_env: int = 0, **args: Any):
        config = EnvConfig(name="toy", num_envs=num_envs, args=args)
        env = make_env(config, device="cpu", num_workers=num_workers, first_env=first_env, make_host=make_host)
        assert isinstance(env, WorkerVecEnv)
        envs.append(env)
        return env

    yield make
    for env in envs:
        env.close()


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_halves_give_what_the_whole_gives_bit_for_bit(build: Build) -> None:
    """Agents that die, join, terminate and are truncated; three NPCs, one of them greedy; halves of 2 and 3 envs."""
    env = build(make_script, num_envs=5, num_workers=3)
    halves = env.halves()
    assert halves is not None
    assert [half.spec.num_envs for half in halves] == [2, 3]
    seen = []
    for stepped in (env, Whole(env)):
        assert isinstance(stepped, AsyncVecEnv) == (stepped is env)
        npcs: list[nn.Module] = [Exact(env.spec, stride) for stride in (2, 5, 7)]
        play = Play(stepped, Exact(env.spec, 1), npcs, num_learner=2)
        assert play.pool is not None
        play.pool.probabilities.copy_(torch.tensor([0.2, 0.3, 0.5]))
        before = [tensor.data_ptr() for tensor in (play.mixed.learner_state, play.pool.state, play.metrics.is_counting)]
        rollouts = []
        for _ in range(3):
            play.collect()
            rollouts.append(play.tensors())
        after = [tensor.data_ptr() for tensor in (play.mixed.learner_state, play.pool.state, play.metrics.is_counting)]
        assert before == after  # views and captured graphs look there
        seen.append(rollouts)
    for ours, theirs in zip(*seen, strict=True):
        assert_equal(ours, theirs)
    last = seen[0][-1]
    assert (last["final_values"] != 0).any()
    assert 0 < last["weights"].mean() < 1
    assert len(last["npc_of_env"].unique()) > 1
    assert (last["sums"][:, 0] > 0).sum() > 1
    assert len(torch.stack([rollout["actions"] for rollout in seen[0]]).unique()) == 4


@pytest.mark.parametrize("num_npcs", [0, 1, 4])
def test_with_real_nets_each_half_is_a_run_of_its_own(build: Build, num_npcs: int) -> None:
    """A matrix product may round otherwise with half the rows, so halves are compared with two runs of half the envs.

    Four NPCs: half of 8 envs starts with the NPCs that it would have in a run of its own.
    """

    def policy(env: VecEnv, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = build_policy("fast", {"hidden_size": 16}, env.spec.observation_space, env.spec.actions)
        net.pack()
        return net.requires_grad_(False)

    def play(env: VecEnv, first_env: int = 0) -> list[dict[str, Tensor]]:
        npcs = [policy(env, 2 + k) for k in range(num_npcs)]
        started = Play(env, policy(env, 1), npcs, num_learner=1 if npcs else 2, stagger=False, first_env=first_env)
        rollouts = []
        for _ in range(2):
            started.collect()
            rollouts.append(started.tensors())
        return rollouts

    args = {"num_workers": 1, "max_episode_steps": 5}
    halves, whole = build(make_walker, num_envs=8, **args), Whole(build(make_walker, num_envs=8, **args))
    parts = [Whole(build(make_walker, num_envs=4, first_env=first, **args)) for first in (0, 4)]
    ours, all_rows, first, second = play(halves), play(whole), play(parts[0]), play(parts[1], 4)
    for mine, every, one, two in zip(ours, all_rows, first, second, strict=True):
        for name, tensor in mine.items():
            time_major = name in {"obs", "actions", "log_probs", "values", "rewards", "dones", "final_values"}
            joined = one[name] + two[name] if name == "sums" else torch.cat([one[name], two[name]], dim=int(time_major))
            assert torch.equal(tensor, joined), name
            assert torch.allclose(tensor.double(), every[name].double(), atol=1e-5), name
    assert (ours[0]["final_values"] != 0).any()
    assert ours[1]["initial_state"].abs().sum() > 0


def test_results_do_not_depend_on_the_number_of_workers(build: Build) -> None:
    """The halves are the same envs whoever steps them."""
    seen = []
    for num_workers in (1, 3):
        env = build(make_walker, num_envs=5, num_workers=num_workers, max_episode_steps=5)
        torch.manual_seed(1)
        learner = build_policy("fast", {"hidden_size": 16}, env.spec.observation_space, env.spec.actions)
        play = Play(env, learner, [Exact(env.spec, 1)])
        play.collect()
        seen.append(play.tensors())
    assert_equal(*seen)


def test_a_mixed_policy_with_tensors_of_its_own_is_not_split_in_silence() -> None:
    class Further(MixedPolicy):
        pass

    space = ObservationSpace(kind="vector", shape=(2,), features=("a", "b"))
    spec = EnvSpec(name="t", num_envs=4, num_agents=2, observation_space=space, actions=("x",), max_episode_steps=3)
    with pytest.raises(AssertionError, match=r"Further has no `part`"):
        Further(Exact(spec, 1), None, assign(2, 1.0), spec, CPU).part(slice(0, 2))


def test_one_env_has_no_halves(build: Build) -> None:
    env = build(make_walker, num_envs=1)
    assert env.halves() is None
    play = Play(env, Exact(env.spec, 1), [Exact(env.spec, 2)])
    play.collect()
    assert play.experience.actions.unique().numel() > 1


@pytest.mark.parametrize("where", [0, 3])
def test_an_env_that_breaks_while_its_half_is_not_looked_at_ends_the_rollout(build: Build, where: int) -> None:
    env = build(make_trouble, num_envs=4, where=where)
    play = Play(env, Exact(env.spec, 1), [], num_learner=2, stagger=False)
    with pytest.raises(Exception, match=rf"^env worker {where % 2} \(envs {where % 2}, {where % 2 + 2}\) raised:"):
        play.collect()
    with pytest.raises(Exception, match="is closed"):
        env.step(torch.zeros(4, 2, dtype=torch.int64))


class Thinker(Exact):
    """Takes its time: `row_s` seconds a row."""

    def __init__(self, spec: EnvSpec, row_s: float) -> None:
        super().__init__(spec, 1)
        self.row_s = row_s

    def forward_step(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        time.sleep(self.row_s * len(obs))
        return super().forward_step(obs, state)


def test_workers_step_one_half_while_the_other_is_inferred(build: Build) -> None:
    """Two workers with two envs of 4 ms each, and a policy that takes 8 ms for all rows: 16 ms a step one after the
    other, 8 ms when nobody waits. All of it is sleep, so a busy machine adds to both alike."""
    env = build(make_sleepy, num_envs=4, seconds=0.004)
    seconds = []
    for stepped in (env, Whole(env)):
        play = Play(stepped, Thinker(env.spec, 0.001), [], horizon=24, num_learner=2)
        start = time.perf_counter()
        play.collect()
        seconds.append(time.perf_counter() - start)
    assert seconds[1] >= 24 * 0.016
    assert seconds[1] / seconds[0] > 1.15, seconds  # 1.5 to 1.8 seen on two cores with four times their load
