"""Which seats act with the learner and which with the NPC: the one owner of the split (env, metrics, evaluation and
replay all read it from here).

Takes the config's share and layout and the env's number of agents; gives an Assignment.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

from dual_policy_plugin.errors import ConfigError

LAYOUTS = ("first", "last", "interleaved")
_PCT = "trainer.dual_policy.training_agents_pct"
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

    def mirrored(self) -> Assignment:
        """The same split with the seats counted from the other end."""
        seats = tuple(sorted(self.num_agents - 1 - seat for seat in self.learner_seats))
        return Assignment(num_agents=self.num_agents, learner_seats=seats)


def count_learners(num_agents: int, pct: float) -> int:
    """Pct x num_agents rounded half up in decimal arithmetic: 0.29 x 50 is 15, though the floats multiply to 14.4999.

    Raises:
        ConfigError: no agent or (with pct below 1) every agent would learn; names the nearest share that works.
    """
    num_learner = int((Decimal(repr(pct)) * num_agents).quantize(Decimal(1), rounding=ROUND_HALF_UP))
    if num_learner == 0:
        raise ConfigError(
            f"{_PCT}={pct} leaves no learner among {num_agents} agents; use at least {_share(1, num_agents)}"
        )
    if num_learner == num_agents and pct < 1:
        if num_agents == 1:
            raise ConfigError(f"{_PCT}={pct} leaves no NPC: the env has one agent; use an env with more, or 1.0")
        most = _share(num_agents - 1, num_agents)
        raise ConfigError(f"{_PCT}={pct} leaves no NPC among {num_agents} agents; use at most {most}, or 1.0 for none")
    return num_learner


def _share(num_learner: int, num_agents: int) -> str:
    """The shortest decimal that gives exactly num_learner of num_agents."""
    for digits in range(1, 9):
        text = f"{num_learner / num_agents:.{digits}f}"
        if int((Decimal(text) * num_agents).quantize(Decimal(1), rounding=ROUND_HALF_UP)) == num_learner:
            return text
    return repr(num_learner / num_agents)


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
    if layout == "first":
        seats = range(num_learner)
    elif layout == "last":
        seats = range(num_agents - num_learner, num_agents)
    elif layout == "interleaved":
        return Assignment(
            num_agents=num_agents, learner_seats=tuple(i * num_agents // num_learner for i in range(num_learner))
        )
    else:
        raise ConfigError(f"{_SEATS}={layout} is not known; use {', '.join(LAYOUTS)} or a list of seats")
    return Assignment(num_agents=num_agents, learner_seats=tuple(seats))


def _checked_seats(layout: list[int], num_agents: int, num_learner: int, pct: float) -> tuple[int, ...]:
    seats = tuple(sorted(set(layout)))
    if len(seats) != len(layout) or not seats or seats[0] < 0 or seats[-1] >= num_agents:
        raise ConfigError(f"{_SEATS}={layout} is not possible; name different seats from 0 to {num_agents - 1}")
    if len(seats) != num_learner:
        raise ConfigError(
            f"{_SEATS}={layout} names {len(seats)} learner seats, but {_PCT}={pct} of {num_agents} agents is "
            f"{num_learner}; set {_PCT}={_share(len(seats), num_agents)}"
        )
    return seats
