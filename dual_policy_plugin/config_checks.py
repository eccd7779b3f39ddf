"""Range checks of config values: one line with key, value and what would be right."""

from __future__ import annotations

import math

from dual_policy_plugin.errors import ConfigError


def check(condition: bool, key: str, value: object, right: str) -> None:
    """Raises a ConfigError that names key, value and what would be right, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}={value} is not possible; {right}")


def check_range(key: str, value: float, low: float, high: float) -> None:
    """Raises a ConfigError unless low <= value <= high and value is a finite number."""
    check(math.isfinite(value) and low <= value <= high, key, value, f"use a value from {_show(low)} to {_show(high)}")


def _show(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"
