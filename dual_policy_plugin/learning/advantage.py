"""Generalized advantage estimation over the learner's segments. Takes Experience's columns; gives advantages."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor,
    final_values: Tensor | None,
    last_values: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    use_kernels: bool = False,
) -> Tensor:
    """Generalized advantage estimates, one column per segment (Schulman et al. 2016, eq. 16).

    Args:
        rewards, values: (horizon, num_rows) float32.
        dones: (horizon, num_rows) bool; True where step t ended the episode.
        final_values: (horizon, num_rows) float32; V(final observation) where step t truncated, else 0. None: all 0.
        last_values: (num_rows,) value of the observation after the last step.
        gamma: discount per step, in [0, 1].
        gae_lambda: in [0, 1].
        use_kernels: whether one Triton kernel does it, for contiguous tensors on a GPU.

    Returns:
        (horizon, num_rows) float32 advantages, not normalized.
    """
    if use_kernels:
        from dual_policy_plugin.kernels.gae import launch_gae

        return launch_gae(rewards, values, dones, final_values, last_values, gamma=gamma, gae_lambda=gae_lambda)
    horizon = rewards.shape[0]
    alive = (~dones).float()
    # V(s_{t+1}): of the next step where the episode goes on, of the final observation where it was truncated, else 0
    next_values = torch.cat([values[1:], last_values.unsqueeze(0)]) * alive
    if final_values is not None:
        next_values += final_values
    deltas = rewards + gamma * next_values - values  # delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)
    carry = alive * (gamma * gae_lambda)
    advantages = torch.empty_like(deltas)
    running = torch.zeros_like(last_values)
    for t in reversed(range(horizon)):
        running = torch.addcmul(deltas[t], carry[t], running)  # A_t = delta_t + gamma * lambda * A_{t+1}
        advantages[t] = running
    return advantages
