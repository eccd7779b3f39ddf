"""The Wilson interval: a published example, the ends, and its coverage."""

from __future__ import annotations

import random

import pytest

from dual_policy_plugin.evaluation.intervals import wilson_interval


def test_known_values() -> None:
    # 81 of 263: Newcombe 1998, table I, method 3
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 10)[0] == pytest.approx(0.0, abs=1e-15)
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0, abs=1e-15)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_covers_as_often_as_it_says() -> None:
    draw = random.Random(0)
    for rate in (0.1, 0.5, 0.73):
        hits = 0
        for _ in range(400):
            wins = sum(draw.random() < rate for _ in range(200))
            low, high = wilson_interval(wins, 200)
            hits += low <= rate <= high
        assert 0.92 <= hits / 400 <= 0.98
