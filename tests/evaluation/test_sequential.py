"""Gates: figures by hand, error rates by simulation with draws, batches and mirrored games, and what can never pass."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.evaluation.intervals import wilson_interval
from dual_policy_plugin.evaluation.sequential import can_pass, play_until_decided, sprt, wilson_gate

SPRT = partial(sprt, p0=0.4, p1=0.6, alpha=0.05, beta=0.05)


def test_the_likelihood_ratio_by_hand() -> None:
    # 7 wins, 3 losses: 7 log(0.6 / 0.4) + 3 log(0.4 / 0.6) = 4 log 1.5; as 6 wins, 2 losses and 2 draws it is the same
    verdict = SPRT(7.0, 10)
    assert verdict.statistic == pytest.approx(4 * math.log(1.5), abs=1e-12)
    assert verdict.bounds == pytest.approx((math.log(0.05), math.log(20)))
    assert (verdict.passed, verdict.win_rate, verdict.episodes, verdict.rule) == (None, 0.7, 10, "sprt")
    assert (verdict.low, verdict.high) == wilson_interval(7, 10)
    # with unequal steps: 0.45 against 0.5
    assert sprt(2.5, 3, p0=0.45, p1=0.5, alpha=0.05, beta=0.05).statistic == pytest.approx(
        2.5 * math.log(0.5 / 0.45) + 0.5 * math.log(0.5 / 0.55), abs=1e-12
    )


def test_the_bounds_decide() -> None:
    # log 20 / log 1.5 = 7.39: eight wins ahead pass, seven do not yet; the same number behind fail
    assert [SPRT(float(wins), 10).passed for wins in (1, 2, 8, 9)] == [False, None, None, True]
    assert SPRT(0.0, 0).passed is None
    assert SPRT(0.0, 0).win_rate == 0.5
    assert sprt(9.0, 10, p0=0.4, p1=0.6, alpha=0.01, beta=0.05).passed is None
    assert sprt(1.0, 10, p0=0.4, p1=0.6, alpha=0.05, beta=0.01).passed is None


def share_of(
    passed: bool,
    *,
    rate: float,
    draws: float = 0.0,
    batch: int = 1,
    mirrored: bool = False,
    p0: float = 0.4,
    p1: float = 0.6,
    alpha: float = 0.05,
    beta: float = 0.05,
    episodes_per_seed: int = 1,
    times: int = 2000,
) -> float:
    """How often a test of games with this win rate decides for `passed`; `mirrored` games end alike, two by two."""
    rng = np.random.default_rng(7)
    num_draws = 2 * draws * min(rate, 1 - rate)  # as a share: `draws` 1 is as many as the rate allows
    shares = [rate - num_draws / 2, num_draws, 1 - rate - num_draws / 2]
    count = 0
    for _ in range(times):
        wins, episodes, verdict = 0.0, 0, None
        while verdict is None:
            num_seeds = batch // 2 if mirrored else batch
            won, drawn, _ = rng.multinomial(num_seeds, shares) * (2 if mirrored else 1)
            wins, episodes = wins + won + drawn / 2, episodes + batch
            verdict = sprt(
                wins, episodes, p0=p0, p1=p1, alpha=alpha, beta=beta, episodes_per_seed=episodes_per_seed
            ).passed
        count += verdict is passed
    return count / times


NOISE = 3 * math.sqrt(0.05 * 0.95 / 2000)  # three standard deviations of a share of 0.05


@pytest.mark.parametrize("draws", [0.0, 0.5])
@pytest.mark.parametrize("batch", [1, 16])
def test_error_rates_hold_with_and_without_draws_and_in_batches(draws: float, batch: int) -> None:
    wrongly_passed = share_of(True, rate=0.4, draws=draws, batch=batch)
    wrongly_failed = share_of(False, rate=0.6, draws=draws, batch=batch)
    assert wrongly_passed <= 0.05 + NOISE
    assert wrongly_failed <= 0.05 + NOISE
    if not draws and batch == 1:  # and are not wasted: the overshoot of one game is small
        assert wrongly_passed >= 0.02
        assert wrongly_failed >= 0.02


def test_each_error_rate_is_its_own() -> None:
    assert share_of(True, rate=0.4, alpha=0.2, beta=0.02) == pytest.approx(0.2, abs=0.07)
    assert share_of(False, rate=0.6, alpha=0.2, beta=0.02) <= 0.02 + NOISE
    assert share_of(False, rate=0.6, alpha=0.02, beta=0.2) == pytest.approx(0.2, abs=0.07)


def test_a_gate_of_half_against_a_margin_holds_in_large_batches() -> None:
    gate = partial(share_of, p0=0.45, p1=0.5, batch=64, times=500)
    assert gate(True, rate=0.45) <= 0.05 + 2 * NOISE
    assert gate(False, rate=0.5) <= 0.05 + 2 * NOISE
    assert gate(True, rate=0.55) == 1.0
    assert gate(False, rate=0.4) == 1.0


def test_mirrored_games_are_one_observation() -> None:
    """Both games of a seed end alike: taken for two they would pass far too often, as one the error rate holds."""
    alike = partial(share_of, True, rate=0.4, batch=2, mirrored=True)
    assert alike(episodes_per_seed=1) > 0.05 + 3 * NOISE
    assert alike(episodes_per_seed=2) <= 0.05 + NOISE
    assert SPRT(14.0, 20, episodes_per_seed=2).statistic == pytest.approx(SPRT(7.0, 10).statistic, abs=1e-12)
    verdict = wilson_gate(14.0, 20, promote_at=0.5, episodes_per_seed=2)
    assert (verdict.low, verdict.high) == wilson_interval(7, 10)
    assert (verdict.win_rate, verdict.episodes) == (0.7, 20)


def test_the_wilson_gate_passes_above_its_bound_only() -> None:
    # 81 of 263 has the interval (0.2553, 0.3662): Newcombe 1998, table I, method 3
    assert wilson_gate(81.0, 263, promote_at=0.2552).passed is True
    verdict = wilson_gate(81.0, 263, promote_at=0.2554)
    assert (verdict.passed, verdict.rule, verdict.episodes) == (False, "wilson", 263)
    assert (verdict.low, verdict.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert verdict.statistic == verdict.low
    assert verdict.bounds == (0.2554, 0.2554)
    assert wilson_gate(0.0, 0, promote_at=0.0).passed is False
    assert wilson_gate(60.0, 100, promote_at=0.5, confidence=0.9).passed is True
    assert wilson_gate(60.0, 100, promote_at=0.5, confidence=0.99).passed is False


def test_the_wilson_gate_passes_what_it_must_not_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    passed = sum(
        bool(wilson_gate(float(wins), 400, promote_at=0.55).passed) for wins in rng.binomial(400, 0.55, size=2000)
    )
    assert 0.01 < passed / 2000 < 0.025 + 3 * math.sqrt(0.025 * 0.975 / 2000)


def test_what_can_never_pass() -> None:
    assert not can_pass(partial(wilson_gate, promote_at=1.0), 10**9)
    # all of n won: the lower bound is n / (n + z^2) with z = 1.95996; above 0.9 from n = 9 z^2 = 34.57 on
    assert not can_pass(partial(wilson_gate, promote_at=0.9), 34)
    assert can_pass(partial(wilson_gate, promote_at=0.9), 35)
    assert not can_pass(SPRT, 7)
    assert can_pass(SPRT, 8)
    assert not can_pass(partial(SPRT, episodes_per_seed=2), 14)
    assert can_pass(partial(SPRT, episodes_per_seed=2), 16)


def test_games_are_played_until_the_rule_decides_or_there_are_no_more() -> None:
    asked: list[tuple[int, int]] = []

    def play(look: int, episodes: int, *, share: float) -> tuple[float, int]:
        asked.append((look, episodes))
        return share * (episodes + 1), episodes + 1  # one more than asked

    # 5 wins a look: log 20 / log 1.5 = 7.39 is passed with the second
    verdict = play_until_decided(SPRT, partial(play, share=1.0), max_episodes=100, episodes_per_look=4)
    assert (verdict.passed, verdict.episodes, verdict.win_rate) == (True, 10, 1.0)
    assert asked == [(0, 4), (1, 4)]
    asked.clear()
    verdict = play_until_decided(SPRT, partial(play, share=0.5), max_episodes=12, episodes_per_look=4)
    assert (verdict.passed, verdict.episodes, verdict.statistic) == (None, 13, pytest.approx(0.0, abs=1e-12))
    assert asked == [(0, 4), (1, 4), (2, 2)]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"p0": 0.6, "p1": 0.6}, "p0=0.6, p1=0.6 cannot be tested; use 0 < p0 < p1 < 1"),
        ({"p0": 0.0}, "p0=0.0, p1=0.6 cannot"),
        ({"p1": 1.0}, "p0=0.4, p1=1.0 cannot"),
        ({"p1": math.nan}, "p1=nan cannot"),
        ({"alpha": 0.0}, "alpha=0.0 is no error rate"),
        ({"alpha": math.nan}, "alpha=nan is no error rate"),
        ({"beta": 0.5}, "beta=0.5 is no error rate; use a number between 0 and 0.5"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, float], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        SPRT(5.0, 10, **settings)


def test_settings_of_wilson_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match=r"promote_at=1\.5 is no win rate"):
        wilson_gate(5.0, 10, promote_at=1.5)
    with pytest.raises(ConfigError, match=r"confidence=1 is not possible"):
        wilson_gate(5.0, 10, promote_at=0.5, confidence=1)
    with pytest.raises(ValueError, match=r"11\.0 wins in 10 episodes"):
        wilson_gate(11.0, 10, promote_at=0.5)
