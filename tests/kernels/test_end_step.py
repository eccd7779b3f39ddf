"""The end-of-step kernel against the collector's lines, EpisodeMetrics.add and MixedPolicy.end_step."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from dual_policy_plugin.kernels.end_step import BLOCK_ENVS, end_step
from dual_policy_plugin.policies.pool import Npc, NpcPool
from dual_policy_plugin.rollout.assignment import assign
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy
from dual_policy_plugin.types import EnvSpec, ObservationSpace, StepResult

CPU = torch.device("cpu")
LEARNER_STATE, NPC_STATE = 6, 70  # neither a power of two; the second is more than one block of columns


class Stateful(nn.Module):
    """A policy of which only the size of its state matters here."""

    def __init__(self, state_size: int) -> None:
        super().__init__()
        self.state_size = state_size


@dataclass(slots=True)
class Side:
    """All that a step's end changes, once for the torch methods and once for the kernel."""

    mixed: MixedPolicy
    metrics: EpisodeMetrics
    rewards: torch.Tensor
    dones: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {
            "rewards": self.rewards, "dones": self.dones, "returns": self.metrics.returns,
            "is_counting": self.metrics.is_counting, "sums": self.metrics.sums, "learner": self.mixed.learner_state,
        }  # fmt: skip
        if self.mixed.pool is not None:
            found |= {"npc": self.mixed.pool.state, "npc_of_env": self.mixed.pool.npc_of_env}
        return found


def make_side(num_envs: int, num_agents: int, pct: float, num_npcs: int, num_counters: int, count_later: bool) -> Side:
    spec = EnvSpec(
        name="toy", num_envs=num_envs, num_agents=num_agents, actions=("a",), max_episode_steps=9,
        observation_space=ObservationSpace(kind="vector", shape=(1,), features=("x",)),
        counters=("hearts", "ore", "hits")[:num_counters],
    )  # fmt: skip
    split = assign(num_agents, pct, "interleaved")
    npcs = [Npc(name=str(k), policy=Stateful(NPC_STATE)) for k in range(num_npcs)]
    pool = NpcPool(npcs, num_envs=num_envs, num_npc=split.num_npc, device=CPU) if npcs else None
    if pool is not None:
        pool.probabilities.copy_(torch.arange(1.0, num_npcs + 1).softmax(0))
    return Side(
        mixed=MixedPolicy(Stateful(LEARNER_STATE), pool, split, spec, CPU),
        metrics=EpisodeMetrics(spec, split, pool, CPU, count_first=not count_later, count_later=count_later),
        rewards=torch.full((num_envs * split.num_learner,), 9.0),
        dones=torch.zeros(num_envs * split.num_learner, dtype=torch.bool),
    )


def random_step(num_envs: int, num_agents: int, num_counters: int, generator: torch.Generator) -> StepResult:
    """Small multiples of 1/8, so that every second episode or so is a tie; some agents are done before their env."""
    ends = torch.rand(num_envs, generator=generator) < 0.4
    shape = (num_envs, num_agents)
    return StepResult(
        rewards=torch.randint(-1, 2, shape, generator=generator) * 0.125,
        dones=ends.unsqueeze(1) | (torch.rand(shape, generator=generator) < 0.1),
        episode_ends=ends,
        counters=torch.randint(0, 9, (*shape, num_counters), generator=generator).float() if num_counters else None,
    )


def end_step_in_torch(side: Side, result: StepResult, uniforms: torch.Tensor) -> None:
    seats = side.mixed.learner_seats
    side.rewards.copy_(result.rewards.index_select(1, seats).flatten())
    side.dones.copy_(result.dones.index_select(1, seats).flatten())
    side.metrics.add(result)
    side.mixed.end_step(result, side.dones, uniforms)


def end_step_by_kernel(side: Side, result: StepResult, uniforms: torch.Tensor, count_later: bool) -> None:
    mixed, metrics, pool = side.mixed, side.metrics, side.mixed.pool
    end_step(
        result,
        learner_seats=mixed.learner_seats,
        npc_seats=mixed.npc_seats,
        rewards=side.rewards,
        dones=side.dones,
        returns=metrics.returns,
        is_counting=metrics.is_counting,
        count_later=count_later,
        sums=metrics.sums,
        learner_state=mixed.learner_state,
        npc_state=None if pool is None else pool.state,
        npc_of_env=None if pool is None else pool.npc_of_env,
        probabilities=None if pool is None else pool.probabilities,
        uniforms=uniforms,
    )


