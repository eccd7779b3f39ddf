"""Cross-play: from the records of all pairs to a table of win rates, ratings, worst cases and cycles.

Takes the records of `matches.play_pairings`; gives a CrossPlay. Where the two sides of the env are not equal (roles),
nothing is averaged over them: the table's rows play the first role and its columns the second, and a policy has a
rating in each role.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.evaluation.intervals import wilson_interval
from dual_policy_plugin.evaluation.matches import PairingRecord, can_swap
from dual_policy_plugin.evaluation.ratings import Ratings, fit_ratings, intransitive_share, worst_case
from dual_policy_plugin.npc.resolver import PinnedPolicy
from dual_policy_plugin.rollout.assignment import Assignment, assign
from dual_policy_plugin.types import EnvSpec

Matrix = NDArray[np.float64]
ANCHORS: Mapping[str, float] = MappingProxyType({"builtin://arena/random": 0.0})
"""The policies whose ratings are given, where they play, by URI."""


@dataclass(kw_only=True, slots=True, frozen=True, eq=False)
class CrossPlay:
    """What P policies did against each other."""

    env: str
    policies: tuple[PinnedPolicy, ...]
    """Each with a name of its own."""
    roles: tuple[str, ...]
    """Of the rows and of the columns, where the sides are not equal; else empty."""
    episodes: int
    """Per cell; a cell and the one across the diagonal are the same games, unless there are roles."""
    win_rate: Matrix
    """(P, P) row beats column, draws as half. The diagonal is each policy against itself."""
    low: Matrix
    high: Matrix
    """(P, P) 95 % intervals of the win rates: Wilson's, of the effective number of games (see matches.py)."""
    draws: Matrix
    """(P, P) number of draws."""
    ratings: Ratings
    """Of the policies in their order; with roles of `name@first role` for all, then `name@second role` for all."""
    worst_case: tuple[float, ...]
    """The lowest win rate of each rated player against any other policy."""
    intransitive_share: float
    """Share of cycles (a beats b beats c beats a) among all triples without ties."""
    sure_intransitive_share: float
    """The same, of cycles whose three win rates all have intervals above 1/2."""

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        rated = self.ratings
        ratings = [
            {"name": name, "rating": rating, "low": low, "high": high, "anchored": anchored, "worst_case": worst}
            for name, rating, low, high, anchored, worst in zip(
                rated.names, rated.rating, rated.low, rated.high, rated.anchored, self.worst_case, strict=True
            )
        ]
        return {
            "env": self.env,
            "policies": [{"name": one.name, "uri": one.uri, "sha256": one.sha256} for one in self.policies],
            "roles": list(self.roles),
            "episodes": self.episodes,
            "win_rate": self.win_rate.tolist(),
            "interval": np.stack([self.low, self.high], axis=2).tolist(),
            "draws": self.draws.astype(int).tolist(),
            "ratings": ratings,
            "intransitive_share": self.intransitive_share,
            "sure_intransitive_share": self.sure_intransitive_share,
        }


def split_sides(spec: EnvSpec, layout: str | list[int]) -> tuple[Assignment, tuple[str, ...]]:
    """The seats of both sides, and the sides' roles; no roles where the sides are equal.

    Seats of the first role against all others, where seats have roles; else half against half.

    Args:
        spec: the env.
        layout: trainer.dual_policy.assignment, for seats without roles.

    Raises:
        ConfigError: an env of one agent, or a layout that does not fit.
    """
    if spec.num_agents == 1:
        raise ConfigError(f"env.name={spec.name} has one agent, so two policies cannot meet; use an env with more")
    if not spec.roles:
        split = assign(spec.num_agents, 0.5, layout)
        sides = (f"{split.num_learner}of{spec.num_agents}", f"{split.num_npc}of{spec.num_agents}")
        return split, () if can_swap(split, spec) else sides
    first, *others = dict.fromkeys(spec.roles)
    seats = tuple(seat for seat, role in enumerate(spec.roles) if role == first)
    return Assignment(num_agents=spec.num_agents, learner_seats=seats), (first, "+".join(others))


def summarise(
    records: Sequence[PairingRecord], policies: Sequence[PinnedPolicy], *, env: str, roles: tuple[str, ...]
) -> CrossPlay:
    """The cross-play of some records.

    Args:
        records: of every pair i <= j; with roles of every ordered pair.
        policies: that the records number.
        env: its name.
        roles: as CrossPlay has them.
    """
    size, episodes = len(policies), records[0].episodes
    won, games, draws = np.zeros((size, size)), np.zeros((size, size)), np.zeros((size, size))
    for one in records:
        won[one.first, one.second], draws[one.first, one.second] = one.wins, one.draws
        games[one.first, one.second] = one.effective_episodes
        if not roles and one.first != one.second:
            won[one.second, one.first], draws[one.second, one.first] = episodes - one.wins, one.draws
            games[one.second, one.first] = one.effective_episodes
    win_rate = won / episodes  # of what was counted, so that a tie is 1/2 exactly
    # as so many independent games: intervals and ratings are as sure as these, not as the number of episodes
    wins = win_rate * games
    low, high = _intervals(wins, games)
    # of either role, where there are roles: which policy is the stronger one on the whole
    both = (won + episodes - won.T) / (2 * episodes) if roles else win_rate
    both_games = games + games.T if roles else games
    player_wins, player_games, players, anchors = _players(wins, games, policies, roles)
    rates = np.divide(player_wins, player_games, out=np.full_like(player_wins, math.nan), where=player_games > 0)
    return CrossPlay(
        env=env,
        policies=tuple(policies),
        roles=roles,
        episodes=episodes,
        win_rate=win_rate,
        low=low,
        high=high,
        draws=draws,
        ratings=fit_ratings(player_wins, player_games, players, anchors=anchors),
        worst_case=tuple(worst_case(rates)),
        intransitive_share=intransitive_share(both),
        sure_intransitive_share=intransitive_share(both, low=_intervals(both * both_games, both_games)[0]),
    )


def _players(
    wins: Matrix, games: Matrix, policies: Sequence[PinnedPolicy], roles: tuple[str, ...]
) -> tuple[Matrix, Matrix, list[str], dict[str, float]]:
    """Wins and games of those that are rated, their names, and whose ratings are given.

    With roles every policy is two players, who meet those of the other role only. One role of an anchor is given: what
    a role is worth is for the games to say.
    """
    names = [one.name for one in policies]
    # by what it is and not by its name, which a file may have too
    anchors = {one.name: ANCHORS[one.uri] for one in policies if one.uri in ANCHORS}
    if not roles:
        return wins, games, names, anchors
    size = len(names)
    player_wins, player_games = np.zeros((2 * size, 2 * size)), np.zeros((2 * size, 2 * size))
    player_wins[:size, size:], player_wins[size:, :size] = wins, (games - wins).T
    player_games[:size, size:], player_games[size:, :size] = games, games.T
    players = [f"{name}@{role}" for role in roles for name in names]
    return player_wins, player_games, players, {f"{name}@{roles[0]}": rating for name, rating in anchors.items()}


def _intervals(wins: Matrix, games: Matrix) -> tuple[Matrix, Matrix]:
    """(P, P) lower and upper bounds of win rates."""
    pairs = zip(wins.flat, games.flat, strict=True)
    bounds = np.array([wilson_interval(float(won), float(played)) for won, played in pairs]).reshape(*wins.shape, 2)
    return bounds[:, :, 0], bounds[:, :, 1]
