"""One simulator inside a worker process: the `Host` protocol, its rows in shared memory, and its episodes.

`puffer.py`, `pettingzoo.py` and `mettagrid.py` make hosts; `EpisodeRunner` steps one, ends its episodes and starts the
next; `worker_process.py` runs a slice of them; `workers.py` reads the same rows in the training process. Nothing here
needs torch.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.types import ObservationSpace

DEFAULT_MAX_EPISODE_STEPS = 10_000


@dataclass(kw_only=True, slots=True, frozen=True)
class HostSpec:
    """The fixed facts of one simulator; all envs of a run must agree on them."""

    num_agents: int
    observation_space: ObservationSpace
    actions: tuple[str, ...]
    max_episode_steps: int
    """Upper bound of an episode; the runner truncates an episode that gets there."""
    has_weights: bool = False
    counters: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    """The role of each seat; empty: all seats are equal."""


@dataclass(kw_only=True, slots=True)
class Rows:
    """What one env reads and writes at a step: numpy views of its part of the shared memory."""

    actions: NDArray[np.int64]
    """(num_agents,), read only."""
    observations: NDArray[Any]
    """(num_agents, *shape): after this step; zeros in an empty seat."""
    final_observations: NDArray[Any]
    """(num_agents, *shape): what a seat that this step truncated saw last; other seats hold anything."""
    rewards: NDArray[np.float32]
    """(num_agents,): 0 in an empty seat."""
    dones: NDArray[np.bool_]
    """(num_agents,): this step ended the agent's episode, or its seat was empty in this step."""
    truncated: NDArray[np.bool_]
    """(num_agents,), a subset of dones."""
    weights: NDArray[np.float32]
    """(num_agents,): 1 where the agent acted in this step, 0 where its seat was empty."""
    counters: NDArray[np.float32]
    """(num_agents, num_counters): written at an episode's end."""
    episode_ends: NDArray[np.bool_]
    """(1,): written by the runner."""


class Host(Protocol):
    """One simulator, as a worker drives it."""

    @property
    def spec(self) -> HostSpec:
        """The simulator's fixed facts."""

    def start(self, seed: int, rows: Rows) -> None:
        """Starts an episode, whatever the state of the last one, and writes its first observations."""

    def step(self, rows: Rows) -> bool:
        """Steps with `rows.actions`; writes observations, rewards, dones, truncated, weights, and the final
        observation of each truncated seat. True where the episode ended by itself; the next one is not started."""

    def count(self, rows: Rows) -> None:
        """Writes the episode's counters; called at its end."""

    def close(self) -> None:
        """Frees what the simulator holds."""


def episode_seed(seed: int, env: int, episode: int) -> int:
    """A 31-bit seed that depends on (seed, env, episode) alone, so that any split into workers plays the same."""
    return int(np.random.SeedSequence((seed, env, episode)).generate_state(1)[0]) >> 1


def first_cut(index: int, num_envs: int, max_episode_steps: int) -> int:
    """After how many steps a staggered env's first episode is cut: spread evenly over (0, max_episode_steps]."""
    return max(1, (index + 1) * max_episode_steps // num_envs)


class EpisodeRunner:
    """Steps one host through its episodes; an ended episode is followed by the next one in the same step."""

    def __init__(self, host: Host, rows: Rows, env: int) -> None:
        self._host, self._rows, self._env = host, rows, env
        self._seed = self._episode = self._steps = 0
        self._limit = host.spec.max_episode_steps

    def reset(self, seed: int, cut: int) -> None:
        """Starts episode 0 under `seed`; it is truncated after `cut` steps if it lives that long."""
        self._seed, self._episode = seed, 0
        self._limit = min(cut, self._host.spec.max_episode_steps)
        self._start()

    def step(self) -> None:
        """One step with `rows.actions`; fills the rows as `types.StepResult` promises."""
        rows = self._rows
        ended = self._host.step(rows)
        self._steps += 1
        if not ended and self._steps >= self._limit:
            cut = (rows.weights > 0) & ~rows.dones
            rows.truncated |= cut
            rows.final_observations[cut] = rows.observations[cut]
            ended = True
        rows.episode_ends[0] = ended
        if ended:
            self._host.count(rows)
            rows.dones[:] = True
            self._episode += 1
            self._limit = self._host.spec.max_episode_steps
            self._start()

    def _start(self) -> None:
        self._steps = 0
        self._host.start(episode_seed(self._seed, self._env, self._episode), self._rows)


def nearest(key: str, known: list[str]) -> str:
    """The mend for a key that is not known: the closest known one first."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    return f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"


def action_names(space: Any, names: Any, owner: str) -> tuple[str, ...]:
    """One name per action of a Discrete space: the env's own `action_names`, or action_0, action_1, ..."""
    if not hasattr(space, "n"):
        raise ConfigError(f"{owner} has the action space {space}; use an env with Discrete actions")
    count = int(space.n)
    if names is None:
        return tuple(f"action_{number}" for number in range(count))
    if len(names) != count:
        raise ConfigError(f"{owner} names {len(names)} actions, its action space has {count}; name each action once")
    return tuple(str(name) for name in names)


def seat_roles(roles: Any, num_agents: int, owner: str) -> tuple[str, ...]:
    """One role per seat, as `EnvSpec.roles` has them: empty where there is no more than one."""
    roles = tuple(str(role) for role in roles)
    if roles and len(roles) != num_agents:
        raise ConfigError(f"{owner} has {num_agents} agents and {len(roles)} roles; give each agent one")
    return roles if len(set(roles)) > 1 else ()


def vector_space(size: int, names: Any, owner: str) -> ObservationSpace:
    """A vector space of `size` features: the env's own `feature_names`, or obs_0, obs_1, ..."""
    if names is None:
        names = [f"obs_{number}" for number in range(size)]
    if len(names) != size:
        raise ConfigError(f"{owner} names {len(names)} features, an observation has {size} numbers; name each once")
    return ObservationSpace(kind="vector", shape=(size,), features=tuple(str(name) for name in names))
