"""Learner and NPCs acting together: one action for every seat of every env, each row by its own policy and no other.

Takes the learner rows' and the NPC rows' observations; gives the action table that the env steps with.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dual_policy_plugin import rng
from dual_policy_plugin.policies.pool import NpcPool, zero_rows
from dual_policy_plugin.policies.sampling import sample_actions
from dual_policy_plugin.rollout.assignment import Assignment
from dual_policy_plugin.types import EnvSpec, StepResult, VecEnv


@dataclass(slots=True)
class RandomNumbers:
    """Uniform numbers in [0, 1) for a number of steps; the two policies' streams are apart."""

    learner: Tensor
    """(num_steps, num_envs * num_learner) float32."""
    npc: Tensor
    """(num_steps, num_envs * num_npc) float32."""
    draw: Tensor
    """(num_steps, num_envs) float32, for the choice of the next NPC."""

    def part(self, envs: slice) -> RandomNumbers:
        """The numbers of some envs, as views."""
        num_envs = self.draw.shape[1]
        return RandomNumbers(
            learner=self.learner[:, _rows_of(envs, self.learner.shape[1] // num_envs)],
            npc=self.npc[:, _rows_of(envs, self.npc.shape[1] // num_envs)],
            draw=self.draw[:, envs],
        )


def _rows_of(envs: slice, num_seats: int) -> slice:
    """The rows of some envs that have `num_seats` each."""
    return slice(envs.start * num_seats, envs.stop * num_seats)


class MixedPolicy:
    """The learner, the pool and the recurrent state of both, over the rows that an Assignment gives them.

    All tensors are written in place and never replaced: views of them, and a captured graph, stay right.

    Attributes:
        learner_state: (num_envs * num_learner, state_size) float32.
        npc_obs: (num_envs * num_npc, *shape), scratch that every step overwrites.
        actions: (num_envs, num_agents) int64, the table of the current step.
    """

    def __init__(
        self, learner: nn.Module, pool: NpcPool | None, assignment: Assignment, spec: EnvSpec, device: torch.device
    ) -> None:
        space = spec.observation_space
        self.learner, self.pool, self.assignment = learner, pool, assignment
        self.num_envs = spec.num_envs
        self.learner_seats = torch.tensor(assignment.learner_seats, device=device)
        self.npc_seats = torch.tensor(assignment.npc_seats, dtype=torch.int64, device=device)
        self.num_learner_rows = spec.num_envs * assignment.num_learner
        self.num_npc_rows = spec.num_envs * assignment.num_npc
        state_size: int = learner.state_size  # type: ignore[assignment]
        self.learner_state = torch.zeros(self.num_learner_rows, state_size, device=device)
        self.npc_obs = torch.zeros((self.num_npc_rows, *space.shape), dtype=getattr(torch, space.dtype), device=device)
        self.actions = torch.zeros(spec.num_envs, assignment.num_agents, dtype=torch.int64, device=device)

    def rows(self, envs: slice) -> slice:
        """The learner rows of some envs."""
        return _rows_of(envs, self.assignment.num_learner)

    def part(self, envs: slice) -> MixedPolicy:
        """The same policies over some of the envs: states, scratch and action table are views of this one's."""
        assert type(self) is MixedPolicy, f"{type(self).__name__} has no `part`: its further tensors would not be split"
        part = copy.copy(self)
        learner_rows, npc_rows = self.rows(envs), _rows_of(envs, self.assignment.num_npc)
        part.pool = None if self.pool is None else self.pool.part(envs)
        part.learner_state, part.npc_obs = self.learner_state[learner_rows], self.npc_obs[npc_rows]
        part.actions = self.actions[envs]
        part.num_envs = len(part.actions)
        part.num_learner_rows, part.num_npc_rows = len(part.learner_state), len(part.npc_obs)
        return part

    def start_episodes(self) -> None:
        """Zeroes the recurrent states of all rows: every env starts a new episode."""
        self.learner_state.zero_()
        if self.pool is not None:
            self.pool.start_episodes()

    def observe(self, env: VecEnv, learner_obs: Tensor) -> None:
        """Has the env write the learner rows into `learner_obs` and the NPC rows into the scratch buffer."""
        env.observe(self.learner_seats, learner_obs)
        if self.pool is not None:
            env.observe(self.npc_seats, self.npc_obs)

    @torch.no_grad()
    def act(self, learner_obs: Tensor, u_learner: Tensor, u_npc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fills `actions` for one step; gives the learner's actions, logits and values.

        Args:
            learner_obs: (num_envs * num_learner, *shape).
            u_learner: (num_envs * num_learner,) uniform numbers.
            u_npc: (num_envs * num_npc,) uniform numbers.

        Returns:
            actions (rows,) int64, logits (rows, num_actions), values (rows,).
        """
        logits, values, state = self.learner.forward_step(learner_obs, self.learner_state)  # type: ignore[operator]
        self.learner_state.copy_(state)
        actions = sample_actions(logits, u_learner)
        self.actions.index_copy_(1, self.learner_seats, actions.view(self.num_envs, -1))
        if self.pool is not None:
            npc_actions = self.pool.act(self.npc_obs, u_npc)
            self.actions.index_copy_(1, self.npc_seats, npc_actions.view(self.num_envs, -1))
        return actions, logits, values

    def end_step(self, result: StepResult, learner_dones: Tensor, u_draw: Tensor) -> None:
        """Zeroes the recurrent states of rows whose episode ended; draws new NPCs where an env's did."""
        zero_rows(self.learner_state, learner_dones)
        if self.pool is not None:
            npc_dones = result.dones.index_select(1, self.npc_seats).flatten()
            self.pool.end_steps(npc_dones, result.episode_ends, u_draw)

    def random_numbers(self, seed: int, first_step: int, num_steps: int, *, first_env: int = 0) -> RandomNumbers:
        """The uniform numbers of steps first_step ... first_step + num_steps - 1, a hash of seed, step and row."""
        device = self.actions.device
        steps = torch.arange(first_step, first_step + num_steps, device=device).unsqueeze(1)
        first = first_env * self.assignment.num_learner

        def rows(count: int, start: int) -> Tensor:
            return torch.arange(start, start + count, device=device).unsqueeze(0)

        return RandomNumbers(
            learner=rng.uniform(seed, rng.ACTION_LEARNER, steps, rows(self.num_learner_rows, first)),
            npc=rng.uniform(seed, rng.ACTION_NPC, steps, rows(self.num_npc_rows, first_env * self.assignment.num_npc)),
            draw=rng.uniform(seed, rng.NPC_DRAW, steps, rows(self.num_envs, first_env)),
        )
