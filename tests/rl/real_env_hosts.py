"""Envs that the workers of `test_real_envs.py` import: a MettaGrid game that tells where everybody stands, and toys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dual_policy_plugin.envs.host import Rows
from dual_policy_plugin.envs.mettagrid import MettagridConfig, MettagridHost


class Surveyed(MettagridHost):
    """A MettaGrid game whose counters are the places on the simulator's own grid, at an episode's start and end."""

    def __init__(self, config: MettagridConfig) -> None:
        super().__init__(config)
        self.spec = replace(self.spec, counters=("row", "column", "first_row", "first_column"))

    def start(self, seed: int, rows: Rows) -> None:
        super().start(seed, rows)
        self.first = self._places()

    def count(self, rows: Rows) -> None:
        rows.counters[:] = np.concatenate([self._places(), self.first], axis=1)

    def _places(self) -> Any:
        found = {
            item["agent_id"]: item["location"][::-1]
            for item in self.simulation.grid_objects().values()
            if "agent_id" in item
        }
        return np.array([found[agent] for agent in self.agent_of_seat.tolist()])  # (num_agents, 2): row, column


def make_surveyed(index: int) -> Surveyed:
    return Surveyed(MettagridConfig(num_agents=6, size=8, steps=10, mines=0, altars=0, walls=0))


class Clock:
    """A ParallelEnv of two agents that never ends by itself. Observation: (steps of this episode, last own action);
    reward: the step. The final observation of an episode of L steps is (L, action)."""

    possible_agents = ("left", "right")
    agents_leave = False
    roles = ()
    action_names = ("stay", "north", "south")

    def __init__(self, length: int) -> None:
        self.max_episode_steps = length

    def observation_space(self, agent: str) -> Any:
        return SimpleNamespace(shape=(2,), low=0.0, high=1.0)

    def action_space(self, agent: str) -> Any:
        return SimpleNamespace(n=3, start=0)

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        self.agents, self.t = list(self.possible_agents), 0
        return {agent: np.zeros(2, np.float32) for agent in self.agents}, {}

    def step(self, actions: dict[str, int]) -> Any:
        self.t += 1
        seen = {agent: np.array([self.t, action], np.float32) for agent, action in actions.items()}
        nobody = dict.fromkeys(self.agents, False)
        return seen, dict.fromkeys(self.agents, float(self.t)), nobody, nobody, {}


def make_clock(index: int, *, length: int = 4) -> Clock:
    return Clock(length)


class Logged(Clock):
    """A Clock that writes down the seed of each of its episodes."""

    def __init__(self, path: str) -> None:
        super().__init__(length=8)
        self.path = path

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        with Path(self.path).open("a") as file:
            file.write(f"{seed}\n")
        return super().reset(seed, options)


def make_logged(index: int, *, path: str) -> Logged:
    return Logged(path)
