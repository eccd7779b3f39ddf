"""Plays one policy against another and counts: both seatings, equal seeds, the same code as training's metrics.

Takes two policies and an env; gives a MatchResult.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dual_policy_plugin.distributed import Ranks
from dual_policy_plugin.evaluation.intervals import wilson_interval
from dual_policy_plugin.policies.pool import Npc, NpcPool
from dual_policy_plugin.rollout.assignment import Assignment
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics, episode_counts
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy
from dual_policy_plugin.types import VecEnv

CHECK_EVERY = 16  # steps between looks at whether all first episodes have ended


@dataclass(kw_only=True, slots=True, frozen=True)
class MatchResult:
    """A policy's record against one opponent."""

    opponent: str
    win_rate: float
    """Wins plus half the draws, over episodes."""
    low: float
    high: float
    """95 % interval of the win rate (Wilson)."""
    episodes: int
    learner_return: float
    """Mean return per agent of the policy."""
    opponent_return: float

    def as_dict(self) -> dict[str, Any]:
        """For result.json."""
        return asdict(self)


def play_match(
    policy: nn.Module,
    opponent: Npc,
    env: VecEnv,
    assignment: Assignment,
    *,
    episodes: int,
    seed: int,
    device: torch.device,
) -> MatchResult:
    """Plays at least `episodes` episodes, half with `assignment` and half with its seats counted from the other end.

    Every env plays one episode a round and only its first counts, so that short episodes have no more say than long
    ones. Both seatings see the same seeds.

    Args:
        policy: in eval mode and packed.
        opponent: the frozen policy on the other seats.
        env: reset at will; its num_envs episodes are played at once.
        assignment: seats of the policy; must leave some to the opponent.
        episodes: how many at least; rounded up to whole rounds.
        seed: of the episodes and of both policies' draws.
        device: where the policies are.
    """
    rounds = -(-episodes // (2 * env.spec.num_envs))
    wins = total = 0.0
    returns = torch.zeros(2, dtype=torch.float64)
    for seating in (assignment, assignment.mirrored()):
        for i in range(rounds):
            pool = NpcPool([opponent], num_envs=env.spec.num_envs, num_npc=seating.num_npc, device=device)
            mixed = MixedPolicy(policy, pool, seating, env.spec, device)
            metrics = EpisodeMetrics(env.spec, seating, pool, device, count_first=True, count_later=False)
            _play_first_episodes(env, mixed, metrics, seed + i)
            more_wins, more_episodes = episode_counts(metrics)
            figures = metrics.take(Ranks())
            wins, total = wins + more_wins, total + more_episodes
            returns += more_episodes * torch.tensor(
                [figures["dual_policy/policy_a_reward"], figures["dual_policy/npc_reward"]], dtype=torch.float64
            )
    low, high = wilson_interval(wins, total)
    return MatchResult(
        opponent=opponent.name,
        win_rate=wins / total,
        low=low,
        high=high,
        episodes=int(total),
        learner_return=float(returns[0]) / total,
        opponent_return=float(returns[1]) / total,
    )


@torch.no_grad()
def _play_first_episodes(env: VecEnv, mixed: MixedPolicy, metrics: EpisodeMetrics, seed: int) -> None:
    """Steps until every env has ended its first episode."""
    spec = env.spec
    obs = _row_buffer(mixed)
    env.reset(seed)
    for start in range(0, spec.max_episode_steps, CHECK_EVERY):
        steps = min(CHECK_EVERY, spec.max_episode_steps - start)
        numbers = mixed.random_numbers(seed, start, steps)
        for t in range(steps):
            mixed.observe(env, obs)
            mixed.act(obs, numbers.learner[t], numbers.npc[t])
            result = env.step(mixed.actions)
            metrics.add(result)
            learner_dones = result.dones.index_select(1, mixed.learner_seats).flatten()
            mixed.end_step(result, learner_dones, numbers.draw[t])
        if not bool(metrics.is_counting.any()):
            return


def _row_buffer(mixed: MixedPolicy) -> Tensor:
    """(num_envs * num_learner, *shape), for observations of the learner rows."""
    shape = (mixed.num_learner_rows, *mixed.npc_obs.shape[1:])
    return torch.zeros(shape, dtype=mixed.npc_obs.dtype, device=mixed.npc_obs.device)
