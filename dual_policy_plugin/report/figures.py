"""Figures as short text: numbers, rates, times, and the small graph of the progress panel."""

from __future__ import annotations

import itertools

SPARKS = "▁▂▃▄▅▆▇█"
ASCII_SPARKS = "_.-~=+*#"


class History:
    """A series of any length in bounded memory: when full, neighbours are merged into their means."""

    def __init__(self, capacity: int) -> None:
        """An empty series that holds at most `capacity` (even) means."""
        self._capacity = capacity
        self._means: list[float] = []
        self._per_mean = 1
        self._pending: list[float] = []

    def add(self, value: float) -> None:
        """Adds the newest value."""
        self._pending.append(value)
        if len(self._pending) < self._per_mean:
            return
        self._means.append(sum(self._pending) / len(self._pending))
        self._pending = []
        if len(self._means) >= self._capacity:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._per_mean *= 2

    def values(self, count: int) -> list[float]:
        """At most `count` means over equal stretches of the series, oldest first."""
        means = list(self._means)
        if len(means) <= count:
            return means
        edges = [i * len(means) // count for i in range(count + 1)]
        return [sum(means[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def sparkline(values: list[float], sparks: str = SPARKS) -> str:
    """One character per value; 0 or less is the lowest, 1 or more the highest."""
    return "".join(sparks[min(max(int(value * len(sparks)), 0), len(sparks) - 1)] for value in values)


def format_percent(part: float, whole: float) -> str:
    """As `61.7 %`; 100 % at most, since the last iteration may go over the end."""
    return f"{min(100.0, 100 * part / whole):.1f} %"


def format_rate(steps_per_s: float | None) -> str:
    """Steps per second with three digits, as `43.1k steps/s`."""
    if steps_per_s is None:
        return "- steps/s"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if steps_per_s >= size:
            return f"{steps_per_s / size:.3g}{letter} steps/s"
    return f"{steps_per_s:.0f} steps/s"


def format_number(value: float) -> str:
    """Three decimals, or three digits where those would all be zero."""
    return f"{value:.3g}" if abs(value) < 1e-3 and value else f"{value:.3f}"


def format_duration(seconds: float | None) -> str:
    """As `1:02:03`; - where it is not known."""
    if seconds is None:
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
