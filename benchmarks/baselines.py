"""The two schemes that the bench compares ours with: how they act. What they share with ours is in `schemes.py`.

masked-both: every policy forwards all rows and a mask picks one result; all rows are stored; weights mask the loss.
policy-loop: one buffer of all rows; a Python loop forwards `obs[mask]` of one policy after the other and scatters the
results back; only learner rows are stored and trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dual_policy_plugin import rng
from dual_policy_plugin.policies.pool import Npc, zero_rows
from dual_policy_plugin.policies.sampling import sample_actions
from dual_policy_plugin.rollout.assignment import Assignment, assign
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy, RandomNumbers
from dual_policy_plugin.types import EnvSpec, StepResult, VecEnv


class Cast:
    """Which NPC plays in which env, drawn as NpcPool draws it; for the schemes that have no pool.

    Attributes:
        npc_of_env: (num_envs,) int64.
        policy_of_row: (num_envs * num_agents,) int64, 0 the learner, 1 + k NPC k.
    """

    def __init__(self, npcs: list[Npc], split: Assignment, num_envs: int, device: torch.device) -> None:
        self.npcs = npcs
        num_npcs = max(1, len(npcs))
        self.npc_of_env = (2 * torch.arange(num_envs, device=device) + 1) * num_npcs // (2 * num_envs)  # even shares
        self.probabilities = torch.full((num_npcs,), 1.0 / num_npcs, device=device)
        is_learner = torch.zeros(split.num_agents, dtype=torch.bool, device=device)
        is_learner[list(split.learner_seats)] = True
        self.is_learner_row = is_learner.repeat(num_envs)
        self.policy_of_row = torch.zeros(num_envs * split.num_agents, dtype=torch.int64, device=device)
        self._fill()

    def draw(self, episode_ends: Tensor, uniforms: Tensor) -> None:
        """New NPCs where an env's episode ended: both (num_envs,)."""
        if len(self.npcs) > 1:
            drawn = (uniforms.unsqueeze(1) >= self.probabilities.cumsum(0)[:-1]).sum(dim=1)
            self.npc_of_env.copy_(torch.where(episode_ends, drawn, self.npc_of_env))
            self._fill()

    def _fill(self) -> None:
        npc_of_row = self.npc_of_env.repeat_interleave(len(self.policy_of_row) // len(self.npc_of_env))
        self.policy_of_row.copy_((npc_of_row + 1).masked_fill(self.is_learner_row, 0))

    def numbers(self, split: Assignment, seed: int, first_step: int, num_steps: int) -> RandomNumbers:
        """What `ours` draws for the same seats, as numbers of all rows; `npc` is empty."""
        num_envs, device = len(self.npc_of_env), self.npc_of_env.device
        steps = torch.arange(first_step, first_step + num_steps, device=device).unsqueeze(1)

        def draw(purpose: int, per_env: int) -> Tensor:
            return rng.uniform(seed, purpose, steps, torch.arange(num_envs * per_env, device=device).unsqueeze(0))

        uniforms = torch.empty(num_steps, num_envs, split.num_agents, device=device)
        uniforms[:, :, list(split.learner_seats)] = draw(rng.ACTION_LEARNER, split.num_learner).unflatten(
            1, (num_envs, -1)
        )
        if split.num_npc:
            uniforms[:, :, list(split.npc_seats)] = draw(rng.ACTION_NPC, split.num_npc).unflatten(1, (num_envs, -1))
        return RandomNumbers(
            learner=uniforms.flatten(1), npc=uniforms.new_empty(num_steps, 0), draw=draw(rng.NPC_DRAW, 1)
        )


class MaskedBoth(MixedPolicy):
    """The learner and every NPC on the rows of all seats; a mask picks whose logits count.

    Attributes:
        npc_states: (num_npcs, num_envs * num_agents, state_size) float32.
    """

    def __init__(self, learner: nn.Module, npcs: list[nn.Module], cast: Cast, split: Assignment, spec: EnvSpec) -> None:
        super().__init__(learner, None, assign(spec.num_agents, 1.0), spec, cast.npc_of_env.device)
        self.npcs, self.cast, self.split = npcs, cast, split
        self.npc_states = self.learner_state.new_zeros(len(npcs), *self.learner_state.shape)

    @torch.no_grad()
    def act(self, learner_obs: Tensor, u_learner: Tensor, u_npc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As MixedPolicy.act, where the learner's rows are all rows."""
        logits, values, state = self.learner.forward_step(learner_obs, self.learner_state)
        self.learner_state.copy_(state)
        npc_logits = self.forward_npcs(learner_obs)
        if len(npc_logits) == 1:
            chosen = torch.where(self.cast.is_learner_row.unsqueeze(1), logits, npc_logits[0])
        elif npc_logits:
            every = torch.stack([logits, *npc_logits])  # (1 + num_npcs, rows, num_actions)
            index = self.cast.policy_of_row.view(1, -1, 1).expand(1, *logits.shape)
            chosen = every.gather(0, index).squeeze(0)
        else:
            chosen = logits
        actions = sample_actions(chosen, u_learner)
        self.actions.copy_(actions.view(self.num_envs, -1))
        return actions, logits, values

    def forward_npcs(self, obs: Tensor) -> list[Tensor]:
        """The logits (rows, num_actions) of every NPC for all rows; its states move on."""
        logits = []
        for npc, state in zip(self.npcs, self.npc_states, strict=True):
            one, _, after = npc.forward_step(obs, state)
            state.copy_(after)
            logits.append(one)
        return logits

    def end_step(self, result: StepResult, learner_dones: Tensor, u_draw: Tensor) -> None:
        """As MixedPolicy.end_step, for the states of all policies."""
        super().end_step(result, learner_dones, u_draw)
        for state in self.npc_states:
            zero_rows(state, learner_dones)
        self.cast.draw(result.episode_ends, u_draw)

    def random_numbers(self, seed: int, first_step: int, num_steps: int, *, first_env: int = 0) -> RandomNumbers:
        """As MixedPolicy.random_numbers, for all rows."""
        return self.cast.numbers(self.split, seed, first_step, num_steps)


class PolicyLoop(MixedPolicy):
    """What people write by hand: one buffer and one state of all rows, and a loop over policies with boolean masks.

    Attributes:
        all_obs: (num_envs * num_agents, *shape).
        state: (num_envs * num_agents, state_size) float32.
    """

    def __init__(self, learner: nn.Module, npcs: list[nn.Module], cast: Cast, split: Assignment, spec: EnvSpec) -> None:
        device, space, num_rows = cast.npc_of_env.device, spec.observation_space, spec.num_envs * spec.num_agents
        self.npcs, self.cast = npcs, cast
        self.state = torch.zeros(num_rows, learner.state_size, device=device)
        super().__init__(learner, None, split, spec, device)
        self.all_seats = torch.arange(spec.num_agents, device=device)
        self.all_obs = torch.zeros((num_rows, *space.shape), dtype=getattr(torch, space.dtype), device=device)
        self.npc_obs = self.all_obs[:0]  # no scratch of NPC rows: they are read from `all_obs`

    @property
    def learner_state(self) -> Tensor:
        """(num_envs * num_learner, state_size), a copy."""
        return self.state[self.cast.is_learner_row]

    @learner_state.setter
    def learner_state(self, value: Tensor) -> None:
        self.state[self.cast.is_learner_row] = value

    def observe(self, env: VecEnv, learner_obs: Tensor) -> None:
        """Has the env write all rows, and copies the learner's into `learner_obs`."""
        env.observe(self.all_seats, self.all_obs)
        learner_obs.copy_(self.all_obs[self.cast.is_learner_row])

    @torch.no_grad()
    def act(self, learner_obs: Tensor, u_learner: Tensor, u_npc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As MixedPolicy.act; `u_learner` are the numbers of all rows."""
        mask, table = self.cast.is_learner_row, self.actions.view(-1)
        logits, values, state = self.learner.forward_step(learner_obs, self.state[mask])
        self.state[mask] = state
        actions = sample_actions(logits, u_learner[mask])
        table[mask] = actions
        self.act_npcs(u_learner, table)
        return actions, logits, values

    def act_npcs(self, uniforms: Tensor, table: Tensor) -> None:
        """Fills the NPC rows of the action table (rows,), one policy after the other; their states move on."""
        for k, npc in enumerate(self.npcs):
            mask = self.cast.policy_of_row == k + 1
            if not mask.any():
                continue
            logits, _, state = npc.forward_step(self.all_obs[mask], self.state[mask])
            self.state[mask] = state
            table[mask] = sample_actions(logits, uniforms[mask])

    def end_step(self, result: StepResult, learner_dones: Tensor, u_draw: Tensor) -> None:
        """As MixedPolicy.end_step."""
        zero_rows(self.state, result.dones.flatten())
        self.cast.draw(result.episode_ends, u_draw)

    def random_numbers(self, seed: int, first_step: int, num_steps: int, *, first_env: int = 0) -> RandomNumbers:
        """As MixedPolicy.random_numbers, for all rows."""
        return self.cast.numbers(self.assignment, seed, first_step, num_steps)
