"""The run's NPCs: frozen policies, which of them plays in which env, and their recurrent states.

Takes NPC observations; gives NPC actions. An env keeps its NPC for a whole episode: a new one is drawn where an episode
ended, and the state is zeroed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dual_policy_plugin.policies.sampling import sample_actions


@dataclass(kw_only=True, slots=True, frozen=True)
class Npc:
    """One frozen policy of a pool."""

    name: str
    policy: nn.Module
    """In eval mode, without gradients, packed."""
    is_greedy: bool = False
    """Takes its most likely action instead of drawing one."""


class NpcPool:
    """K frozen policies that act for the NPC rows of all envs.

    Attributes:
        npc_of_env: (num_envs,) int64, which NPC plays there until the episode ends.
        probabilities: (K,) float32, what the next NPC is drawn with; rewritten in place by the host.
        state: (num_envs * num_npc, max state size) float32, zeros at an episode's start.
    """

    def __init__(self, npcs: Sequence[Npc], *, num_envs: int, num_npc: int, device: torch.device) -> None:
        self.npcs = list(npcs)
        self.num_npc = num_npc
        self.npc_of_env = torch.arange(num_envs, device=device) % len(self.npcs)  # (num_envs,)
        self.probabilities = torch.full((len(self.npcs),), 1.0 / len(self.npcs), device=device)
        self._state_sizes = [int(npc.policy.state_size) for npc in self.npcs]  # type: ignore[arg-type]
        self.state = torch.zeros(num_envs * num_npc, max(self._state_sizes), device=device)

    @torch.no_grad()
    def act(self, obs: Tensor, uniforms: Tensor) -> Tensor:
        """Actions of all NPC rows; the states move on.

        Args:
            obs: (num_envs * num_npc, *shape), env-major.
            uniforms: (num_envs * num_npc,) float32 in [0, 1), the NPCs' own random stream.

        Returns:
            (num_envs * num_npc,) int64.
        """
        if len(self.npcs) == 1:
            actions, self.state = self._act_one(0, obs, self.state, uniforms)
            return actions
        actions = torch.empty_like(uniforms, dtype=torch.int64)
        npc_of_row = self.npc_of_env.repeat_interleave(self.num_npc)
        for k, size in enumerate(self._state_sizes):
            rows = (npc_of_row == k).nonzero().squeeze(1)
            if len(rows) > 0:
                actions[rows], state = self._act_one(k, obs[rows], self.state[rows, :size], uniforms[rows])
                self.state[rows, :size] = state
        return actions

    def _act_one(self, k: int, obs: Tensor, state: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        npc = self.npcs[k]
        logits, _, state = npc.policy.forward_step(obs, state)  # type: ignore[operator]
        return (logits.argmax(dim=1) if npc.is_greedy else sample_actions(logits, uniforms)), state

    def end_steps(self, dones: Tensor, episode_ends: Tensor, uniforms: Tensor) -> None:
        """Zeroes the states of rows that are done and draws a new NPC where an env's episode ended.

        Args:
            dones: (num_envs * num_npc,) bool.
            episode_ends: (num_envs,) bool.
            uniforms: (num_envs,) float32 in [0, 1).
        """
        self.state = self.state.masked_fill(dones.unsqueeze(1), 0.0)
        if len(self.npcs) > 1:
            drawn = (uniforms.unsqueeze(1) >= self.probabilities.cumsum(0)[:-1]).sum(dim=1)
            torch.where(episode_ends, drawn, self.npc_of_env, out=self.npc_of_env)
