"""The run's NPCs: frozen policies in slots, which of them plays in which env, and their recurrent states.

Takes NPC observations; gives NPC actions. An env keeps its NPC for a whole episode: a new one is drawn where an episode
ended, and the state is zeroed there. A slot may be empty, and be given a policy while the run goes on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dual_policy_plugin import matchmaking
from dual_policy_plugin.matchmaking import Record
from dual_policy_plugin.policies.binding import BoundPolicy
from dual_policy_plugin.policies.nets import FastPolicy
from dual_policy_plugin.policies.sampling import most_likely_actions, sample_actions
from dual_policy_plugin.policies.stacked import TILE, SortedRows, StackedPolicies, sort_rows
from dual_policy_plugin.pool_config import MatchmakingConfig


@dataclass(kw_only=True, slots=True, frozen=True)
class Npc:
    """One frozen policy of a pool."""

    name: str
    """Empty: a slot that no NPC has yet; the policy there has some weights, and plays nowhere."""
    policy: nn.Module
    """In eval mode, without gradients, packed."""
    is_greedy: bool = False
    """Takes its most likely action instead of drawing one."""


def empty_slots(policy: nn.Module, num_slots: int) -> list[Npc]:
    """Slots for NPCs of the kind of `policy`: frozen copies of it, which `NpcPool.put` overwrites.

    Args:
        policy: as its env sees it; to be copied before its parameters become views of one tensor.
        num_slots: how many.
    """
    copies = [copy.deepcopy(policy).eval().requires_grad_(False) for _ in range(num_slots)]
    for one in copies:
        one.pack()  # type: ignore[operator]
    return [Npc(name="", policy=one) for one in copies]


class NpcPool:
    """K slots of frozen policies that act for the NPC rows of all envs.

    `npc_of_env`, `probabilities`, `state` and the policies' weights are written in place and never replaced: views of
    them, and a captured graph, stay right.

    On the CPU, rows are sorted by NPC, and each NPC runs on its own rows: all in one grouped step where they are `fast`
    policies of one size over a window, else in one call each; a slot without rows costs nothing. On a GPU, where no
    shape may depend on who plays where, each slot, an empty one too, runs on all rows, K times the work of one; the
    fused rollout does without that.

    Attributes:
        npcs: what is in the slots; one list for this pool, its parts and its siblings.
        npc_of_env: (num_envs,) int64, which NPC plays there until the episode ends; -1 where none plays.
        probabilities: (K,) float32, what the next NPC is drawn with, see `set_probabilities`.
        state: (num_envs * num_npc, max state size) float32, zeros at an episode's start.
    """

    def __init__(
        self,
        npcs: Sequence[Npc],
        *,
        num_envs: int,
        num_npc: int,
        device: torch.device,
        first_env: int = 0,
        all_envs: int | None = None,
    ) -> None:
        """Fills the slots; all NPCs there are have equal probabilities.

        `first_env` is the number of the first env here among `all_envs`, those of all ranks (None: these are all).
        """
        self._first_env, self._all_envs = first_env, num_envs if all_envs is None else all_envs
        self.npcs = list(npcs)
        self.num_npc = num_npc
        self._state_sizes = [int(npc.policy.state_size) for npc in self.npcs]  # type: ignore[arg-type]
        self.state = torch.zeros(num_envs * num_npc, max(self._state_sizes), device=device)
        self._stacks: list[tuple[int, StackedPolicies]] = []  # (place of slot 0, stack); shared as `npcs` is
        self._stack = _stack(self.npcs) if device.type == "cpu" else None
        if self._stack is not None:
            self._stacks.append((0, self._stack))
        self._rows: SortedRows | None = None
        self._changing = [k for k, npc in enumerate(self.npcs) if not npc.name]
        self.npc_of_env = torch.full((num_envs,), -1, device=device)
        self.probabilities = torch.zeros(len(self.npcs), device=device)
        filled = [k for k, npc in enumerate(self.npcs) if npc.name]
        if filled:
            equal = matchmaking.probabilities([Record()] * len(filled), [1.0] * len(filled), MatchmakingConfig())
            shares = dict(zip(filled, equal, strict=True))
            self.set_probabilities([shares.get(k, 0.0) for k in range(len(self.npcs))])
            self.start_episodes()

    def with_seats(self, num_npc: int) -> NpcPool:
        """A pool for another number of NPC agents per env that has everything in common with this one but the states:
        one of the two plays at a time, from `start_episodes` on."""
        sibling = copy.copy(self)
        sibling.num_npc, sibling._rows = num_npc, None
        sibling.state = self.state.new_zeros(len(self.npc_of_env) * num_npc, self.state.shape[1])
        return sibling

    def part(self, envs: slice) -> NpcPool:
        """The same NPCs over some of the envs: who plays where, and the states, are views of this pool's."""
        part = copy.copy(self)
        part.npc_of_env = self.npc_of_env[envs]
        part.state = self.state[envs.start * self.num_npc : envs.stop * self.num_npc]
        return part

    def set_probabilities(self, shares: Sequence[float]) -> None:
        """What the next NPC of an env is drawn with, by slot; 0 for one that is to play no more.

        Args:
            shares: as `matchmaking.probabilities` rounds them: their partial sums are exact in float32, so that a slot
                with the share 0 is never drawn.
        """
        assert sum(shares) == 1.0, f"{shares} do not sum to 1"
        assert all(npc.name for npc, share in zip(self.npcs, shares, strict=True) if share > 0), "nobody would play"
        self.probabilities.copy_(torch.tensor(shares))

    def start_episodes(self) -> None:
        """New episodes in all envs: states zeroed, the NPCs spread over the envs in the order of the slots.

        Env e of all ranks' takes the slot whose part of the probabilities' sum holds (e + 1/2) / all_envs.
        """
        first, count = self._first_env, len(self.npc_of_env)
        self.state.zero_()
        middles = (torch.arange(first, first + count, device=self.state.device) + 0.5) / self._all_envs
        self.npc_of_env.copy_(self._drawn(middles))

    def end_episodes(self) -> None:
        """No env plays any NPC, until `start_episodes`: all agents learn."""
        self.npc_of_env.fill_(-1)

    def live(self) -> Tensor:
        """(K,) int64: how many envs play each NPC now."""
        slots = torch.arange(len(self.npcs), device=self.npc_of_env.device)
        return (self.npc_of_env.unsqueeze(1) == slots).sum(dim=0)

    @torch.no_grad()
    def put(self, k: int, name: str, weights: Mapping[str, Tensor]) -> None:
        """Gives slot k, which no env plays, another policy of its kind.

        Args:
            k: the slot.
            name: of the NPC that it holds from now on.
            weights: the policy's state dict, as its checkpoint has it.
        """
        assert k in self._changing, f"slot {k} belongs to an NPC of the config"
        assert not bool((self.npc_of_env == k).any()), f"slot {k} is still played"
        npc = self.npcs[k] = replace(self.npcs[k], name=name)
        own = self.weights(k)
        assert own.keys() == weights.keys(), "another kind of policy"
        for key, tensor in own.items():
            tensor.copy_(weights[key])
        npc.policy.pack()  # type: ignore[operator]
        for first, stack in self._stacks:
            stack.put(first + k, npc.policy, is_greedy=npc.is_greedy)

    def clear(self, k: int) -> None:
        """Makes slot k, which no env plays, an empty one."""
        self.npcs[k] = replace(self.npcs[k], name="")

    def weights(self, k: int) -> dict[str, Tensor]:
        """The state dict of slot k's net, without what binds it to the env: its own tensors, not copies."""
        policy = self.npcs[k].policy
        net = policy.policy if isinstance(policy, BoundPolicy) else policy
        return dict(net.state_dict())

    def stack_behind(self, like: FastPolicy) -> StackedPolicies:
        """The weights of all slots behind one place that is left to the caller; siblings have it in common.

        Args:
            like: what every NPC fits (`StackedPolicies.fits`).
        """
        for first, stack in self._stacks:
            if first == 1:
                return stack
        stack = StackedPolicies(like, 1 + len(self.npcs))
        for k, npc in enumerate(self.npcs):
            stack.put(1 + k, npc.policy, is_greedy=npc.is_greedy)
        self._stacks.append((1, stack))
        return stack

    def pack(self) -> None:
        """Packs the policies that may be put. Recorded with a rollout, it has each replay read what was put since."""
        for k in self._changing:
            self.npcs[k].policy.pack()  # type: ignore[operator]

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
            torch.where(episode_ends, self._drawn(uniforms), self.npc_of_env, out=self.npc_of_env)

    def _drawn(self, uniforms: Tensor) -> Tensor:
        """The slot whose part of the probabilities' sum holds each number; (num_numbers,) int64."""
        return (uniforms.unsqueeze(1) >= self.probabilities.cumsum(0)[:-1]).sum(dim=1)


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
