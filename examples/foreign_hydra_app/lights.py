"""Their env: four moths on a line, and a light that drifts. At every step the moth nearest to the light is paid 1."""

from __future__ import annotations

import numpy as np

FEATURES = ("light", "speed", "rival")  # where the light is from here, own speed, how near the best rival is to it
ACTIONS = ("left", "drift", "right")
STEPS = 40


class Lights:
    """Many games at once, in plain numpy; all end together, and begin anew at once."""

    def __init__(self, num_envs: int, num_agents: int, seed: int) -> None:
        self.shape = (num_envs, num_agents)
        self.random = np.random.default_rng(seed)
        self.start()

    def start(self) -> None:
        """New places for everybody."""
        self.places = self.random.uniform(-1, 1, self.shape)
        self.speeds = np.zeros(self.shape)
        self.light = self.random.uniform(-1, 1, (self.shape[0], 1))
        self.time = 0

    def observe(self) -> np.ndarray:
        """(num_envs, num_agents, 3)."""
        away = np.abs(self.light - self.places)
        rival = np.stack([np.delete(away, i, axis=1).min(axis=1) for i in range(self.shape[1])], axis=1)
        return np.stack([self.light - self.places, self.speeds, rival], axis=2)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rewards (num_envs, num_agents) and dones (num_envs,) after actions (num_envs, num_agents)."""
        self.speeds = 0.8 * self.speeds + 0.05 * (actions - 1)
        self.places = np.clip(self.places + self.speeds, -1, 1)
        self.light = np.clip(self.light + self.random.normal(0, 0.05, self.light.shape), -1, 1)
        away = np.abs(self.light - self.places)
        rewards = (away == away.min(axis=1, keepdims=True)).astype(float)
        self.time += 1
        dones = np.full(self.shape[0], self.time == STEPS)
        if self.time == STEPS:
            self.start()
        return rewards, dones
