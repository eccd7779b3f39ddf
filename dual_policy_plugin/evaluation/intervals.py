"""How sure a win rate is. Takes counts; gives intervals."""

from __future__ import annotations

import math
from statistics import NormalDist


def wilson_interval(wins: float, episodes: float, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a win rate (Wilson 1927).

    Draws enter `wins` as half. A draw has less variance than a coin, so with draws the interval is a little too wide,
    never too narrow.

    Args:
        wins: number of wins plus half the number of draws.
        episodes: number of episodes; 0 gives (0, 1).
        confidence: coverage, in (0, 1).
    """
    if episodes <= 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = wins / episodes
    center = rate + z * z / (2 * episodes)
    half = z * math.sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes * episodes))
    scale = 1 + z * z / episodes
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)
