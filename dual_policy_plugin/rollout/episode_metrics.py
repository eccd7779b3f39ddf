"""Episode metrics as running sums on the device, read by the host once an iteration.

Takes StepResults and the Assignment; gives the `dual_policy/*` and `env/*` figures of docs and dashboards.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from dual_policy_plugin.policies.pool import NpcPool
from dual_policy_plugin.ranks.distributed import Ranks, sum_over_ranks
from dual_policy_plugin.rollout.assignment import Assignment
from dual_policy_plugin.types import EnvSpec, StepResult


def win_shares(sums: Tensor, num_first: int | Tensor, num_second: int | Tensor) -> Tensor:
    """Who won: 1 where the first side's mean is the greater one, 0 where the second side's is, 1/2 where they tie.

    Means are compared by cross-multiplication, so that ties are exact.

    Args:
        sums: (num_envs, 2) float64, over each side's agents: of their scores where the env gives some, else returns.
        num_first, num_second: agents of each side, or (num_envs,) of them.

    Returns:
        (num_envs,) float64.
    """
    return (sums[:, 0] * num_second - sums[:, 1] * num_first).sign_().add_(1.0).mul_(0.5)


class EpisodeMetrics:
    """Sums over the episodes that ended since the last `take`.

    An episode's return is a row's summed reward. The learner wins an episode in which its agents' mean return exceeds
    the NPC agents' mean return; equal is half a win. Where the env gives scores, their means are compared instead.
    All tensors are written in place and never replaced.

    Attributes:
        returns: (num_envs, num_agents) float64, of the running episodes: sums of float32 rewards are exact in it, so a
            tie of fractions is a tie.
        is_counting: (num_envs,) bool, whether the running episode will count when it ends.
        count_later: whether the next ones will.
        sums: (num_npcs, num_fields) float64: episodes, wins, the two returns, then the env's counters of both.
    """

    def __init__(
        self,
        spec: EnvSpec,
        assignment: Assignment,
        pool: NpcPool | None,
        device: torch.device,
        *,
        count_first: bool,
        count_later: bool,
    ) -> None:
        """Args say which episodes count: `count_first` the one each env starts with, `count_later` all others."""
        self.assignment, self.pool, self.counters = assignment, pool, spec.counters
        self.num_npcs = 1 if pool is None else len(pool.npcs)
        self.returns = torch.zeros(spec.num_envs, spec.num_agents, dtype=torch.float64, device=device)
        self.is_counting = torch.full((spec.num_envs,), count_first, device=device)
        self._envs, self.count_later = slice(0, spec.num_envs), count_later
        # (num_agents, 2): sums over learner seats, over NPC seats, as one product
        teams = torch.zeros(spec.num_agents, 2, dtype=torch.float64, device=device)
        teams[list(assignment.learner_seats), 0] = 1.0
        teams[list(assignment.npc_seats), 1] = 1.0
        self._teams = teams
        # (num_agents * num_counters, 2 * num_counters): the same sums of every counter, learner and NPC in turn
        self._counter_teams = torch.einsum(
            "as,cd->acds", teams, torch.eye(len(spec.counters), dtype=torch.float64, device=device)
        ).reshape(spec.num_agents * len(spec.counters), 2 * len(spec.counters))
        self._fields = torch.ones(spec.num_envs, 4 + 2 * len(spec.counters), dtype=torch.float64, device=device)
        self.sums = torch.zeros(self.num_npcs, 4 + 2 * len(spec.counters), dtype=torch.float64, device=device)

    def part(self, envs: slice) -> EpisodeMetrics:
        """The metrics of some of the envs, which are added to the same sums; episodes' returns are views."""
        part = copy.copy(self)
        part.returns, part.is_counting, part._envs = self.returns[envs], self.is_counting[envs], envs
        part._fields = self._fields[envs]
        return part

    def start_episodes(self) -> None:
        """Forgets the running episodes: every env starts a new one, which does not count."""
        self.returns.zero_()
        self.is_counting.zero_()

    @torch.no_grad()
    def add(self, result: StepResult) -> None:
        """Adds one step; call it before the pool draws new NPCs."""
        self.returns += result.rewards
        counted = result.episode_ends & self.is_counting  # (num_envs,)
        fields = self._fields  # (num_envs, num_fields)
        fields[:, 2:4] = sides = self.returns @ self._teams  # learner's and NPC's summed returns
        verdict = sides if result.scores is None else result.scores.double() @ self._teams
        fields[:, 1] = win_shares(verdict, self.assignment.num_learner, self.assignment.num_npc)
        if result.counters is not None and self.counters:
            fields[:, 4:] = result.counters.flatten(1).double() @ self._counter_teams
        if self.pool is None or self.num_npcs == 1:
            counts = counted.unsqueeze(0)
        else:
            npc_of_env = self.pool.npc_of_env[self._envs]
            counts = (npc_of_env == torch.arange(self.num_npcs, device=counted.device).unsqueeze(1)) & counted
        self.sums += counts.double() @ fields
        self.returns.masked_fill_(result.episode_ends.unsqueeze(1), 0.0)
        self.is_counting.masked_fill_(result.episode_ends, self.count_later)

    def take(self, ranks: Ranks) -> dict[str, float]:
        """The figures of all ranks since the last call."""
        return self.figures(self.take_sums(ranks).cpu())

    def take_sums(self, ranks: Ranks) -> Tensor:
        """`sums` of all ranks since the last call, on the device; the own ones start anew."""
        sums = sum_over_ranks(self.sums.clone(), ranks)
        self.sums.zero_()
        return sums

    def figures(self, sums: Tensor) -> dict[str, float]:
        """The figures of `take_sums`, on the host; names whose episodes are none are absent, not zero."""
        has_npc = self.assignment.num_npc > 0
        metrics: dict[str, float] = {"dual_policy/policy_a_agent_count": float(self.assignment.num_learner)}
        if has_npc:
            metrics["dual_policy/npc_agent_count"] = float(self.assignment.num_npc)
        metrics |= self._episode_figures(sums.sum(dim=0), has_npc)
        if self.pool is not None and self.num_npcs > 1:
            total = float(sums[:, 0].sum())
            for npc, row in zip(self.pool.npcs, sums, strict=True):
                if not npc.name:  # an empty slot
                    continue
                if total > 0:
                    metrics[f"dual_policy/npc/{npc.name}/share"] = float(row[0]) / total
                if row[0] > 0:
                    metrics[f"dual_policy/npc/{npc.name}/episodes"] = float(row[0])
                    metrics[f"dual_policy/npc/{npc.name}/win_rate"] = float(row[1] / row[0])
        return metrics

    def names(self) -> list[str]:
        """What `take` may give once episodes have ended."""
        return sorted(self._episode_figures(torch.ones(self.sums.shape[1]), self.assignment.num_npc > 0))

    def _episode_figures(self, sums: Tensor, has_npc: bool) -> dict[str, float]:
        episodes = float(sums[0])
        if episodes == 0:
            return {}
        num_learner, num_npc = self.assignment.num_learner, self.assignment.num_npc
        learner_total, npc_total = float(sums[2]) / episodes, float(sums[3]) / episodes
        combined = learner_total + npc_total
        figures = {
            "dual_policy/episodes": episodes,
            "dual_policy/policy_a_reward": learner_total / num_learner,
            "dual_policy/policy_a_reward_total": learner_total,
            "dual_policy/combined_reward": combined / self.assignment.num_agents,
            "dual_policy/combined_reward_total": combined,
        }
        if has_npc:
            figures["dual_policy/win_rate"] = float(sums[1]) / episodes
            figures["dual_policy/npc_reward"] = npc_total / num_npc
            figures["dual_policy/npc_reward_total"] = npc_total
        for i, name in enumerate(self.counters):
            figures[f"env/policy_a/{name}"] = float(sums[4 + 2 * i]) / episodes / num_learner
            if has_npc:
                figures[f"env/npc/{name}"] = float(sums[5 + 2 * i]) / episodes / num_npc
        return figures
