"""What a run needs for one number of learners per env: seats, pool, metrics, experience, and how rollouts are played.

Between `parts.py`, which builds a run, and `train.py`, whose loop plays with one Seating at a time. Where the share of
learners changes during a run, each number of learners has its own tensors and graphs, made when it first comes up.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dual_policy_plugin.config import Config
from dual_policy_plugin.experience import Experience, allocate_experience
from dual_policy_plugin.policies.pool import NpcPool
from dual_policy_plugin.rng import LATER_EPISODES, LOW_31_BITS, hash32
from dual_policy_plugin.rollout.assignment import Assignment, seat_learners
from dual_policy_plugin.rollout.captured import Play, choose_play
from dual_policy_plugin.rollout.collector import start_rollouts
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy
from dual_policy_plugin.run_state import Counters
from dual_policy_plugin.share_schedule import next_num_learner
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
    """The seatings of a run, by the number of learners per env; each is made once and kept.

    Attributes:
        pool: the NPCs as the first seating has them; the others' pools have them in common. None where there are none.
    """

    def __init__(
        self, config: Config, env: VecEnv, first: Assignment, learner: nn.Module, pool: NpcPool | None
    ) -> None:
        """Args: the run, its env, the seats it begins with, the learner in the env's spaces, the NPCs."""
        self._config, self._env, self._learner, self._first = config, env, learner, first
        self.pool = pool
        self._device = next(learner.parameters()).device
        self._made: dict[int, Seating] = {}

    def __call__(self, num_learner: int) -> Seating:
        """The seating with `num_learner` learners in each env, which is to play next."""
        if num_learner not in self._made:
            self._made[num_learner] = self._make(num_learner)
        seating = self._made[num_learner]
        if self.pool is not None and seating.mixed.pool is None:
            self.pool.end_episodes()
        return seating

    def _make(self, num_learner: int) -> Seating:
        env, spec, trainer, device = self._env, self._env.spec, self._config.trainer, self._device
        assignment, layout = self._first, trainer.dual_policy.assignment
        if num_learner != assignment.num_learner:
            assert isinstance(layout, str), "a schedule goes with a named layout only"
            assignment = seat_learners(spec.num_agents, num_learner, layout)
        pool = self.pool if assignment.num_npc > 0 else None
        if pool is not None and pool.num_npc != assignment.num_npc:
            pool = pool.with_seats(assignment.num_npc)
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


def next_seating(
    config: Config, env: VecEnv, seatings: Seatings, seating: Seating, counters: Counters, sums: Tensor
) -> Seating:
    """The seats of the next iteration. Where the schedule changes the share of learners, all envs start anew.

    Args:
        config: the run.
        env: of the run.
        seatings: those that there are.
        seating: of this iteration.
        counters: of the run; they keep the number of learners, and the games since a schedule last looked at them.
        sums: the iteration's, as EpisodeMetrics has them.
    """
    dual = config.trainer.dual_policy
    if dual.pct_schedule is None:
        return seating
    counters.share_episodes += float(sums[:, 0].sum())
    counters.share_wins += float(sums[:, 1].sum())
    num_learner = next_num_learner(
        dual.pct_schedule,
        start_pct=dual.training_agents_pct,
        agent_step=counters.agent_step,
        total_timesteps=config.trainer.total_timesteps,
        num_agents=env.spec.num_agents,
        current=seating.assignment.num_learner,
        wins=counters.share_wins,
        episodes=counters.share_episodes,
    )
    if counters.share_episodes >= dual.pct_schedule.min_episodes:  # it has looked: what comes next is judged by itself
        counters.share_wins = counters.share_episodes = 0.0
    if num_learner == seating.assignment.num_learner:
        return seating
    counters.num_learner, counters.share_wins, counters.share_episodes = num_learner, 0.0, 0.0
    env.reset(later_seed(config, counters), stagger=True)
    following = seatings(num_learner)
    following.start(env)
    return following


def later_seed(config: Config, counters: Counters) -> int:
    """The seed of episodes that all envs begin together, later than at the run's beginning."""
    return int(hash32(config.seed, LATER_EPISODES, counters.iteration)) & LOW_31_BITS
