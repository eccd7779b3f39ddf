"""A worked example of an own env: agents on a ring race for one berry that is always somewhere.

`make` is all that dual-policy training needs. It returns an object in the shape of a PettingZoo ParallelEnv; the
optional attributes beside the protocol are named where they stand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete

Observations = dict[str, np.ndarray]


def make(index: int, *, num_agents: int = 4, size: int = 20, steps: int = 50) -> BerryRace:
    """One env. `index` is its number among all envs of the run; the other parameters are `env.args`."""
    return BerryRace(num_agents, size, steps)


class BerryRace:
    """Each agent stands on a ring of `size` places and may step left or right. Who comes to the berry's place gets
    reward 1 and the berry lies elsewhere; several who come at once share it. After `steps` steps time is up."""

    action_names = ("stay", "left", "right")
    feature_names = ("berry_ahead", "berry_distance", "rival_distance")
    agents_leave = False  # all play to the end: nothing to mask out

    def __init__(self, num_agents: int, size: int, steps: int) -> None:
        self.possible_agents = [f"agent_{number}" for number in range(num_agents)]
        self.agents: list[str] = []
        self.size = size
        self.max_episode_steps = steps

    def observation_space(self, agent: str) -> Box:
        """What one agent sees, as `feature_names` says."""
        return Box(-1.0, 1.0, (3,), np.float32)

    def action_space(self, agent: str) -> Discrete:
        """What one agent may do, as `action_names` says."""
        return Discrete(3)

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[Observations, dict[str, Any]]:
        """All randomness of the episode comes from `seed`: so a run can be repeated, with any number of workers."""
        self.random = np.random.default_rng(seed)
        self.agents = list(self.possible_agents)
        self.places = self.random.integers(0, self.size, len(self.agents))
        self.berry = int(self.random.integers(0, self.size))
        self.time = 0
        return self._observe(), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]) -> tuple[Observations, dict, dict, dict, dict]:
        """Moves everybody at once; gives observations, rewards, terminations, truncations and infos."""
        moves = np.array([(0, -1, 1)[actions[agent]] for agent in self.agents])
        self.places = (self.places + moves) % self.size
        self.time += 1
        winners = self.places == self.berry
        gain = winners / max(1, winners.sum())
        if winners.any():
            self.berry = int(self.random.integers(0, self.size))

        agents, observations = self.agents, self._observe()
        rewards = {agent: float(gain[number]) for number, agent in enumerate(agents)}
        # Time is up: the world goes on, we only stop looking. That is a truncation; an end by the rules, such as a
        # won game, is a termination. It decides whether the value of what comes after still counts.
        is_time_up = self.time >= self.max_episode_steps
        if is_time_up:
            self.agents = []
        nobody, everybody = dict.fromkeys(agents, False), dict.fromkeys(agents, is_time_up)
        return observations, rewards, nobody, everybody, {agent: {} for agent in agents}

    def close(self) -> None:
        """Nothing to free."""

    def _observe(self) -> Observations:
        half = self.size / 2
        to_berry = (self.berry - self.places + half) % self.size - half
        to_rivals = np.abs((self.places[:, None] - self.places[None, :] + half) % self.size - half)
        np.fill_diagonal(to_rivals, half)
        features = np.stack([np.sign(to_berry), np.abs(to_berry) / half, to_rivals.min(1) / half], axis=1)
        return {agent: features[number].astype(np.float32) for number, agent in enumerate(self.possible_agents)}
