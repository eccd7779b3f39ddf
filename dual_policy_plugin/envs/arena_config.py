"""The arena's settings, and the observation space and actions that follow from them. Read by `envs/arena.py`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any

from dual_policy_plugin.config_checks import check, check_range
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.types import ObservationSpace

ACTIONS = ("noop", "north", "south", "west", "east", "attack")
FEATURES = ("empty", "wall", "mine", "altar", "ally", "foe", "frozen_ally", "frozen_foe")
OWN = ("ore", "hearts", "frozen", "cooldown", "time_left")
COUNTERS = ("hearts", "ore", "attacks", "times_frozen")
WINDOW = 11
"""Cells per side of what an agent sees; odd, so that the agent stands in the centre."""
ROW_BYTES = 128
HEARTS_SCALE = 8.0
"""What the hearts byte is divided by: about what a good agent brings home in one episode."""


@dataclass(kw_only=True, slots=True, frozen=True)
class ArenaConfig:
    """The arena's sizes, counts and times. The defaults make a game that PPO learns within two million steps."""

    num_agents: int = 8
    """Seats per env, both teams together."""
    height: int = 14
    """Cells from north to south inside the border wall."""
    width: int = 14
    """Cells from west to east inside the border wall."""
    mines: int = 4
    """Cells that give ore."""
    altars: int = 4
    """Cells that turn one ore into one heart."""
    walls: int = 10
    """Single wall cells inside the border."""
    altar_stock: int = 12
    """Hearts that one altar gives in an episode; then it is a wall."""
    ore_capacity: int = 3
    """Ore that one agent can carry."""
    freeze_steps: int = 8
    """Steps that an attacked agent does nothing."""
    attack_cooldown: int = 12
    """Steps after a hit in which the attacker cannot attack."""
    episode_steps: int = 128
    """Length of every episode."""
    teams: str | list[int] = "halves"
    """halves | alternating | a list of 0 and 1, one per seat: the team of each seat."""

    def __post_init__(self) -> None:
        """Raises a ConfigError for a value that cannot work, or a map that does not fit."""
        for name, low, high in (
            ("num_agents", 2, 64), ("height", 4, 64), ("width", 4, 64), ("mines", 1, 256), ("altars", 1, 256),
            ("walls", 0, 1024), ("altar_stock", 1, 255), ("ore_capacity", 1, 100), ("freeze_steps", 1, 255),
            ("attack_cooldown", 0, 255), ("episode_steps", 2, 10_000),
        ):  # fmt: skip
            value = getattr(self, name)
            check(type(value) is int, f"env.{name}", value, f"use a whole number from {low} to {high}")
            check_range(f"env.{name}", value, low, high)
        num_slots = (self.height // 2) * (self.width // 2)
        right = f"a {self.height}x{self.width} map has room for {num_slots}; use fewer, or a larger height and width"
        check(self.num_objects <= num_slots, "env.mines + env.altars + env.walls", self.num_objects, right)
        num_free = self.height * self.width - self.num_objects
        check(self.num_agents <= num_free, "env.num_agents", self.num_agents, f"the map has {num_free} free cells")
        team_of_seat(self.teams, self.num_agents)

    @property
    def num_objects(self) -> int:
        """Mines, altars and inner walls together."""
        return self.mines + self.altars + self.walls


def parse_arena_args(args: dict[str, Any]) -> ArenaConfig:
    """Returns the settings from the config's `env` keys; an unknown key is a ConfigError naming the nearest one."""
    known = [field.name for field in fields(ArenaConfig)]
    for name in args:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"env.{name}: the arena has no such setting; did you mean env.{near}?")
    return ArenaConfig(**args)


def team_of_seat(teams: str | list[int], num_agents: int) -> list[int]:
    """Returns the team (0 or 1) of every seat; both teams have an agent, or it is a ConfigError."""
    if teams == "halves":
        return [int(2 * seat >= num_agents) for seat in range(num_agents)]
    if teams == "alternating":
        return [seat % 2 for seat in range(num_agents)]
    right = f"use halves, alternating, or a list of {num_agents} zeros and ones with both in it"
    is_list = isinstance(teams, list | tuple) and len(teams) == num_agents
    check(is_list and set(teams) == {0, 1} and all(type(team) is int for team in teams), "env.teams", teams, right)
    return [int(team) for team in teams]


def observation_space(config: ArenaConfig) -> ObservationSpace:
    """Returns what one agent sees: an 11x11 window of codes, five bytes of own state, two bytes of padding."""
    scales = (
        float(config.ore_capacity),
        HEARTS_SCALE,
        float(config.freeze_steps),
        float(max(1, config.attack_cooldown)),
        255.0,
    )
    return ObservationSpace(
        kind="window", shape=(ROW_BYTES,), features=FEATURES, window=(WINDOW, WINDOW), own=OWN, scales=scales
    )
