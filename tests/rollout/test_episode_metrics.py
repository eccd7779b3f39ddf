"""Episode figures by hand: returns, wins with exact ties, counters, what counts and what is absent."""

from __future__ import annotations

import pytest
import torch

from dual_policy_plugin.policies.pool import Npc, NpcPool
from dual_policy_plugin.ranks.distributed import Ranks
from dual_policy_plugin.rollout.assignment import Assignment, assign
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.types import EnvSpec, ObservationSpace, StepResult

CPU = torch.device("cpu")


def spec(num_envs: int, num_agents: int, counters: tuple[str, ...] = ()) -> EnvSpec:
    space = ObservationSpace(kind="vector", shape=(1,), features=("x",))
    return EnvSpec(
        name="toy", num_envs=num_envs, num_agents=num_agents, observation_space=space, actions=("a",),
        max_episode_steps=9, counters=counters,
    )  # fmt: skip


def step(rewards: list[list[float]], ends: list[bool], counters: torch.Tensor | None = None) -> StepResult:
    table, ended = torch.tensor(rewards), torch.tensor(ends)
    return StepResult(table, ended.unsqueeze(1).expand_as(table), ended, counters=counters)


def make(split: Assignment, num_envs: int, pool: NpcPool | None = None, **which: bool) -> EpisodeMetrics:
    counts = {"count_first": True, "count_later": True} | which
    return EpisodeMetrics(spec(num_envs, split.num_agents), split, pool, CPU, **counts)


def test_returns_and_wins_by_hand() -> None:
    metrics = make(assign(4, 0.25), 3)  # seat 0 learns, seats 1 to 3 are the NPC's
    metrics.add(step([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], [False] * 3))
    metrics.add(step([[1, 3, 0, 0], [0, 0, 1, 1], [0.25, 0.25, 0.25, 0.25]], [True] * 3))
    # learner 2, 0, 0.25; NPC mean 1, 1, 0.25: a win, a loss, a draw
    figures = metrics.take(Ranks())
    assert figures["dual_policy/episodes"] == 3
    assert figures["dual_policy/win_rate"] == 0.5
    assert figures["dual_policy/policy_a_reward"] == pytest.approx((2 + 0 + 0.25) / 3)
    assert figures["dual_policy/policy_a_reward_total"] == pytest.approx((2 + 0 + 0.25) / 3)
    assert figures["dual_policy/npc_reward_total"] == pytest.approx((3 + 3 + 0.75) / 3)
    assert figures["dual_policy/npc_reward"] == pytest.approx((3 + 3 + 0.75) / 9)
    assert figures["dual_policy/combined_reward_total"] == pytest.approx((5 + 3 + 1) / 3)
    assert figures["dual_policy/combined_reward"] == pytest.approx((5 + 3 + 1) / 12)
    assert figures["dual_policy/policy_a_agent_count"] == 1
    assert figures["dual_policy/npc_agent_count"] == 3
    again = metrics.take(Ranks())
    assert set(again) == {"dual_policy/policy_a_agent_count", "dual_policy/npc_agent_count"}  # absent, not zero


def test_an_env_may_say_itself_who_won() -> None:
    metrics = make(assign(2, 0.5), 2)
    result = step([[9, 0], [9, 0]], [True, True])
    result.scores = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    metrics.add(result)
    figures = metrics.take(Ranks())
    assert figures["dual_policy/win_rate"] == 0.25  # a loss and a draw, whatever the returns
    assert figures["dual_policy/policy_a_reward"] == 9


def test_a_tie_of_thirds_is_exact() -> None:
    metrics = make(assign(4, 0.25), 1)
    for rewards in ([0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]):
        metrics.add(step([rewards], [rewards == [1, 0, 0, 1]]))
    assert metrics.take(Ranks())["dual_policy/win_rate"] == 0.5  # 1 against 3 / 3


@pytest.mark.parametrize(("first", "later", "expected"), [(True, False, 1), (False, True, 2), (True, True, 3)])
def test_which_episodes_count(first: bool, later: bool, expected: int) -> None:
    metrics = make(assign(2, 0.5), 1, count_first=first, count_later=later)
    for _ in range(3):
        metrics.add(step([[1, 0]], [True]))
    assert metrics.take(Ranks())["dual_policy/episodes"] == expected


def test_returns_start_anew_with_each_episode() -> None:
    metrics = make(assign(2, 0.5), 2)
    metrics.add(step([[5, 0], [1, 0]], [True, False]))
    metrics.add(step([[1, 0], [1, 0]], [True, True]))
    assert metrics.take(Ranks())["dual_policy/policy_a_reward"] == pytest.approx((5 + 1 + 2) / 3)


def test_counters_are_split_by_the_assignment() -> None:
    split = assign(4, 0.5, "last")
    metrics = EpisodeMetrics(spec(1, 4, ("hearts", "ore")), split, None, CPU, count_first=True, count_later=True)
    counters = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [5.0, 50.0]]])
    metrics.add(step([[0, 0, 0, 0]], [False], counters))
    metrics.add(step([[0, 0, 0, 0]], [True], counters))
    figures = metrics.take(Ranks())
    assert (figures["env/policy_a/hearts"], figures["env/npc/hearts"]) == (4.0, 1.5)
    assert (figures["env/policy_a/ore"], figures["env/npc/ore"]) == (40.0, 15.0)


def test_a_pool_has_figures_for_each_npc() -> None:
    class Still(torch.nn.Module):
        state_size = 0

    pool = NpcPool([Npc(name=name, policy=Still()) for name in ("old", "new")], num_envs=4, num_npc=1, device=CPU)
    pool.npc_of_env.copy_(torch.tensor([0, 1, 1, 1]))
    metrics = make(assign(2, 0.5), 4, pool)
    metrics.add(step([[1, 0], [1, 0], [0, 1], [0, 1]], [True] * 4))
    figures = metrics.take(Ranks())
    assert figures["dual_policy/win_rate"] == 0.5
    assert figures["dual_policy/npc/old/win_rate"] == 1.0
    assert figures["dual_policy/npc/new/win_rate"] == pytest.approx(1 / 3)
    assert (figures["dual_policy/npc/old/share"], figures["dual_policy/npc/new/episodes"]) == (0.25, 3)


def test_a_tie_of_fractional_rewards_is_half_a_win() -> None:
    """All eight agents get the same rewards: whatever those are, five of them have the mean of the other three."""
    torch.manual_seed(0)
    metrics = make(assign(8, 0.6), 500)
    for _ in range(25):
        metrics.add(step(torch.randn(500, 1).expand(-1, 8).tolist(), [False] * 500))
    metrics.add(step([[0.1] * 8] * 500, [True] * 500))
    figures = metrics.take(Ranks())
    assert metrics.assignment.num_learner == 5
    assert float(metrics.sums.abs().sum()) == 0.0
    assert figures["dual_policy/win_rate"] == 0.5
