"""What a run needs for one number of learners per env: seats, pool, metrics, experience, and how rollouts are played.

Between `parts.py`, which builds a run, and `train.py`, whose loop plays with one Seating at a time. Where the share of
learners changes during a run, each number of learners has its own tensors and graphs, made when it first comes up.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dual_policy_plugin.config import Config
from dual_policy_plugin.experience import Experience, allocate_experience
from dual_policy_plugin.policies.pool import Npc, NpcPool
from dual_policy_plugin.rollout.assignment import Assignment, seat_learners
from dual_policy_plugin.rollout.captured import Play, choose_play
from dual_policy_plugin.rollout.collector import start_rollouts
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy
from dual_policy_plugin.types import VecEnv


@dataclass(kw_only=True, slots=True, frozen=True)
class Seating:
    """The live objects that belong to one split of the seats."""

    assignment: Assignment
    mixed: MixedPolicy
    metrics: EpisodeMetrics
    experience: Experience
    play: Play
    """Plays one rollout into `experience`."""
    how: str
    """How it plays, for the log."""

    def start(self, env: VecEnv) -> None:
        """New episodes in all envs: states zeroed, returns forgotten, the running episodes do not count."""
        self.mixed.start_episodes()
        self.metrics.start_episodes()
        start_rollouts(env, self.mixed, self.experience)


class Seatings:
    """The seatings of a run, by the number of learners per env; each is made once and kept."""

    def __init__(self, config: Config, env: VecEnv, first: Assignment, learner: nn.Module, npcs: list[Npc]) -> None:
        """Args: the run, its env, the seats it begins with, the learner in the env's spaces, the frozen policies."""
        self._config, self._env, self._learner, self._npcs, self._first = config, env, learner, npcs, first
        self._device = next(learner.parameters()).device
        self._made: dict[int, Seating] = {}

    def __call__(self, num_learner: int) -> Seating:
        """The seating with `num_learner` learners in each env."""
        if num_learner not in self._made:
            self._made[num_learner] = self._make(num_learner)
        return self._made[num_learner]

    def _make(self, num_learner: int) -> Seating:
        env, spec, trainer, device = self._env, self._env.spec, self._config.trainer, self._device
        assignment, layout = self._first, trainer.dual_policy.assignment
        if num_learner != assignment.num_learner:
            assert isinstance(layout, str), "a schedule goes with a named layout only"
            assignment = seat_learners(spec.num_agents, num_learner, layout)
        has_pool = bool(self._npcs) and assignment.num_npc > 0
        pool = (
            NpcPool(self._npcs, num_envs=spec.num_envs, num_npc=assignment.num_npc, device=device) if has_pool else None
        )
        mixed = MixedPolicy(self._learner, pool, assignment, spec, device)
        metrics = EpisodeMetrics(spec, assignment, pool, device, count_first=False, count_later=True)
        experience = allocate_experience(
            spec,
            horizon=trainer.horizon,
            num_rows=mixed.num_learner_rows,
            state_size=mixed.learner_state.shape[1],
            device=device,
        )
        play, how = choose_play(env, mixed, experience, metrics, fused=trainer.fused)
        return Seating(assignment=assignment, mixed=mixed, metrics=metrics, experience=experience, play=play, how=how)
