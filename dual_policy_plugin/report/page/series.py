"""The lines of metrics.jsonl and timing.jsonl as columns, thinned by pooling neighbours.

Takes a file; gives arrays. Ten thousand lines are read in a fraction of a second.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dual_policy_plugin.errors import RunError
from dual_policy_plugin.files import read_lines

Floats = NDArray[np.float64]

MAX_POINTS = 400
"""Points of a curve."""


@dataclass(kw_only=True, slots=True)
class Lines:
    """A JSON-lines file by column; a name that a line lacks, or whose value is not finite, has NaN there."""

    num_lines: int = 0
    torn_bytes: int = 0
    """Behind the last whole line: what a running or a killed process has half written."""
    names: list[str] = field(default_factory=list)
    """Of the columns of numbers, in the order in which they first occur."""
    not_numbers: list[str] = field(default_factory=list)
    """Names whose values are neither numbers nor null; they are not read."""
    _cells: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)  # name -> places and values

    def column(self, name: str) -> Floats:
        """(num_lines,) the values of a column; NaN where there are none."""
        values = np.full(self.num_lines, np.nan)
        if name in self._cells:
            places, found = self._cells[name]
            values[places] = found
        return values

    def last(self, name: str) -> float | None:
        """The newest finite value of a column; None: there is none."""
        values = self.column(name)
        values = values[np.isfinite(values)]
        return float(values[-1]) if len(values) else None

    def add(self, record: dict[str, Any]) -> None:
        """Adds a line."""
        for name, value in record.items():
            if value is None:
                number = math.nan
            elif type(value) is float or type(value) is int:
                number = _finite(value)
            else:
                if name not in self.not_numbers:
                    self.not_numbers.append(name)
                continue
            cells = self._cells.get(name)
            if cells is None:
                cells = self._cells[name] = [], []
                self.names.append(name)
            cells[0].append(self.num_lines)
            cells[1].append(number)
        self.num_lines += 1


@dataclass(kw_only=True, slots=True, frozen=True)
class Windows:
    """A curve whose neighbours are pooled: all arrays are (num_windows,)."""

    steps: Floats
    """Mean learner steps of the window's iterations."""
    means: Floats
    """Weighted means of the window's values."""
    weights: Floats
    """Sums of the window's weights."""
    iterations: int
    """In most of the windows."""


def read_series(path: Path) -> Lines:
    """The whole lines of a file; no lines where there is no such file.

    Raises:
        RunError: it cannot be read, or a line that is not the last is no JSON object.
    """
    num_bytes = path.stat().st_size if path.exists() else 0  # before it is read: a run may be writing
    raw = read_lines(path)
    lines = Lines()
    for number, line in enumerate(raw, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _unreadable(path, number) from error
        if not isinstance(record, dict):
            raise _unreadable(path, number)
        lines.add(record)
    lines.torn_bytes = max(0, num_bytes - sum(map(len, raw)))
    return lines


def pool_windows(
    steps: Floats, values: Floats, weights: Floats | None = None, *, least: float = 0.0, max_points: int = MAX_POINTS
) -> Windows:
    """Neighbours pooled into at most `max_points` windows; nothing is left out.

    Args:
        steps: (n,) learner steps; where they are NaN, nothing is drawn.
        values: (n,) NaN where there is none.
        weights: (n,) how much each counts, such as its episodes; None: all alike.
        least: weight that a window has at least; there is one window where all together have less.
        max_points: of the curve.
    """
    weights = np.ones_like(values) if weights is None else weights
    is_known = np.isfinite(steps) & np.isfinite(values) & np.isfinite(weights) & (weights > 0)
    steps, values, weights = steps[is_known], values[is_known], weights[is_known]
    order = np.argsort(steps, kind="stable")  # what a restart did again stands twice in timing.jsonl
    steps, values, weights = steps[order], values[order], weights[order]
    if not len(values):
        return Windows(steps=steps, means=values, weights=weights, iterations=0)
    starts = _window_starts(weights, max(least, float(weights.sum()) / max_points))
    pooled = np.add.reduceat(weights, starts)
    lengths = np.diff(starts, append=len(values))
    return Windows(
        steps=np.add.reduceat(steps, starts) / lengths,
        means=np.add.reduceat(values * weights, starts) / pooled,
        weights=pooled,
        iterations=int(np.median(lengths)),
    )


def _window_starts(weights: Floats, size: float) -> list[int]:
    """Where windows begin that each have `size` or a little more; what is left at the end goes to the last of them."""
    starts, held = [0], 0.0
    for k, weight in enumerate(weights.tolist(), 1):
        held += weight
        if held >= size * (1 - 1e-9):  # of a sum of so many parts
            starts.append(k)
            held = 0.0
    return starts[:-1] if len(starts) > 1 else starts


def _finite(value: float) -> float:
    try:
        number = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.nan
    return number if math.isfinite(number) else math.nan


def _unreadable(path: Path, number: int) -> RunError:
    return RunError(f"{path} line {number} is no JSON object; restore the file, or remove that line")
