"""Gates: whether a win rate is high enough, with error rates that hold. Takes counts; gives a GateVerdict.

Two rules. `sprt` may look after every batch and stops as soon as the games decide; `wilson_gate` looks once, after a
number of episodes that was chosen before.

Draws are half a win. Mirrored episodes (both seatings of one seed) are one observation, their mean: a map may suit one
of the policies from both seatings, and two such games say less than two of different seeds. `episodes_per_seed` says
how many episodes belong together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.evaluation.intervals import wilson_interval


@dataclass(kw_only=True, slots=True, frozen=True)
class GateVerdict:
    """What a gate decided, and from which figures."""

    passed: bool | None
    """None: undecided, more episodes are needed (sprt only)."""
    win_rate: float
    """Wins plus half the draws, over episodes; 1/2 without episodes."""
    low: float
    high: float
    """Wilson interval of the win rate: of 95 % (sprt), or of the rule's own confidence (wilson)."""
    episodes: int
    statistic: float
    """Natural log of the likelihood ratio of H1 over H0 (sprt), or `low` (wilson)."""
    bounds: tuple[float, float]
    """sprt: failed at or below the first, passed at or above the second. wilson: passed above `promote_at`, twice."""
    rule: Literal["sprt", "wilson"]


Rule = Callable[[float, int], GateVerdict]
"""A rule with its settings bound: (wins, episodes) -> verdict."""


def sprt(
    wins: float, episodes: int, *, p0: float, p1: float, alpha: float, beta: float, episodes_per_seed: int = 1
) -> GateVerdict:
    """The sequential probability ratio test of H0: win rate <= p0 against H1: win rate >= p1 (Wald 1945).

    With s the score of an observation (1, 0, 1/2 for a draw, or the mean of mirrored episodes) the log likelihood ratio
    grows by s log(p1/p0) + (1-s) log((1-p1)/(1-p0)): a half win is half a win's and half a loss's step. The error rates
    hold for every such score in [0, 1], whatever the share of draws: exp is convex, so the ratio's factor
    (p1/p0)^s ((1-p1)/(1-p0))^(1-s) is at most s p1/p0 + (1-s) (1-p1)/(1-p0) (Jensen), whose mean under H0, E[s] <= p0,
    is at most 1. The ratio is thus a supermartingale under H0, and its inverse is one under H1. Such a process exceeds
    1/alpha ever with probability at most alpha (Ville 1939), whenever one looks: batches only add overshoot. Hence the
    bounds log(1/alpha) and log(beta), a little outside of Wald's log((1-beta)/alpha) and log(beta/(1-alpha)), which
    keep the error rates only about.

    Args:
        wins: number of wins plus half the number of draws, all batches together.
        episodes: number of episodes, all batches together.
        p0: the highest win rate that must not pass.
        p1: the lowest that must.
        alpha: largest probability of passing under H0.
        beta: largest probability of failing under H1.
        episodes_per_seed: how many episodes share a seed and are one observation.

    Raises:
        ConfigError: not 0 < p0 < p1 < 1, or error rates that are not in (0, 1/2).
    """
    if not 0 < p0 < p1 < 1:
        raise ConfigError(f"p0={p0}, p1={p1} cannot be tested; use 0 < p0 < p1 < 1")
    for name, rate in (("alpha", alpha), ("beta", beta)):
        if not 0 < rate < 0.5:
            raise ConfigError(f"{name}={rate} is no error rate; use a number between 0 and 0.5, for example 0.05")
    _check_counts(wins, episodes, episodes_per_seed)
    losses = episodes - wins
    ratio = (wins * math.log(p1 / p0) + losses * math.log((1 - p1) / (1 - p0))) / episodes_per_seed
    fail, succeed = math.log(beta), math.log(1 / alpha)
    low, high = wilson_interval(wins / episodes_per_seed, episodes / episodes_per_seed)
    return GateVerdict(
        passed=True if ratio >= succeed else False if ratio <= fail else None,
        win_rate=_rate(wins, episodes),
        low=low,
        high=high,
        episodes=episodes,
        statistic=ratio,
        bounds=(fail, succeed),
        rule="sprt",
    )


def wilson_gate(
    wins: float, episodes: int, *, promote_at: float, confidence: float = 0.95, episodes_per_seed: int = 1
) -> GateVerdict:
    """Passed when the win rate's lower confidence bound exceeds `promote_at`; one look, never undecided.

    Looking again after more episodes until it passes would pass too often: that is what `sprt` is for.

    Args:
        wins: number of wins plus half the number of draws.
        episodes: number of episodes.
        promote_at: the win rate that must be exceeded.
        confidence: of the two-sided Wilson interval, in (0, 1); a win rate of `promote_at` passes with probability
            (1 - confidence) / 2, about.
        episodes_per_seed: how many episodes share a seed and are one observation.

    Raises:
        ConfigError: `promote_at` or `confidence` out of range.
    """
    if not 0 <= promote_at <= 1:
        raise ConfigError(f"promote_at={promote_at} is no win rate; use a number from 0 to 1, for example 0.55")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence={confidence} is not possible; use a number between 0 and 1, for example 0.95")
    _check_counts(wins, episodes, episodes_per_seed)
    low, high = wilson_interval(wins / episodes_per_seed, episodes / episodes_per_seed, confidence)
    return GateVerdict(
        passed=low > promote_at,
        win_rate=_rate(wins, episodes),
        low=low,
        high=high,
        episodes=episodes,
        statistic=low,
        bounds=(promote_at, promote_at),
        rule="wilson",
    )


def can_pass(rule: Rule, max_episodes: int) -> bool:
    """Whether a gate can be passed at all with so many episodes: by winning every one of them.

    Args:
        rule: for example `partial(wilson_gate, promote_at=0.9, confidence=0.95)`.
        max_episodes: the most that will be played.
    """
    return rule(float(max_episodes), max_episodes).passed is True


def play_until_decided(
    rule: Rule, play: Callable[[int, int], tuple[float, int]], *, max_episodes: int, episodes_per_look: int
) -> GateVerdict:
    """The verdict on all games played until the rule decides, or until `max_episodes` are played.

    Args:
        rule: `sprt` with its settings.
        play: (number of the look from 0, episodes) -> (wins, episodes) of fresh games; may play a few more than asked.
        max_episodes: after so many the last verdict stands, undecided or not.
        episodes_per_look: how many are played between two looks.
    """
    verdict, wins, look = rule(0.0, 0), 0.0, 0
    while verdict.passed is None and verdict.episodes < max_episodes:
        more_wins, more = play(look, min(episodes_per_look, max_episodes - verdict.episodes))
        wins, look = wins + more_wins, look + 1
        verdict = rule(wins, verdict.episodes + more)
    return verdict


def _rate(wins: float, episodes: int) -> float:
    return wins / episodes if episodes else 0.5


def _check_counts(wins: float, episodes: int, episodes_per_seed: int) -> None:
    if not 0 <= wins <= episodes or episodes_per_seed < 1:
        raise ValueError(f"{wins} wins in {episodes} episodes, {episodes_per_seed} per seed, cannot be")
