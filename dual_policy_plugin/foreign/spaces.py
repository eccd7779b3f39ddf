"""Spaces of somebody else's env as ours, and their nets as policy files.

Takes a Box, a Discrete and an nn.Module; gives what policies are bound by, and a file that may be an NPC.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dual_policy_plugin.checkpoint import PolicyFile, encode_policy
from dual_policy_plugin.config_checks import check
from dual_policy_plugin.envs.host import action_names, vector_space
from dual_policy_plugin.errors import CheckpointError, ConfigError
from dual_policy_plugin.files import publish
from dual_policy_plugin.types import ObservationSpace


def save_policy(
    path: str | os.PathLike[str],
    module: nn.Module,
    *,
    agent: str,
    observation_space: Any,
    actions: Any,
    args: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Writes the weights of a net as a policy file, which may be an NPC later; a file that stands there is replaced.

    Args:
        path: ends in .safetensors.
        module: the net itself, not what torch.compile or DistributedDataParallel made of it.
        agent: name of its architecture: an installed entry point of the group dual_policy.policies, or what
            `DualPolicy.open(architectures=...)` will be told.
        observation_space: what one agent sees, as for `DualPolicy.open`.
        actions: likewise.
        args: what its architecture is called with, beyond the observation space and the actions; plain values.
        metadata: step, epoch, metrics by their names, ...; plain values, by which selectors choose.

    Returns:
        The path.

    Raises:
        CheckpointError: another suffix, a wrapped net, values that are not plain, weights that are not finite.
        ConfigError: no name, or a space that no policy is bound by.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: a policy file is named .safetensors; write to {path.with_suffix('.safetensors')}"
        )
    check(isinstance(agent, str) and agent != "", "agent", agent, "use the name of the net's architecture")
    if hasattr(module, "_orig_mod") or isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise CheckpointError(
            f"{path}: {type(module).__name__} wraps a net and gives its weights other names; pass the net itself"
        )
    space, _ = as_space(observation_space)
    file = PolicyFile(
        architecture=agent,
        args=args or {},
        observation_space=space,
        actions=action_names_of(actions),
        tensors=module.state_dict(),
        metadata={"step": 0, "epoch": 0} | (metadata or {}),
    )
    data = encode_policy(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    publish(path, data)
    return path


def as_space(space: Any) -> tuple[ObservationSpace, tuple[int, ...]]:
    """The space that policies know, and the shape of an agent's observation in the env."""
    if isinstance(space, ObservationSpace):
        return space, space.shape
    if not (hasattr(space, "low") and hasattr(space, "high")):
        raise ConfigError(f"observation_space={space} is not possible; use one agent's Box, or an ObservationSpace")
    shape = tuple(int(size) for size in space.shape)
    return vector_space(torch.Size(shape).numel(), None, "observation_space"), shape


def action_names_of(actions: Any) -> tuple[str, ...]:
    """The names of the actions."""
    if isinstance(actions, int | np.integer):
        check(int(actions) > 0, "actions", actions, "use the number of actions, a Discrete, or names")
        return tuple(f"action_{number}" for number in range(actions))
    if isinstance(actions, Sequence) and not isinstance(actions, str):
        is_named = all(isinstance(name, str) and name for name in actions)
        is_right = is_named and len(set(actions)) == len(actions) > 0
        check(is_right, "actions", actions, "give each a name of its own, or pass the number of actions")
        return tuple(actions)
    names = action_names(actions, None, "your env")
    start = int(getattr(actions, "start", 0))
    check(start == 0, "actions", actions, "NPCs number actions from 0; pass the number of actions, and add the start")
    return names
