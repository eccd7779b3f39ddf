"""Ratings from a cross-play table: Bradley-Terry strengths with intervals, cycles, and each policy's worst case.

Takes matrices of wins and games; gives numbers on Elo's scale. NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from dual_policy_plugin.errors import ConfigError

Floats = NDArray[np.float64]

ELO = 400 / math.log(10)
"""Rating points per unit of log strength: 400 points are odds of 10 to 1."""
PRIOR_SD = 5.0
"""Standard deviation of log strengths around their mean that the prior expects (869 points): lets the rating of a
policy that won or lost everything be finite, and is forgotten after a few games that went either way."""
_MAX_STEPS = 100
_CLOSE = 1e-6  # of log strength, 0.0002 points


@dataclass(kw_only=True, slots=True, frozen=True)
class Ratings:
    """Strengths on Elo's scale, one entry per policy: P(i beats j) = 1 / (1 + 10 ** ((r_j - r_i) / 400))."""

    names: tuple[str, ...]
    rating: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    """Interval of the rating relative to the anchors; an anchor's own has no width."""
    anchored: tuple[bool, ...]
    """Which of them are anchors. None: the ratings' mean is 0, and intervals are relative to that mean."""


def fit_ratings(
    wins: Floats,
    games: Floats,
    names: Sequence[str],
    *,
    anchors: Mapping[str, float] = MappingProxyType({}),
    confidence: float = 0.95,
) -> Ratings:
    """Bradley-Terry ratings (Bradley & Terry 1952) by penalised maximum likelihood, with intervals.

    With theta the log strengths and p_ij = 1 / (1 + exp(theta_j - theta_i)) it maximises

        sum over i, j of wins_ij log p_ij  -  sum over i of (theta_i - mean theta)^2 / (2 PRIOR_SD^2)

    by Newton's method; the intervals are from the inverse of the same sum's negative Hessian (the Fisher information
    and the prior's). A draw has less variance than a coin: with draws the intervals are a little too wide, never too
    narrow. Roles that are unequal: the players are `name@role`, and `games` is zero within a role; a role's advantage
    is then in the ratings, and an anchor in one role (`{"random@first": 0.0}`) holds all of them.

    Args:
        wins: (P, P) wins of row over column plus half the draws; wins + wins.T == games.
        games: (P, P) symmetric, 0 where two did not play. Games that share a seed are fewer independent ones: both
            matrices may be divided. The diagonals are ignored.
        names: of the P policies, all different.
        anchors: name -> rating that is given, not fitted; names that are not among `names` are left out.
        confidence: coverage of an interval, in (0, 1).

    Raises:
        ConfigError: games do not connect a policy with an anchor (without anchors: with the first policy), so that no
            game says how strong it is relative to it.
        ValueError: matrices that are no record of games.
    """
    wins, games = _without_diagonal(wins), _without_diagonal(games)
    _check_record(wins, games, names)
    anchored = np.array([name in anchors for name in names], dtype=bool)
    _check_connected(games, anchored, names)
    given = np.array([anchors.get(name, 0.0) for name in names])
    theta = _maximise(wins, games, given / ELO, anchored)
    rating = np.where(anchored, given, theta * ELO)
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * np.sqrt(_variances(games, theta, anchored)) * ELO
    return Ratings(
        names=tuple(names),
        rating=tuple(rating.tolist()),
        low=tuple((rating - half).tolist()),
        high=tuple((rating + half).tolist()),
        anchored=tuple(anchored.tolist()),
    )


def intransitive_share(win_rate: Floats, *, low: Floats | None = None) -> float:
    """The share of cycles (i beats j beats k beats i) among all triples without ties; 0 where there is no such triple.

    To beat is to win more than half. Three policies of equal strength make a cycle of noise one time in four: with
    `low`, only those cycles count whose three wins are each sure.

    Args:
        win_rate: (P, P) row against column; NaN where two did not play, which no triple may contain.
        low: (P, P) lower confidence bounds of `win_rate`; to beat, for a cycle, is then to have a bound above 1/2.
    """
    beats = win_rate > 0.5
    is_decided = (beats | beats.T).astype(np.float64)
    beats_surely = (beats if low is None else beats & (low > 0.5)).astype(np.float64)
    for matrix in (is_decided, beats_surely):
        np.fill_diagonal(matrix, 0.0)
    # Each closed walk of three steps is a triangle: found from 3 starts where it has a direction, else 6 times.
    num_cycles = _num_closed_walks(beats_surely) / 3
    num_triples = _num_closed_walks(is_decided) / 6
    return num_cycles / num_triples if num_triples else 0.0


