"""PettingZoo ParallelEnvs as hosts, and the ids of public ones that a config may name (`env.id`).

Seats are `possible_agents` in their order. Observations are Box, flattened to one float32 vector; an agent with fewer
numbers than the largest has zeros behind them. Actions are Discrete, equally many for all. An agent that is done or
has not joined leaves its seat empty: zeros for observations, weight 0, and whoever joins later starts with a zeroed
state. An agent that leaves without a flag counts as terminated. An episode ends when no agent is left.

An agent's role is its name without the number behind it (adversary_0, agent_0, agent_1).

Optional attributes of a user's env: `action_names`, `feature_names`, `max_episode_steps`, `roles` (of each seat; `()`
where all are equal, whatever their names), and `agents_leave = False` where all agents play to the end, which saves the
update its weights.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from typing import Any

import numpy as np

from dual_policy_plugin.config_checks import check
from dual_policy_plugin.envs.host import (
    DEFAULT_MAX_EPISODE_STEPS,
    HostSpec,
    Rows,
    action_names,
    nearest,
    seat_roles,
    vector_space,
)
from dual_policy_plugin.errors import ConfigError, EnvError

# id -> (module with parallel_env, whether agents leave before an episode's end)
PETTINGZOO_IDS: dict[str, tuple[str, bool]] = {
    "simple_adversary_v3": ("mpe2.simple_adversary_v3", False),
    "simple_crypto_v3": ("mpe2.simple_crypto_v3", False),
    "simple_formation_v1": ("mpe2.simple_formation_v1", False),
    "simple_line_v1": ("mpe2.simple_line_v1", False),
    "simple_push_v3": ("mpe2.simple_push_v3", False),
    "simple_reference_v3": ("mpe2.simple_reference_v3", False),
    "simple_spread_v3": ("mpe2.simple_spread_v3", False),
    "simple_tag_v3": ("mpe2.simple_tag_v3", False),
    "collect_treasure_v1": ("mpe2.collect_treasure_v1", False),
    "knights_archers_zombies_v11": ("pettingzoo.butterfly.knights_archers_zombies.knights_archers_zombies", True),
}


def make(index: int, *, id: str, kwargs: dict[str, Any] | None = None, max_episode_steps: int | None = None) -> Any:
    """The host of one public env by its id; `kwargs` go to its parallel_env."""
    del index
    module_name, agents_leave = PETTINGZOO_IDS[id]
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        package = "mpe2" if module_name.startswith("mpe2") else "'pettingzoo[butterfly]'"
        raise EnvError(f"env.id={id} cannot be imported ({error}); pip install {package}") from error
    kwargs = dict(kwargs or {})
    known = list(inspect.signature(module.raw_env.__init__).parameters)[1:]
    for key in kwargs:
        if key not in known:
            raise ConfigError(f"env.kwargs.{key} is no setting of {id}; {nearest(key, known)}")
    env, name = module.parallel_env(**kwargs), f"pettingzoo:{id}"
    return PettingZooHost(env, name, agents_leave=agents_leave, max_episode_steps=max_episode_steps)


def check_args(id: str | None = None, max_episode_steps: int = 1, kwargs: Any = None) -> None:
    """Raises a ConfigError unless `id` is one that may be named and the rest is possible."""
    if id is None:
        raise ConfigError(f"env.id is not set; use one of {', '.join(PETTINGZOO_IDS)}")
    if id not in PETTINGZOO_IDS:
        raise ConfigError(f"env.id={id} is no known PettingZoo env; {nearest(str(id), list(PETTINGZOO_IDS))}")
    is_count = type(max_episode_steps) is int and max_episode_steps > 0
    check(is_count, "env.max_episode_steps", max_episode_steps, "use a whole number above 0")
    check(kwargs is None or isinstance(kwargs, dict), "env.kwargs", kwargs, "use key: value pairs")


class PettingZooHost:
    """One ParallelEnv."""

    def __init__(
        self, env: Any, name: str, *, agents_leave: bool | None = None, max_episode_steps: int | None = None
    ) -> None:
        owner = f"env.name={name}"
        self._env = env
        self._agents = list(env.possible_agents)
        self._sizes = [_box_size(env.observation_space(agent), agent, owner) for agent in self._agents]
        spaces = [env.action_space(agent) for agent in self._agents]
        names = {
            agent: len(action_names(space, None, owner)) for agent, space in zip(self._agents, spaces, strict=True)
        }
        if len(set(names.values())) != 1:
            raise ConfigError(f"{owner} gives its agents different numbers of actions ({names}); use an env with one")
        self._first_actions = [int(getattr(space, "start", 0)) for space in spaces]
        if agents_leave is None:
            agents_leave = bool(getattr(env, "agents_leave", True))
        self.spec = HostSpec(
            num_agents=len(self._agents),
            observation_space=vector_space(max(self._sizes), getattr(env, "feature_names", None), owner),
            actions=action_names(spaces[0], getattr(env, "action_names", None), owner),
            max_episode_steps=max_episode_steps or _max_steps(env),
            has_weights=agents_leave,
            roles=seat_roles(_roles(env, self._agents), len(self._agents), owner),
        )
        self._is_seated = [False] * len(self._agents)

    def start(self, seed: int, rows: Rows) -> None:
        """Resets the env with `seed`."""
        observations, _ = self._env.reset(seed=seed)
        present = self._present()
        rows.observations[:] = 0
        for seat, agent in enumerate(self._agents):
            self._is_seated[seat] = agent in present
            if self._is_seated[seat]:
                self._show(rows.observations, seat, observations[agent])
        if not any(self._is_seated):
            raise EnvError("a PettingZoo env has no agent after reset; an episode needs at least one")

    def step(self, rows: Rows) -> bool:
        """Steps the agents that are there; True when none is left."""
        observations, rewards, terminations, truncations, _ = self._env.step(self._orders(rows))
        present = self._present()
        rows.observations[:] = 0
        for seat, agent in enumerate(self._agents):
            acted = self._is_seated[seat]
            terminated, truncated = bool(terminations.get(agent, False)), bool(truncations.get(agent, False))
            over = terminated or truncated or agent not in present
            reward = rewards.get(agent, 0)
            if reward and not acted:
                raise EnvError(
                    f"agent {agent} is paid {reward} in a step that it was not in; whoever waits for a turn stays in "
                    "`agents`, and an agent that leaves is paid in its last step"
                )
            rows.weights[seat] = acted
            rows.rewards[seat] = reward
            rows.dones[seat] = over or not acted
            rows.truncated[seat] = acted and truncated and not terminated
            self._is_seated[seat] = not over
            if rows.truncated[seat]:
                rows.final_observations[seat] = 0
                self._show(rows.final_observations, seat, observations[agent])
            if not over:
                self._show(rows.observations, seat, observations[agent])
        ended = not any(self._is_seated)
        if not (ended or self.spec.has_weights or all(self._is_seated)):
            raise EnvError("an agent left before the episode's end, but the env says agents_leave = False")
        return ended

    def count(self, rows: Rows) -> None:
        """No counters."""

    def close(self) -> None:
        """Closes the env."""
        self._env.close()

    def _orders(self, rows: Rows) -> dict[Any, int]:
        """Agent -> action, for the agents that are there."""
        seats = zip(self._agents, rows.actions.tolist(), self._first_actions, self._is_seated, strict=True)
        return {agent: action + first for agent, action, first, is_seated in seats if is_seated}

    def _present(self) -> set[Any]:
        present = set(self._env.agents)
        strangers = present.difference(self._agents)
        if strangers:
            raise EnvError(
                f"the agents {sorted(map(str, strangers))} are not in possible_agents; list every agent there"
            )
        return present

    def _show(self, where: Any, seat: int, observation: Any) -> None:
        where[seat, : self._sizes[seat]] = np.asarray(observation).reshape(-1)


def _roles(env: Any, agents: list[Any]) -> list[str]:
    """The role of each agent: as the env says, or by the agents' names."""
    roles = getattr(env, "roles", None)
    return [re.sub(r"_?\d+$", "", str(agent)) for agent in agents] if roles is None else list(roles)


def _box_size(space: Any, agent: Any, owner: str) -> int:
    if not (hasattr(space, "low") and hasattr(space, "high")):
        raise ConfigError(f"{owner}: agent {agent} observes {space}; use an env with Box observations")
    return math.prod(space.shape)


def _max_steps(env: Any) -> int:
    """The env's own bound of an episode, under one of the names in use, else a large one."""
    for name in ("max_episode_steps", "max_cycles", "max_steps"):
        value = getattr(env, name, None) or getattr(getattr(env, "unwrapped", env), name, None)
        if value:
            return int(value)
    return DEFAULT_MAX_EPISODE_STEPS
