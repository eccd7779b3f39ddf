"""The learner's experience of one rollout: allocated once, filled by the collector, read by the update.

Learner rows only; no NPC row and no NPC mask exists here. Time-major: a step's slot is contiguous, and the env writes
the learner's observations straight into it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dual_policy_plugin.types import EnvSpec


@dataclass(slots=True)
class Experience:
    """One segment of `horizon` steps for each of `num_rows` learner rows.

    obs: (horizon + 1, num_rows, *shape); the last slot is what follows the last step.
    actions: (horizon, num_rows) int64.
    log_probs, values, rewards: (horizon, num_rows) float32, as of the rollout.
    dones: (horizon, num_rows) bool, True where step t ended the episode.
    initial_state: (num_rows, state_size) float32, the learner's recurrent state before step 0.
    last_values: (num_rows,) float32, value of obs[horizon].
    final_values: (horizon, num_rows) float32, V(final observation) where step t truncated, else 0; None where the env
        never truncates.
    weights: (horizon, num_rows) float32, 1 where the agent acted; None where no seat is ever empty.
    """

    obs: Tensor
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    rewards: Tensor
    dones: Tensor
    initial_state: Tensor
    last_values: Tensor
    final_values: Tensor | None
    weights: Tensor | None

    @property
    def horizon(self) -> int:
        """Steps per segment."""
        return self.actions.shape[0]

    @property
    def num_rows(self) -> int:
        """Learner rows: num_envs * num_learner."""
        return self.actions.shape[1]

    def part(self, rows: slice) -> Experience:
        """The experience of some rows, as views."""
        return Experience(
            obs=self.obs[:, rows],
            actions=self.actions[:, rows],
            log_probs=self.log_probs[:, rows],
            values=self.values[:, rows],
            rewards=self.rewards[:, rows],
            dones=self.dones[:, rows],
            initial_state=self.initial_state[rows],
            last_values=self.last_values[rows],
            final_values=None if self.final_values is None else self.final_values[:, rows],
            weights=None if self.weights is None else self.weights[:, rows],
        )


def allocate_experience(
    spec: EnvSpec, *, horizon: int, num_rows: int, state_size: int, device: torch.device
) -> Experience:
    """Zeroed buffers for one rollout."""
    space = spec.observation_space
    shape = (horizon, num_rows)

    def floats() -> Tensor:
        return torch.zeros(shape, device=device)

    return Experience(
        obs=torch.zeros((horizon + 1, num_rows, *space.shape), dtype=getattr(torch, space.dtype), device=device),
        actions=torch.zeros(shape, dtype=torch.int64, device=device),
        log_probs=floats(),
        values=floats(),
        rewards=floats(),
        dones=torch.zeros(shape, dtype=torch.bool, device=device),
        initial_state=torch.zeros(num_rows, state_size, device=device),
        last_values=torch.zeros(num_rows, device=device),
        final_values=floats() if spec.has_truncation else None,
        weights=floats() if spec.has_weights else None,
    )


def experience_bytes(spec: EnvSpec, *, horizon: int, num_rows: int, state_size: int) -> int:
    """Bytes that `allocate_experience` takes.

    Per row-step: the observation, action 8, log-prob, value and reward 4 each, done 1, and 4 each for final values and
    weights where the env has them. Per row: one more observation, the state and the last value.
    """
    obs_bytes = _obs_bytes(spec)
    per_step = obs_bytes + 8 + 3 * 4 + 1 + 4 * spec.has_truncation + 4 * spec.has_weights
    return num_rows * (horizon * per_step + obs_bytes + 4 * state_size + 4)


def scratch_bytes(
    spec: EnvSpec,
    *,
    num_learner: int,
    num_npcs: int = 0,
    state_size: int,
    npc_state_size: int = 0,
    num_slots: int = 0,
) -> int:
    """Bytes that MixedPolicy and NpcPool hold beside the policies' weights, whatever the horizon.

    Per learner row: the state. Per NPC row: one observation and the state. Per row: the action, 8. Per seat 8, per NPC
    4, per env 8 for which NPC plays there. Where the rows of several NPCs are sorted: per slot two numbers of 8, per
    NPC row its slot, 8, per env 8 for what they were sorted by.

    Args:
        spec: the env.
        num_learner: learner agents per env; the others are NPCs.
        num_npcs: of the pool; 0 where all agents learn.
        state_size: float32 numbers of the learner's state.
        npc_state_size: of the largest NPC state.
        num_slots: NpcPool's slots for NPC rows sorted by NPC, each NPC's a multiple of its tile; 0 where it does not
            sort (one NPC, or on a GPU).
    """
    num_envs, num_agents = spec.num_envs, spec.num_agents
    learner_rows, npc_rows = num_envs * num_learner, num_envs * (num_agents - num_learner)
    size = learner_rows * 4 * state_size + npc_rows * _obs_bytes(spec) + 8 * (num_envs + 1) * num_agents
    if num_npcs:
        size += npc_rows * 4 * npc_state_size + 8 * num_envs + 4 * num_npcs
    if num_slots:
        size += 2 * 8 * num_slots + 8 * npc_rows + 8 * num_envs
    return size


def _obs_bytes(spec: EnvSpec) -> int:
    """Bytes of one observation."""
    space = spec.observation_space
    return math.prod(space.shape) * (4 if space.dtype == "float32" else 1)