def worst_case(win_rate: Floats) -> list[float]:
    """Each policy's lowest win rate against any other; NaN where it played none.

    Args:
        win_rate: (P, P) row against column, NaN where two did not play; the diagonal is ignored.
    """
    others = np.where(np.isnan(win_rate), np.inf, win_rate)
    np.fill_diagonal(others, np.inf)
    lowest = others.min(axis=1, initial=np.inf)
    return [math.nan if math.isinf(rate) else rate for rate in lowest.tolist()]


def _maximise(wins: Floats, games: Floats, start: Floats, anchored: NDArray[np.bool_]) -> Floats:
    """(P,) the log strengths of the highest penalised likelihood; anchors stay at `start`, else the mean is 0."""
    theta, value = start, _objective(wins, start)
    for _ in range(_MAX_STEPS):
        p = _expected(theta)
        gradient = (wins * p.T - wins.T * p).sum(axis=1) - (theta - theta.mean()) / PRIOR_SD**2
        step: Floats = _inverse(_information(games, theta), anchored) @ gradient
        rounding = 1e-12 * abs(value)
        while (new_value := _objective(wins, theta + step)) < value - rounding:
            step = step / 2  # Newton's step may leave the region where its parabola holds
        theta, value = theta + step, new_value
        if np.abs(step).max(initial=0.0) <= _CLOSE:
            return theta
    raise AssertionError(f"ratings did not converge in {_MAX_STEPS} steps")


def _objective(wins: Floats, theta: Floats) -> float:
    return float((wins * _log_expected(theta)).sum() - ((theta - theta.mean()) ** 2).sum() / (2 * PRIOR_SD**2))


def _expected(theta: Floats) -> Floats:
    """(P, P) probability that row beats column."""
    return np.exp(_log_expected(theta))


def _log_expected(theta: Floats) -> Floats:
    differences: Floats = theta[None, :] - theta[:, None]
    return -np.logaddexp(0.0, differences)


def _information(games: Floats, theta: Floats) -> Floats:
    """(P, P) negative Hessian of the penalised log likelihood; its rows sum to 0."""
    p = _expected(theta)
    weights = games * p * p.T
    size = len(theta)
    return np.diag(weights.sum(axis=1)) - weights + (np.eye(size) - 1 / size) / PRIOR_SD**2


def _inverse(information: Floats, anchored: NDArray[np.bool_]) -> Floats:
    """(P, P) covariance of log strengths: 0 for anchors; without any, of deviations from the mean."""
    size = len(information)
    if not anchored.any():
        # The information says nothing of the common level (all ones): give it some, then take it out again.
        center = np.eye(size) - 1 / size
        return center @ np.linalg.inv(information + 1 / size) @ center
    covariance = np.zeros((size, size))
    free = np.ix_(~anchored, ~anchored)
    covariance[free] = np.linalg.inv(information[free])
    return covariance


def _variances(games: Floats, theta: Floats, anchored: NDArray[np.bool_]) -> Floats:
    covariance = _inverse(_information(games, theta), anchored)
    return np.diag(covariance).clip(min=0.0)


def _num_closed_walks(edges: Floats) -> float:
    return float(np.trace(edges @ edges @ edges))


def _without_diagonal(matrix: Floats) -> Floats:
    copy = np.array(matrix, dtype=np.float64)
    if copy.ndim != 2 or copy.shape[0] != copy.shape[1]:
        raise ValueError(f"a table of games is (P, P), not {copy.shape}")
    np.fill_diagonal(copy, 0.0)
    return copy


def _check_record(wins: Floats, games: Floats, names: Sequence[str]) -> None:
    if not len(wins) == len(games) == len(names) == len(set(names)) > 0:
        raise ValueError(f"{len(wins)} rows of wins, {len(games)} of games, {len(set(names))} different names")
    if not ((wins >= 0).all() and np.isfinite(games).all() and np.allclose(wins + wins.T, games, rtol=1e-9, atol=1e-6)):
        raise ValueError("wins must be 0 or more, and wins of both sides must add up to games")


def _check_connected(games: Floats, anchored: NDArray[np.bool_], names: Sequence[str]) -> None:
    is_reached = anchored.copy()
    if not anchored.any():
        is_reached[0] = True
    for _ in names:
        is_reached = is_reached | (games[is_reached] > 0).any(axis=0)
    if not is_reached.all():
        lost = [name for name, reached in zip(names, is_reached, strict=True) if not reached]
        known = [name for name, reached in zip(names, is_reached, strict=True) if reached]
        raise ConfigError(
            f"no games connect {', '.join(lost)} with {', '.join(known)}, so they cannot be rated together; "
            "let one of each play the other"
        )
