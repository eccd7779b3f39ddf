"""From whatever a user's `make` gave to a Host that a worker can step. Neither adapter imports its library."""

from __future__ import annotations

from typing import Any

from dual_policy_plugin.envs.host import Host
from dual_policy_plugin.envs.pettingzoo import PettingZooHost
from dual_policy_plugin.envs.puffer import PufferHost
from dual_policy_plugin.errors import ConfigError


def as_host(made: Any, name: str) -> Host:
    """The host of what a user's `make` gave: a Host itself, a PufferLib-style env or a PettingZoo ParallelEnv."""
    if hasattr(made, "single_observation_space"):
        return PufferHost(made, name)
    if hasattr(made, "agent_selection"):
        raise ConfigError(
            f"env.name={name} makes a turn-based AECEnv; use its parallel_env, or pettingzoo.utils.aec_to_parallel"
        )
    if hasattr(made, "possible_agents"):
        return PettingZooHost(made, name)
    if hasattr(made, "spec") and hasattr(made, "start") and hasattr(made, "count"):
        host: Host = made
        return host
    raise ConfigError(
        f"env.name={name} makes a {type(made).__name__}; return a PettingZoo ParallelEnv (possible_agents, reset, "
        "step) or a PufferLib-style env (single_observation_space, num_agents, reset, step)"
    )
