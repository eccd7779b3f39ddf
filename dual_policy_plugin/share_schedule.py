"""How many agents of each env learn: a share as a number of seats, and how the share changes during a run.

Takes the config's shares and what was played; gives counts. Pure functions, called once an iteration on the host, the
same on every rank. Which seats those are, `rollout/assignment.py` says. Shares are fractions here, not floats: 0.29 of
50 agents is 14.5, whatever the float 0.29 times 50 is.
"""

from __future__ import annotations

import math
from fractions import Fraction

from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.pool_config import ShareSchedule

PCT_KEY = "trainer.dual_policy.training_agents_pct"
_SCHEDULE_KEY = "trainer.dual_policy.pct_schedule"


def count_learners(num_agents: int, share: float, key: str = PCT_KEY) -> int:
    """Share x num_agents rounded half up in decimal arithmetic: 0.29 x 50 is 15, though the floats multiply to 14.4999.

    Args:
        num_agents: seats per env.
        share: fraction of them that act with the learner, in (0, 1].
        key: where the share stands in the config, for the error line.

    Raises:
        ConfigError: no agent or (with a share below 1) every agent would learn; names the nearest share that works.
    """
    num_learner = _rounded(_exact(share) * num_agents)
    if num_learner == 0:
        least = shortest_share(1, num_agents)
        raise ConfigError(f"{key}={share} leaves no learner among {num_agents} agents; use at least {least}")
    if num_learner == num_agents and share < 1:
        if num_agents == 1:
            raise ConfigError(f"{key}={share} leaves no NPC: the env has one agent; use an env with more, or 1.0")
        most = shortest_share(num_agents - 1, num_agents)
        raise ConfigError(f"{key}={share} leaves no NPC among {num_agents} agents; use at most {most}, or 1.0 for none")
    return num_learner


def shortest_share(num_learner: int, num_agents: int) -> str:
    """The shortest decimal that gives exactly num_learner of num_agents."""
    for digits in range(1, 9):
        text = f"{num_learner / num_agents:.{digits}f}"
        if _rounded(Fraction(text) * num_agents) == num_learner:
            return text
    return repr(num_learner / num_agents)


def next_num_learner(
    schedule: ShareSchedule,
    *,
    start_pct: float,
    agent_step: int,
    total_timesteps: int,
    num_agents: int,
    current: int,
    wins: float,
    episodes: float,
) -> int:
    """Learner agents per env from now on.

    Args:
        schedule: how the share changes.
        start_pct: training_agents_pct, the share that the run began with.
        agent_step: learner steps so far.
        total_timesteps: learner steps of the whole run.
        num_agents: seats per env.
        current: learner agents per env now.
        wins, episodes: of the learner since the number last changed, a draw as half a win; adaptive alone reads them.
    """
    if schedule.type == "steps":
        shares = [start_pct, *schedule.values]
        return count_learners(num_agents, shares[sum(at <= agent_step for at in schedule.at)])
    if schedule.type == "linear":
        return _linear(schedule, start_pct, agent_step, total_timesteps, num_agents)
    return _adaptive(schedule, num_agents, current, wins, episodes)


def possible_counts(schedule: ShareSchedule, start_pct: float, num_agents: int) -> list[int]:
    """Every number of learner agents per env that a run may come to, ascending: what memory has to suffice for.

    Raises:
        ConfigError: a share of the schedule leaves no learner, or (below 1) no NPC, among num_agents.
    """
    start = count_learners(num_agents, start_pct)
    if schedule.type == "steps":
        shares = enumerate(schedule.values)
        return sorted({start, *(count_learners(num_agents, s, f"{_SCHEDULE_KEY}.values[{i}]") for i, s in shares)})
    if schedule.type == "linear":
        assert schedule.end is not None
        ends = (start, count_learners(num_agents, schedule.end, f"{_SCHEDULE_KEY}.end"))
        return list(range(min(ends), max(ends) + 1))
    least, most = _bounds(schedule, num_agents)
    assert least <= start <= most, "DualPolicyConfig lets an adaptive schedule begin within its bounds only"
    return list(range(least, most + 1))


def _linear(schedule: ShareSchedule, start_pct: float, agent_step: int, total_timesteps: int, num_agents: int) -> int:
    """Start + (end - start) * min(1, agent_step / until), as seats; all of them only where the share is 1."""
    assert schedule.end is not None
    progress = min(Fraction(1), Fraction(agent_step, schedule.until or total_timesteps))
    share = _exact(start_pct) + (_exact(schedule.end) - _exact(start_pct)) * progress
    return num_agents if share == 1 else _with_both(_rounded(share * num_agents), num_agents)


def _adaptive(schedule: ShareSchedule, num_agents: int, current: int, wins: float, episodes: float) -> int:
    """One learner fewer where they win too much, one more where too little, once enough episodes say so."""
    if episodes < schedule.min_episodes:
        return current
    low, high = schedule.band
    least, most = _bounds(schedule, num_agents)
    win_rate = wins / episodes
    return min(max(current + (win_rate < low) - (win_rate > high), least), most)


def _bounds(schedule: ShareSchedule, num_agents: int) -> tuple[int, int]:
    """The least and the greatest number of learner agents of an adaptive schedule."""
    shares = (schedule.low, schedule.high)
    least, most = (_with_both(_rounded(_exact(share) * num_agents), num_agents) for share in shares)
    return least, most


def _with_both(count: int, num_agents: int) -> int:
    """The nearest number of learner agents that leaves at least one learner and one NPC."""
    return min(max(count, 1), num_agents - 1)


def _exact(share: float) -> Fraction:
    """The decimal number that the user wrote."""
    return Fraction(repr(share))


def _rounded(value: Fraction) -> int:
    """Half up: 2.5 is 3."""
    return math.floor(value + Fraction(1, 2))
