"""Which NPC plays next: each one's share of the episodes, from what the learner won against it.

Takes a Record per NPC, oldest first and newest last; gives probabilities for the pool, which draws from them on the
device where an episode ends. Pure functions, called once an iteration on the host, the same on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from dual_policy_plugin.pool_config import MatchmakingConfig

_DRAWS = 2**24
"""The uniform numbers of `rng.uniform` are the multiples of 1/_DRAWS in [0, 1)."""


@dataclass(slots=True)
class Record:
    """What the learner won against one NPC; old games fade."""

    wins: float = 0.0
    """A draw counts as half a win."""
    games: float = 0.0

    def add(self, wins: float, games: float, memory: float) -> None:
        """Adds new games. Beyond `memory` games both counts are scaled back to it: the win rate stays, old games fade.

        Args:
            wins, games: to be added; 0 <= wins <= games.
            memory: about how many of the newest games the win rate remembers.
        """
        assert 0 <= wins <= games, f"{wins} wins in {games} games"
        self.wins += wins
        self.games += games
        if self.games > memory:
            self.wins, self.games = memory * (self.wins / self.games), float(memory)


def probabilities(records: Sequence[Record], weights: Sequence[float], config: MatchmakingConfig) -> list[float]:
    """Each NPC's share of the episodes to come.

    All are multiples of 2^-24, as the uniform numbers are that they are compared with, and sum to exactly 1: every
    partial sum is exact in float32, an NPC gets just its share of the draws, and one with the share 0 never plays.

    Args:
        records: the learner's games against each NPC, oldest first, newest last; at least one.
        weights: of each NPC; type `weights` alone reads them, and needs one above 0.
        config: the type and its settings.
    """
    assert records, "no NPC to choose"
    if config.type == "weights":
        shares = list(weights)
    elif config.type == "latest_biased":
        shares = _latest_biased(len(records), config.latest_share)
    elif config.type == "pfsp":
        win_rates = _win_rates(records, config.min_games, unknown=0.5)
        shares = _explored(_pfsp(win_rates, config.form), config.explore)
    elif config.type == "adaptive":
        low, high = config.band
        win_rates = _win_rates(records, config.min_games, unknown=(low + high) / 2)
        shares = _explored(_adaptive(win_rates, low, high), config.explore)
    else:
        shares = [1.0] * len(records)
    return _in_draws(shares)


def _latest_biased(count: int, latest_share: float) -> list[float]:
    """The newest NPC gets latest_share, the others equal parts of the rest."""
    if count == 1:
        return [1.0]
    return [(1 - latest_share) / (count - 1)] * (count - 1) + [latest_share]


def _pfsp(win_rates: list[float], form: str) -> list[float]:
    """Prioritized fictitious self-play (Vinyals et al. 2019, AlphaStar, Methods): in proportion to f(win rate).

    f(w) = (1 - w)^2 prefers who is hard to beat, f(w) = w (1 - w) who is of equal strength. Where f is 0 for all, all
    get the same.
    """
    priorities = [(1 - w) ** 2 if form == "squared" else w * (1 - w) for w in win_rates]
    total = math.fsum(priorities)
    return [f / total for f in priorities] if total > 0 else _even(len(win_rates))


def _adaptive(win_rates: list[float], low: float, high: float) -> list[float]:
    """The shares nearest to even ones with which the learner is expected to win from `low` to `high` of the episodes.

    Nearest in relative entropy, which makes them p_k ~ exp(-theta * w_k) (Csiszar 1975, I-projection on a half-space):
    theta is 0 where even shares do, else what leads to the nearer edge of the band.
    """
    mean = math.fsum(win_rates) / len(win_rates)
    if mean > high:
        return _with_mean(win_rates, high)
    if mean < low:
        return _with_mean([-w for w in win_rates], -low)
    return _even(len(win_rates))


def _with_mean(values: list[float], target: float) -> list[float]:
    """Shares p_k ~ exp(-theta * values_k), theta > 0, whose mean of values is `target`, which is below the plain mean.

    Where no value is below the target, all goes to the smallest, in equal parts where there are several.
    """
    least = min(values)
    if least >= target:
        smallest = [float(value == least) for value in values]
        return [share / sum(smallest) for share in smallest]
    excess = [value - least for value in values]  # from 0 up, so that no exponential overflows

    def shares_at(theta: float) -> list[float]:
        terms = [math.exp(-theta * x) for x in excess]
        total = math.fsum(terms)
        return [term / total for term in terms]

    def is_above(theta: float) -> bool:
        return math.fsum(p * x for p, x in zip(shares_at(theta), excess, strict=True)) > target - least

    above, below = 0.0, 1.0  # the mean falls with theta
    while below < 2.0**60 and is_above(below):  # beyond, the values differ by less than their rounding
        above, below = below, 2 * below
    for _ in range(50):
        middle = (above + below) / 2
        above, below = (middle, below) if is_above(middle) else (above, middle)
    return shares_at(below)


def _win_rates(records: Sequence[Record], min_games: int, *, unknown: float) -> list[float]:
    """The learner's win rate against each NPC; `unknown` where there were fewer than min_games."""
    return [record.wins / record.games if record.games >= min_games else unknown for record in records]


def _explored(shares: list[float], explore: float) -> list[float]:
    """A part `explore` of the episodes goes to all alike, the rest as `shares` say."""
    return [(1 - explore) * share + explore / len(shares) for share in shares]


def _even(count: int) -> list[float]:
    return [1 / count] * count


def _in_draws(shares: list[float]) -> list[float]:
    """Shares in proportion to those given, as multiples of 1/_DRAWS that sum to exactly 1; none is off by a draw.

    The cumulated shares are rounded, and what is given is their differences: a share of 0 stays 0.
    """
    largest = max(shares)
    assert largest > 0, f"no NPC has a share: {shares}"
    cumulated = list(accumulate((share / largest for share in shares), initial=0.0))
    return [(b - a) / _DRAWS for a, b in pairwise(round(_DRAWS * c / cumulated[-1]) for c in cumulated)]
