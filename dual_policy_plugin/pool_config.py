"""How a run's NPCs are chosen among, grown from snapshots of the learner, and faced by how many learner agents.

The part of `trainer.dual_policy` that `matchmaking.py`, `roster.py` and `share_schedule.py` read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dual_policy_plugin.config_checks import check, check_range
from dual_policy_plugin.errors import ConfigError

_KEY = "trainer.dual_policy"
MATCHMAKING = ("uniform", "weights", "latest_biased", "pfsp", "adaptive")
PFSP_FORMS = ("squared", "variance")
SCHEDULES = ("steps", "linear", "adaptive")
# Which types read a setting; one that is set for another type is an error.
MATCHMAKING_READERS: dict[str, tuple[str, ...]] = {
    "latest_share": ("latest_biased",),
    "form": ("pfsp",),
    "band": ("adaptive",),
    "min_games": ("pfsp", "adaptive"),
    "memory": ("pfsp", "adaptive"),
    "explore": ("pfsp", "adaptive"),
}
SCHEDULE_READERS: dict[str, tuple[str, ...]] = {
    "at": ("steps",),
    "values": ("steps",),
    "end": ("linear",),
    "until": ("linear",),
    "band": ("adaptive",),
    "low": ("adaptive",),
    "high": ("adaptive",),
    "min_episodes": ("adaptive",),
}


def check_read(key: str, said: Mapping[str, object], readers: Mapping[str, tuple[str, ...]], choice: str) -> None:
    """Raises a ConfigError for a setting that the chosen type does not read: nothing is ignored in silence.

    Args:
        key: where the settings stand.
        said: those that were set, by name.
        readers: the types that read each.
        choice: what was chosen, as `matchmaking=pfsp` or `type=steps`.
    """
    name, _, chosen = choice.partition("=")
    for setting, value in said.items():
        if setting in readers and chosen not in readers[setting]:
            raise ConfigError(
                f"{key}.{setting}={value} is not read by {choice}; remove it, or use {name}={_one_of(readers[setting])}"
            )


def check_weight(key: str, weight: float | None) -> None:
    """Raises a ConfigError unless the weight of an NPC is a number of at least 0, or None."""
    is_weight = weight is None or (math.isfinite(weight) and weight >= 0)
    check(is_weight, key, weight, "use a number of at least 0, or null")


def _check_band(key: str, band: list[float]) -> None:
    is_band = len(band) == 2 and 0 <= band[0] < band[1] <= 1
    check(is_band, key, band, "use two win rates, the lower first, for example [0.4, 0.6]")


@dataclass(kw_only=True, slots=True, frozen=True)
class MatchmakingConfig:
    """Which NPC plays next (see matchmaking.py for the formulas)."""

    type: str = "uniform"
    """uniform | weights | latest_biased | pfsp | adaptive."""
    latest_share: float = 0.5
    """latest_biased: the newest NPC's share of the episodes; the others share the rest."""
    form: str = "squared"
    """pfsp: squared (hard opponents) | variance (opponents of equal strength)."""
    band: list[float] = field(default_factory=lambda: [0.4, 0.6])
    """adaptive: [low, high] that the learner's expected win rate is held in, before `explore`."""
    min_games: int = 20
    """pfsp, adaptive: games against an NPC before its win rate counts; until then pfsp takes it for 1/2, adaptive for
    the middle of the band."""
    memory: int = 1000
    """pfsp, adaptive: about how many of the newest games a win rate remembers."""
    explore: float = 0.05
    """pfsp, adaptive: share of the episodes that all NPCs have equal parts of, so that no win rate grows old."""

    def __post_init__(self) -> None:
        args = f"{_KEY}.matchmaking_args"
        check(self.type in MATCHMAKING, f"{_KEY}.matchmaking", self.type, f"use {_one_of(MATCHMAKING)}")
        check(self.form in PFSP_FORMS, f"{args}.form", self.form, f"use {_one_of(PFSP_FORMS)}")
        check_range(f"{args}.latest_share", self.latest_share, 0, 1)
        check_range(f"{args}.min_games", self.min_games, 1, 10**6)
        check_range(f"{args}.memory", self.memory, 1, 10**9)
        check(self.memory >= self.min_games, f"{args}.memory", self.memory, f"use min_games={self.min_games} at least")
        check_range(f"{args}.explore", self.explore, 0, 1)
        _check_band(f"{args}.band", self.band)


