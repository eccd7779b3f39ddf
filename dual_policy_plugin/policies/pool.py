"""The run's NPCs: frozen policies, which of them plays in which env, and their recurrent states.

Takes NPC observations; gives NPC actions. An env keeps its NPC for a whole episode: a new one is drawn where an episode
ended, and the state is zeroed there.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dual_policy_plugin.policies.nets import FastPolicy
from dual_policy_plugin.policies.sampling import most_likely_actions, sample_actions
from dual_policy_plugin.policies.stacked import TILE, SortedRows, StackedPolicies, sort_rows


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

    `npc_of_env`, `probabilities` and `state` are written in place and never replaced: views of them, and a captured
    graph, stay right.

    On the CPU, rows are sorted by NPC, and each NPC runs on its own rows: all in one grouped step where they are `fast`
    policies of one size over a window, else in one call each. On a GPU, where no shape may depend on who plays where,
    each NPC runs on all rows, K times the work of one; the fused rollout does without that.

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
        self._stack = _stack(self.npcs) if device.type == "cpu" else None
        self._rows: SortedRows | None = None

    def part(self, envs: slice) -> NpcPool:
        """The same NPCs over some of the envs: who plays where, and the states, are views of this pool's."""
        part = copy.copy(self)
        part.npc_of_env = self.npc_of_env[envs]
        part.state = self.state[envs.start * self.num_npc : envs.stop * self.num_npc]
        return part

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
            return self._act_one(0, obs, self.state, uniforms)
        return self._act_sorted(obs, uniforms) if obs.device.type == "cpu" else self._act_all(obs, uniforms)

    def _act_one(self, k: int, obs: Tensor, state: Tensor, uniforms: Tensor) -> Tensor:
        """One NPC on all the rows given; `state` (num_rows, its state size) is overwritten."""
        npc = self.npcs[k]
        logits, _, new_state = npc.policy.forward_step(obs, state)  # type: ignore[operator]
        state.copy_(new_state)
        return most_likely_actions(logits) if npc.is_greedy else sample_actions(logits, uniforms)

    def _act_sorted(self, obs: Tensor, uniforms: Tensor) -> Tensor:
        """Each NPC on its own rows, which lie side by side."""
        if self._rows is None or not torch.equal(self._rows.policy_of_env, self.npc_of_env):
            tile = 1 if self._stack is None else TILE
            self._rows = sort_rows(self.npc_of_env, len(self.npcs), rows_per_env=self.num_npc, tile=tile)
        rows = self._rows
        uniforms = uniforms.index_select(0, rows.row_of_slot)
        if self._stack is None:
            obs, state = obs.index_select(0, rows.row_of_slot), self.state.index_select(0, rows.row_of_slot)
            parts = [
                self._act_one(k, obs[start:stop], state[start:stop, : self._state_sizes[k]], uniforms[start:stop])
                for k, start, stop in rows.bounds
            ]
            actions = torch.cat(parts)
        else:
            outputs, state = self._stack.step(obs, self.state, rows)
            logits = outputs[:-1].t()
            actions = sample_actions(logits, uniforms)
            for k, start, stop in rows.bounds:
                if self.npcs[k].is_greedy:
                    actions[start:stop] = most_likely_actions(logits[start:stop])
        torch.index_select(state, 0, rows.slot_of_row, out=self.state)
        return actions.index_select(0, rows.slot_of_row)

    def _act_all(self, obs: Tensor, uniforms: Tensor) -> Tensor:
        """Each NPC on all rows, and a choice among the results: the shapes do not depend on who plays where."""
        npc_of_row = self.npc_of_env.repeat_interleave(self.num_npc, output_size=len(uniforms))
        actions = torch.zeros_like(uniforms, dtype=torch.int64)
        for k, size in enumerate(self._state_sizes):
            is_theirs, own = npc_of_row == k, self.state[:, :size]
            state = own.clone()
            torch.where(is_theirs, self._act_one(k, obs, state, uniforms), actions, out=actions)
            own.copy_(torch.where(is_theirs.unsqueeze(1), state, own))
        return actions

    def end_steps(self, dones: Tensor, episode_ends: Tensor, uniforms: Tensor) -> None:
        """Zeroes the states of rows that are done and draws a new NPC where an env's episode ended.

        Args:
            dones: (num_envs * num_npc,) bool.
            episode_ends: (num_envs,) bool.
            uniforms: (num_envs,) float32 in [0, 1).
        """
        zero_rows(self.state, dones)
        if len(self.npcs) > 1:
            drawn = (uniforms.unsqueeze(1) >= self.probabilities.cumsum(0)[:-1]).sum(dim=1)
            torch.where(episode_ends, drawn, self.npc_of_env, out=self.npc_of_env)


def zero_rows(state: Tensor, is_done: Tensor) -> None:
    """Zeroes in place the rows of `state` (num_rows, size) where `is_done` (num_rows,)."""
    if state.device.type == "cpu":  # few rows are done at a time: do not read and write the others
        state.index_fill_(0, is_done.nonzero().squeeze(1), 0.0)
    else:
        state.masked_fill_(is_done.unsqueeze(1), 0.0)


def _stack(npcs: Sequence[Npc]) -> StackedPolicies | None:
    """The NPCs' weights side by side; None for a single one, and where they do not fit each other."""
    first = npcs[0].policy
    if len(npcs) == 1 or not isinstance(first, FastPolicy):
        return None
    if not all(StackedPolicies.fits(npc.policy, first) for npc in npcs):
        return None
    stack = StackedPolicies(first, len(npcs))
    for k, npc in enumerate(npcs):
        stack.put(k, npc.policy, is_greedy=npc.is_greedy)
    return stack
