"""The fused twin of `collect_rollout`, for the arena and policies of one architecture: four to six kernels a step.

Takes the same objects and fills the same tensors. Nothing in it allocates in a step, syncs or asks the device, so that
the whole rollout can be recorded as one CUDA graph (`rollout/captured.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dual_policy_plugin.envs.arena import Arena
from dual_policy_plugin.experience import Experience
from dual_policy_plugin.policies.nets import FastPolicy
from dual_policy_plugin.policies.stacked import StackedPolicies
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy, RandomNumbers

if TYPE_CHECKING:  # a machine without a GPU has no Triton
    from dual_policy_plugin.kernels.group_rows import RowGroups


def why_not_fused(env: object, mixed: MixedPolicy) -> str:
    """What keeps a run from the fused kernels, in words for the log; empty: nothing does."""
    if not isinstance(env, Arena):
        return "the env is not the arena"
    policies = [mixed.learner, *(npc.policy for npc in (mixed.pool.npcs if mixed.pool else []))]
    if not all(StackedPolicies.fits(policy, mixed.learner) for policy in policies):
        return "learner and NPCs are not all `fast` policies of one size over a window"
    from dual_policy_plugin.kernels.policy_step import supports

    hidden, dtype, device = mixed.learner.hidden_size, mixed.learner.compute_dtype, mixed.actions.device
    if not supports(hidden, dtype, device):  # type: ignore[arg-type]
        return f"agent.hidden_size={hidden} in {dtype} is too large for the kernel on this device"
    return ""


class FusedPlay:
    """Plays rollouts with the fused kernels; what lives between them is the learner's place among the stacked weights.

    Attributes:
        policies: the learner's weights, packed anew at each rollout's start, then those of the pool's slots, which
            writes them where it is given others.
        groups: which NPC rows form a tile; None with one NPC, whose rows need no sorting.
    """

    def __init__(
        self,
        env: Arena,
        mixed: MixedPolicy,
        experience: Experience,
        metrics: EpisodeMetrics,
        *,
        tile: int | None = None,
    ) -> None:
        """Stacks the NPCs' weights; `tile` is the kernel's rows a program, its own choice by default."""
        from dual_policy_plugin.kernels.group_rows import allocate_row_groups
        from dual_policy_plugin.kernels.policy_step import TILE

        self.env, self.mixed, self.experience, self.metrics = env, mixed, experience, metrics
        self.tile = tile or TILE
        assert isinstance(mixed.learner, FastPolicy)
        npcs = mixed.pool.npcs if mixed.pool is not None else []
        self.policies = (
            StackedPolicies(mixed.learner, 1) if mixed.pool is None else mixed.pool.stack_behind(mixed.learner)
        )
        self.groups: RowGroups | None = None
        if len(npcs) > 1:
            self.groups = allocate_row_groups(
                num_envs=mixed.num_envs, num_npcs=len(npcs), rows_per_env=mixed.assignment.num_npc, tile=self.tile,
                device=mixed.actions.device,
            )  # fmt: skip

    @torch.no_grad()
    def __call__(self, numbers: RandomNumbers) -> None:
        """Plays `horizon` steps, as `collect_rollout` does."""
        from dual_policy_plugin.kernels.arena import observe_arena
        from dual_policy_plugin.kernels.end_step import end_step
        from dual_policy_plugin.kernels.group_rows import group_rows
        from dual_policy_plugin.kernels.policy_step import StepRows, policy_step

        env, mixed, experience, metrics, pool = self.env, self.mixed, self.experience, self.metrics, self.mixed.pool
        mixed.learner.pack()  # type: ignore[operator]
        self.policies.put(0, mixed.learner)
        experience.obs[0].copy_(experience.obs[-1])
        experience.initial_state.copy_(mixed.learner_state)
        for t in range(experience.horizon):
            if self.groups is not None and pool is not None:
                group_rows(pool.npc_of_env, self.groups)
            policy_step(
                self.policies,
                StepRows(
                    obs=experience.obs[t], state=mixed.learner_state, uniforms=numbers.learner[t],
                    seats=mixed.learner_seats,
                ),
                StepRows(obs=mixed.npc_obs, state=pool.state, uniforms=numbers.npc[t], seats=mixed.npc_seats)
                if pool is not None
                else None,
                self.groups,
                actions=mixed.actions,
                learner_actions=experience.actions[t],
                log_probs=experience.log_probs[t],
                values=experience.values[t],
                tile=self.tile,
            )  # fmt: skip
            result = env.step(mixed.actions)
            end_step(
                result,
                learner_seats=mixed.learner_seats,
                npc_seats=mixed.npc_seats,
                rewards=experience.rewards[t],
                dones=experience.dones[t],
                returns=metrics.returns,
                is_counting=metrics.is_counting,
                count_later=metrics.count_later,
                sums=metrics.sums,
                learner_state=mixed.learner_state,
                npc_state=pool.state if pool is not None else None,
                npc_of_env=pool.npc_of_env if pool is not None else None,
                probabilities=pool.probabilities if pool is not None else None,
                uniforms=numbers.draw[t],
            )
            if pool is None:
                observe_arena(env, mixed.learner_seats, experience.obs[t + 1])
            else:
                observe_arena(env, mixed.learner_seats, experience.obs[t + 1], mixed.npc_seats, mixed.npc_obs)
        _, last_values, _ = mixed.learner.forward_step(experience.obs[-1], mixed.learner_state)  # type: ignore[operator]
        experience.last_values.copy_(last_values)