@dataclass(kw_only=True, slots=True, frozen=True)
class SelfPlayConfig:
    """Snapshots of the learner as NPCs of its own run."""

    snapshot_interval: int | None = None
    """Iterations between two snapshots; None: only when the gate is passed."""
    gate: float | None = None
    """A snapshot is also made when the learner's win rate since the last one is above this, as a sequential test finds
    (error rate 5 %); None: only every snapshot_interval."""
    window: int = 8
    """How many snapshots stay in the pool, the newest; those of the config always stay."""

    def __post_init__(self) -> None:
        key = f"{_KEY}.self_play"
        for name, value in (("snapshot_interval", self.snapshot_interval), ("gate", self.gate)):
            check(value is None or value > 0, f"{key}.{name}", value, "use a value above 0, or null")
        is_rate = self.gate is None or self.gate < 1
        check(is_rate, f"{key}.gate", self.gate, "no interval of a win rate lies above it; use a win rate below 1")
        check_range(f"{key}.window", self.window, 1, 512)
        is_on = self.snapshot_interval is not None or self.gate is not None
        check(is_on, f"{key}.snapshot_interval", None, "self-play needs snapshot_interval or gate; set one")


@dataclass(kw_only=True, slots=True, frozen=True)
class ShareSchedule:
    """How training_agents_pct changes during a run; the key itself is the share that the run begins with."""

    type: str
    """steps | linear | adaptive."""
    at: list[int] = field(default_factory=list)
    """steps: learner steps at which the share changes, ascending."""
    values: list[float] = field(default_factory=list)
    """steps: the share from each of them on."""
    end: float | None = None
    """linear: the share that is reached at `until`."""
    until: int | None = None
    """linear: learner steps at which `end` is reached, on a straight line; None: trainer.total_timesteps."""
    band: list[float] = field(default_factory=lambda: [0.4, 0.6])
    """adaptive: above this win rate one agent fewer learns in each env, below it one more."""
    low: float = 0.0
    """adaptive: the least share, as seats; there is always one learner."""
    high: float = 1.0
    """adaptive: the greatest share, as seats; there is always one NPC."""
    min_episodes: int = 200
    """adaptive: episodes between two looks at the win rate, which is that of the episodes since the last one."""

    def __post_init__(self) -> None:
        key = f"{_KEY}.pct_schedule"
        check(self.type in SCHEDULES, f"{key}.type", self.type, f"use {_one_of(SCHEDULES)}")
        shares = {f"{key}.values[{i}]": share for i, share in enumerate(self.values)}
        if self.end is not None:
            shares[f"{key}.end"] = self.end
        for name, share in shares.items():
            check(0 < share <= 1, name, share, "a share is above 0 and up to 1, for example 0.5")
        if self.type == "steps":
            is_ascending = all(a < b for a, b in zip([0, *self.at], self.at, strict=False))
            check(bool(self.at) and is_ascending, f"{key}.at", self.at, "use ascending learner steps above 0")
            fits = len(self.values) == len(self.at)
            check(fits, f"{key}.values", self.values, f"use one share for each of the {len(self.at)} steps in at")
        if self.type == "linear":
            check(self.end is not None, f"{key}.end", self.end, "linear needs the last share, for example 0.75")
            check(
                self.until is None or self.until > 0, f"{key}.until", self.until, "use learner steps above 0, or null"
            )
        _check_band(f"{key}.band", self.band)
        check(0 <= self.low < self.high <= 1, f"{key}.low", self.low, f"use a share below high={self.high}")
        check_range(f"{key}.min_episodes", self.min_episodes, 1, 10**9)


def _one_of(names: tuple[str, ...]) -> str:
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
