"""Ratings: worked by hand, planted strengths inside the intervals as often as these say; cycles; the worst case."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.evaluation.ratings import ELO, PRIOR_SD, Ratings, fit_ratings, intransitive_share, worst_case

Floats = NDArray[np.float64]

REPETITIONS = 200
STRENGTHS = (0.0, -0.5, 0.4, 1.0, 2.2, 3.5)  # log strengths; the outer two meet as 1 to 55
NAMES = ("random", "a", "b", "c", "d", "e")
AT_0 = {"random": 0.0}


def table(*rows: list[float]) -> Floats:
    return np.array(rows, dtype=np.float64)


def play(strengths: tuple[float, ...], games_a_pair: int, draws: float, rng: np.random.Generator) -> Floats:
    """(P, P) wins plus half the draws of a Bradley-Terry world; `draws` 1 is as many as a win rate allows."""
    size = len(strengths)
    wins = np.zeros((size, size))
    for i in range(size):
        for j in range(i + 1, size):
            p = 1 / (1 + math.exp(strengths[j] - strengths[i]))
            drawn = 2 * draws * min(p, 1 - p)
            won, half, lost = rng.multinomial(games_a_pair, [p - drawn / 2, drawn, 1 - p - drawn / 2])
            wins[i, j], wins[j, i] = won + half / 2, lost + half / 2
    return wins


def hits(games_a_pair: int, draws: float, anchors: dict[str, float]) -> tuple[Floats, Floats]:
    """(P,) how often the planted strength was inside the interval, and the mean error in points."""
    rng = np.random.default_rng(1)
    planted = np.array(STRENGTHS) * ELO
    if not anchors:
        planted -= planted.mean()
    inside, error = np.zeros(len(NAMES)), np.zeros(len(NAMES))
    for _ in range(REPETITIONS):
        wins = play(STRENGTHS, games_a_pair, draws, rng)
        ratings = fit_ratings(wins, wins + wins.T, NAMES, anchors=anchors)
        inside += (np.array(ratings.low) <= planted) & (planted <= np.array(ratings.high))
        error += (np.array(ratings.rating) - planted) / REPETITIONS
    return inside, error


def binomial_range(n: int, p: float, tail: float) -> tuple[int, int]:
    """The counts that a Binomial(n, p) leaves with at most probability `tail` on each side."""
    cumulative = np.cumsum([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])
    return int(np.searchsorted(cumulative, tail)), int(np.searchsorted(cumulative, 1 - tail))


@pytest.mark.parametrize("games_a_pair", [20, 500])
@pytest.mark.parametrize("anchors", [{"random": 0.0}, {}], ids=["anchored", "mean"])
def test_planted_strengths_are_inside_the_intervals_at_the_nominal_rate(
    games_a_pair: int, anchors: dict[str, float]
) -> None:
    inside, error = hits(games_a_pair, 0.0, anchors)
    counted = np.array([name not in anchors for name in NAMES])
    least, most = binomial_range(REPETITIONS, 0.95, 1e-3)
    assert (least, most) == (179, 198)
    assert inside[counted].min() >= least
    assert inside[counted].max() <= most
    # of all policies together; those of one repetition are not independent: at worst they count as one
    least, most = binomial_range(REPETITIONS, 0.95, 0.01)
    assert least <= inside[counted].mean() <= most
    if games_a_pair == 500:
        assert np.abs(error).max() < 4


@pytest.mark.parametrize("games_a_pair", [20, 500])
def test_with_draws_the_intervals_are_too_wide_and_never_too_narrow(games_a_pair: int) -> None:
    inside, error = hits(games_a_pair, 0.5, {"random": 0.0})
    assert inside[1:].min() >= binomial_range(REPETITIONS, 0.95, 1e-3)[0]
    assert np.abs(error).max() < 25  # a draw is half a win: no strength is pushed to either side


def test_two_policies_by_hand() -> None:
    # 3 to 1: odds of 3 less the prior's pull; 4 - 4 / (1 + e^-d) - 1 = d / (2 PRIOR_SD^2) has the root below
    ratings = fit_ratings(table([0, 30], [10, 0]), table([0, 40], [40, 0]), ["a", "random"], anchors=AT_0)
    assert ratings.anchored == (False, True)
    assert (ratings.rating[1], ratings.low[1], ratings.high[1]) == (0.0, 0.0, 0.0)
    d = ratings.rating[0] / ELO
    assert 30 - 40 / (1 + math.exp(-d)) == pytest.approx(d / (2 * PRIOR_SD**2), abs=1e-6)
    assert d == pytest.approx(math.log(3), abs=0.004)
    information = 40 / (1 + math.exp(-d)) / (1 + math.exp(d)) + 1 / (2 * PRIOR_SD**2)
    assert ratings.high[0] - ratings.rating[0] == pytest.approx(1.959964 / math.sqrt(information) * ELO, rel=1e-6)
    assert ratings.rating[0] - ratings.low[0] == pytest.approx(ratings.high[0] - ratings.rating[0])
    # Elo's scale: 10 to 1 in many games is 400 points
    many = fit_ratings(table([0, 1e6], [1e5, 0]), table([0, 1.1e6], [1.1e6, 0]), ["a", "random"], anchors=AT_0)
    assert many.rating[0] == pytest.approx(400, abs=0.01)
    # without an anchor each is half of the difference from the mean, and half as unsure
    free = fit_ratings(table([0, 30], [10, 0]), table([0, 40], [40, 0]), ["a", "b"])
    assert free.anchored == (False, False)
    assert free.rating == pytest.approx((ratings.rating[0] / 2, -ratings.rating[0] / 2))
    assert free.high[0] - free.low[0] == pytest.approx((ratings.high[0] - ratings.low[0]) / 2)


def test_draws_are_half_a_win() -> None:
    all_drawn = fit_ratings(table([0, 20], [20, 0]), table([0, 40], [40, 0]), ["a", "random"], anchors=AT_0)
    assert all_drawn.rating[0] == pytest.approx(0.0, abs=1e-9)


def test_who_won_or_lost_all_has_a_finite_rating_and_more_games_say_more() -> None:
    def rated(games: float) -> Ratings:
        wins = table([0, games, games], [0, 0, games], [0, 0, 0])
        return fit_ratings(wins, wins + wins.T, ["best", "middle", "worst"], anchors={"middle": 100.0})

    few, many = rated(20), rated(2000)
    assert few.rating[1] == few.low[1] == few.high[1] == 100.0
    assert 500 < few.rating[0] - 100 < many.rating[0] - 100 < 2500
    assert few.rating[0] - 100 == pytest.approx(100 - few.rating[2])
    assert few.high[0] - few.low[0] > 800
    assert few.low[0] > 100


def test_several_anchors_hold_and_narrow_what_lies_between() -> None:
    strengths = (0.0, 2.0, 4.0)
    wins = play(strengths, 200, 0.0, np.random.default_rng(0))
    names = ["random", "a", "strong"]
    one = fit_ratings(wins, wins + wins.T, names, anchors=AT_0)
    two = fit_ratings(wins, wins + wins.T, names, anchors={"random": 0.0, "strong": 4 * ELO, "absent": 7.0})
    assert two.anchored == (True, False, True)
    assert two.rating[2] == two.low[2] == two.high[2] == pytest.approx(4 * ELO)
    assert two.high[1] - two.low[1] < 0.9 * (one.high[1] - one.low[1])
    assert two.low[1] < 2 * ELO < two.high[1]


def test_a_wide_confidence_is_a_wide_interval() -> None:
    wins, games = table([0, 30], [10, 0]), table([0, 40], [40, 0])
    half, nearly_all = (
        fit_ratings(wins, games, ["a", "random"], anchors=AT_0, confidence=confidence) for confidence in (0.5, 0.99)
    )
    ratio = (nearly_all.high[0] - nearly_all.low[0]) / (half.high[0] - half.low[0])
    assert ratio == pytest.approx(2.575829 / 0.674490, rel=1e-5)


def test_roles_that_are_unequal_are_players_of_their_own() -> None:
    """Two sides of three policies; the first role wins 1 log unit more: found in the ratings, with one anchor."""
    strengths, advantage = (0.0, 0.8, 1.6), 1.0
    names = [f"{name}@{role}" for role in ("first", "second") for name in ("random", "a", "b")]
    wins = np.zeros((6, 6))
    for i in range(3):
        for j in range(3):
            p = 1 / (1 + math.exp(strengths[j] - strengths[i] - advantage))
            wins[i, 3 + j], wins[3 + j, i] = 1e4 * p, 1e4 * (1 - p)
    ratings = fit_ratings(wins, wins + wins.T, names, anchors={"random@second": 0.0})
    expected = [(strength + advantage) * ELO for strength in strengths] + [strength * ELO for strength in strengths]
    assert ratings.rating == pytest.approx(expected, abs=0.2)
    assert ratings.anchored == (False, False, False, True, False, False)
    assert all(high - low > 5 for low, high in zip(ratings.low[:3], ratings.high[:3], strict=True))


def test_policies_that_no_game_connects_are_an_error() -> None:
    games = table([0, 10, 0, 0], [10, 0, 0, 0], [0, 0, 0, 10], [0, 0, 10, 0])
    with pytest.raises(ConfigError, match="no games connect c, d with random, b, so"):
        fit_ratings(games / 2, games, ["random", "b", "c", "d"], anchors=AT_0)
    with pytest.raises(ConfigError, match="no games connect c, d with a, b, so"):
        fit_ratings(games / 2, games, ["a", "b", "c", "d"])
    # an anchor on both sides connects both with the scale; a chain of games connects too
    assert fit_ratings(games / 2, games, ["a", "b", "c", "d"], anchors={"a": 0.0, "d": 50.0}).rating == pytest.approx(
        (0.0, 0.0, 50.0, 50.0), abs=25
    )
    chain = table([0, 10, 0], [10, 0, 10], [0, 10, 0])
    assert fit_ratings(chain / 2, chain, ["a", "b", "c"]).rating == pytest.approx((0.0, 0.0, 0.0), abs=1e-6)


def test_matrices_that_are_no_record_of_games_are_refused() -> None:
    games = table([0, 10], [10, 0])
    with pytest.raises(ValueError, match="must add up to games"):
        fit_ratings(table([0, 6], [5, 0]), games, ["a", "b"])
    with pytest.raises(ValueError, match="must add up to games"):
        fit_ratings(table([0, 11], [-1, 0]), games, ["a", "b"])
    with pytest.raises(ValueError, match="2 rows of wins, 2 of games, 1 different names"):
        fit_ratings(games / 2, games, ["a", "a"])
    with pytest.raises(ValueError, match=r"\(P, P\), not \(1, 2\)"):
        fit_ratings(games[:1], games, ["a", "b"])


def test_the_diagonal_says_nothing_and_the_matrices_stay_as_they_are() -> None:
    wins, games = table([7, 30], [10, 9]), table([14, 40], [40, 18])
    before = wins.copy(), games.copy()
    with_diagonal = fit_ratings(wins, games, ["a", "random"], anchors=AT_0)
    assert with_diagonal == fit_ratings(table([0, 30], [10, 0]), table([0, 40], [40, 0]), ["a", "random"], anchors=AT_0)
    assert (wins == before[0]).all()
    assert (games == before[1]).all()


@pytest.mark.parametrize("seed", range(5))
def test_the_likelihood_is_at_its_top_whatever_the_games(seed: int) -> None:
    """Also where a full Newton step would overshoot: extreme results, far anchors, a million games beside one."""
    rng = np.random.default_rng(seed)
    for anchors in ({}, {"0": 0.0}, {"0": 0.0, "1": 3000.0}):
        size = int(rng.integers(2, 10))
        games = np.triu(10.0 ** rng.integers(0, 7, (size, size)), 1)
        wins = games * rng.choice([0.0, 0.5, 0.9, 1.0], (size, size))
        wins += np.tril(games.T - wins.T, -1)
        ratings = fit_ratings(wins, games + games.T, [str(i) for i in range(size)], anchors=anchors)
        theta = np.array(ratings.rating) / ELO

        def value(at: Floats, wins: Floats = wins) -> float:
            log_p = -np.logaddexp(0, at[None, :] - at[:, None])
            return float((wins * log_p).sum() - ((at - at.mean()) ** 2).sum() / (2 * PRIOR_SD**2))

        for i in np.flatnonzero(~np.array(ratings.anchored)):
            for change in (-0.05, 0.05):
                moved = theta.copy()
                moved[i] += change
                assert value(moved) < value(theta)


def test_cycles_are_counted_among_triples_without_ties() -> None:
    cycle = table([0.5, 0.6, 0.4], [0.4, 0.5, 0.6], [0.6, 0.4, 0.5])
    order = table([0.5, 0.6, 0.6], [0.4, 0.5, 0.6], [0.4, 0.4, 0.5])
    tied = table([0.5, 0.6, 0.4], [0.4, 0.5, 0.5], [0.6, 0.5, 0.5])
    assert intransitive_share(cycle) == 1.0
    assert intransitive_share(cycle.T) == 1.0
    assert intransitive_share(order) == 0.0
    assert intransitive_share(tied) == 0.0
    assert intransitive_share(cycle[:2, :2]) == 0.0
    assert intransitive_share(np.zeros((0, 0))) == 0.0
    # a fourth policy that loses to all: 1 cycle in 4 triples; one that ties with the first: 1 in 2
    fourth = np.full((4, 4), 0.9)
    fourth[:3, :3], fourth[3] = cycle, 0.1
    assert intransitive_share(fourth) == 0.25
    fourth[0, 3] = fourth[3, 0] = 0.5
    assert intransitive_share(fourth) == 0.5
    fourth[1, 3] = fourth[3, 1] = math.nan  # did not play
    assert intransitive_share(fourth) == 1.0


def test_only_sure_wins_make_a_cycle_with_bounds() -> None:
    cycle = table([0.5, 0.6, 0.4], [0.4, 0.5, 0.6], [0.6, 0.4, 0.5])
    assert intransitive_share(cycle, low=cycle - 0.09) == 1.0
    unsure = cycle - 0.09
    unsure[2, 0] = 0.49
    assert intransitive_share(cycle, low=unsure) == 0.0
    assert intransitive_share(cycle, low=cycle - 0.1) == 0.0


def test_the_noise_of_equal_policies_is_no_cycle_with_bounds() -> None:
    from dual_policy_plugin.evaluation.intervals import wilson_interval

    rng = np.random.default_rng(5)
    noisy = sure = 0.0
    for _ in range(50):
        wins = play((0.0,) * 6, 101, 0.0, rng)
        win_rate = wins / 101 + np.eye(6) / 2
        low = np.array([[wilson_interval(one, 101)[0] for one in row] for row in wins.tolist()])
        noisy += intransitive_share(win_rate) / 50
        sure += intransitive_share(win_rate, low=low) / 50
    assert noisy == pytest.approx(0.25, abs=0.05)
    assert sure < 0.005


def test_the_worst_case_of_each() -> None:
    win_rate = table([0.1, 0.7, 0.3], [0.3, 0.2, 0.6], [0.7, 0.4, 0.0])
    assert worst_case(win_rate) == [0.3, 0.3, 0.4]
    win_rate[0, 2] = math.nan
    assert worst_case(win_rate)[0] == 0.7
    assert math.isnan(worst_case(table([0.5]))[0])