@pytest.mark.parametrize(
    ("num_envs", "num_agents", "pct", "num_npcs", "num_counters", "has_scores"),
    [
        (5, 2, 0.5, 1, 0, False),
        (BLOCK_ENVS + 5, 5, 0.6, 3, 2, False),
        (9, 8, 0.25, 16, 3, True),
        (7, 3, 1.0, 0, 1, False),
        (BLOCK_ENVS, 1, 1.0, 0, 0, True),
    ],
)
@pytest.mark.parametrize("count_later", [True, False])
def test_kernel_and_torch_agree(
    num_envs: int, num_agents: int, pct: float, num_npcs: int, num_counters: int, has_scores: bool, count_later: bool
) -> None:
    generator = torch.Generator().manual_seed(num_envs + num_agents)
    plain, fused = (make_side(num_envs, num_agents, pct, num_npcs, num_counters, count_later) for _ in range(2))
    played = set()
    for _ in range(6):
        result = random_step(num_envs, num_agents, num_counters, generator)
        if has_scores:
            result.scores = torch.randint(0, 3, (num_envs, num_agents), generator=generator).float()
        for name in ("learner", "npc"):  # as the policies' step leaves them: nowhere zero
            for tensors in (plain.tensors(), fused.tensors()):
                if name in tensors:
                    tensors[name].fill_(1.5)
        uniforms = torch.rand(num_envs, generator=generator)
        end_step_in_torch(plain, result, uniforms)
        end_step_by_kernel(fused, result, uniforms, count_later)
        for name, tensor in plain.tensors().items():
            assert torch.equal(fused.tensors()[name], tensor), name
        if "npc_of_env" in fused.tensors():
            played |= set(fused.tensors()["npc_of_env"].tolist())
    episodes, wins = float(plain.metrics.sums[:, 0].sum()), float(plain.metrics.sums[:, 1].sum())
    assert episodes > 3
    assert plain.metrics.sums[:, 2].abs().sum() > 0 or num_agents == 1
    if num_npcs:
        assert 0 < wins < episodes
        assert 2 * wins % 1 == 0
    assert num_npcs < 2 or len(played) > 1


def one_env(num_npcs: int) -> Side:
    return make_side(1, 4, 0.25, num_npcs, 0, True)


def by_hand(rewards: list[float], ends: bool) -> StepResult:
    table, ended = torch.tensor([rewards]), torch.tensor([ends])
    return StepResult(table, ended.unsqueeze(1).expand_as(table).contiguous(), ended)


def test_a_tie_of_thirds_is_exact() -> None:
    side = one_env(1)
    side.metrics.is_counting.fill_(True)
    seat = int(side.mixed.learner_seats[0])
    for t, receivers in enumerate([{(seat + 1) % 4}, {(seat + 2) % 4}, {seat, (seat + 3) % 4}]):
        rewards = [0.1 if agent in receivers else 0.0 for agent in range(4)]
        end_step_by_kernel(side, by_hand(rewards, t == 2), torch.zeros(1), True)
    assert side.metrics.sums[0, :2].tolist() == [1.0, 0.5]  # 0.1 against the mean of three times 0.1


def test_an_episode_counts_for_the_npc_that_played_it() -> None:
    side = one_env(3)
    side.metrics.is_counting.fill_(True)
    pool = side.mixed.pool
    assert pool is not None
    pool.npc_of_env.fill_(2)
    pool.probabilities.copy_(torch.tensor([0.25, 0.5, 0.25]))
    end_step_by_kernel(side, by_hand([1.0] * 4, True), torch.tensor([0.25]), True)
    assert side.metrics.sums[:, 0].tolist() == [0.0, 0.0, 1.0]
    assert pool.npc_of_env.tolist() == [1]  # a number at the boundary belongs to the next
    end_step_by_kernel(side, by_hand([1.0] * 4, False), torch.tensor([0.9]), True)
    assert pool.npc_of_env.tolist() == [1]


def test_rows_that_go_on_are_not_written() -> None:
    """A NaN stays one; a product with (1 - done) would also give one where the row is done."""
    side = make_side(3, 4, 0.5, 1, 0, True)
    dones = torch.zeros(3, 4, dtype=torch.bool)
    dones[1, side.mixed.learner_seats[1]] = dones[2, side.mixed.npc_seats[0]] = True
    result = StepResult(torch.zeros(3, 4), dones, torch.zeros(3, dtype=torch.bool))
    side.tensors()["learner"].fill_(float("nan"))
    side.tensors()["npc"].fill_(float("nan"))
    end_step_by_kernel(side, result, torch.zeros(3), True)
    assert side.tensors()["learner"].isnan().all(dim=1).tolist() == [True, True, True, False, True, True]
    assert side.tensors()["npc"].isnan().all(dim=1).tolist() == [True, True, True, True, False, True]
    assert side.tensors()["learner"][3].tolist() == [0.0] * LEARNER_STATE
    assert side.tensors()["npc"][4].tolist() == [0.0] * NPC_STATE
