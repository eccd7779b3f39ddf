"""Which seats act with the learner and which with the NPC: the one owner of the split (env, metrics, evaluation and
replay all read it from here).

Takes the config's share and layout and the env's number of agents; gives an Assignment.
"""

from __future__ import annotations

from dataclasses import dataclass

from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.share_schedule import PCT_KEY, count_learners, shortest_share

LAYOUTS = ("first", "last", "interleaved")
_SEATS = "trainer.dual_policy.assignment"


@dataclass(kw_only=True, slots=True, frozen=True)
class Assignment:
    """The seats of an env, split in two; the same in every env."""

    num_agents: int
    learner_seats: tuple[int, ...]
    """Ascending; at least one."""

    @property
    def npc_seats(self) -> tuple[int, ...]:
        """The seats that are not the learner's, ascending; empty where all agents learn."""
        return tuple(seat for seat in range(self.num_agents) if seat not in self.learner_seats)

    @property
    def num_learner(self) -> int:
        """Learner agents per env."""
        return len(self.learner_seats)

    @property
    def num_npc(self) -> int:
        """NPC agents per env."""
        return self.num_agents - len(self.learner_seats)


def assign(num_agents: int, pct: float, layout: str | list[int] = "first") -> Assignment:
    """Splits the seats of an env between learner and NPC.

    Args:
        num_agents: seats per env.
        pct: fraction of them that act with the learner, in (0, 1].
        layout: first, last, interleaved (spread evenly), or the list of the learner's seats.

    Raises:
        ConfigError: a share that leaves no learner or no NPC, an unknown layout, or a list that does not fit.
    """
    num_learner = count_learners(num_agents, pct)
    if isinstance(layout, list):
        return Assignment(num_agents=num_agents, learner_seats=_checked_seats(layout, num_agents, num_learner, pct))
    return seat_learners(num_agents, num_learner, layout)


def seat_learners(num_agents: int, num_learner: int, layout: str) -> Assignment:
    """Gives `num_learner` of the seats to the learner, as a named layout says.

    Raises:
        ConfigError: an unknown layout.
    """
    seats = {
        "first": range(num_learner),
        "last": range(num_agents - num_learner, num_agents),
        "interleaved": [i * num_agents // num_learner for i in range(num_learner)],
    }
    if layout not in seats:
        raise ConfigError(f"{_SEATS}={layout} is not known; use {', '.join(LAYOUTS)} or a list of seats")
    return Assignment(num_agents=num_agents, learner_seats=tuple(seats[layout]))


def _checked_seats(layout: list[int], num_agents: int, num_learner: int, pct: float) -> tuple[int, ...]:
    seats = tuple(sorted(set(layout)))
    if len(seats) != len(layout) or not seats or seats[0] < 0 or seats[-1] >= num_agents:
        raise ConfigError(f"{_SEATS}={layout} is not possible; name different seats from 0 to {num_agents - 1}")
    if len(seats) != num_learner:
        raise ConfigError(
            f"{_SEATS}={layout} names {len(seats)} learner seats, but {PCT_KEY}={pct} of {num_agents} agents is "
            f"{num_learner}; set {PCT_KEY}={shortest_share(len(seats), num_agents)}"
        )
    return seats
