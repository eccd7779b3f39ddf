"""GAE by hand: three steps, with an end, with a truncation, and lambda's two extremes."""

from __future__ import annotations

import torch

from dual_policy_plugin.learning.advantage import compute_gae


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values).unsqueeze(1)


def test_three_steps_by_hand() -> None:
    rewards, values = column(1.0, 0.0, 2.0), column(0.5, 1.0, 1.5)
    dones = torch.zeros(3, 1, dtype=torch.bool)
    # gamma 0.9, lambda 0.8:  delta_2 = 2 + 0.9 * 4 - 1.5 = 4.1;  delta_1 = 0 + 0.9 * 1.5 - 1 = 0.35
    # delta_0 = 1 + 0.9 * 1 - 0.5 = 1.4;  A_1 = 0.35 + 0.72 * 4.1 = 3.302;  A_0 = 1.4 + 0.72 * 3.302 = 3.77744
    advantages = compute_gae(rewards, values, dones, None, torch.tensor([4.0]), gamma=0.9, gae_lambda=0.8)
    torch.testing.assert_close(advantages, column(3.77744, 3.302, 4.1))


def test_a_termination_cuts_and_a_truncation_bootstraps() -> None:
    rewards, values = column(1.0, 0.0, 2.0), column(0.5, 1.0, 1.5)
    dones = torch.tensor([[False], [True], [False]])
    last = torch.tensor([4.0])
    # delta_1 = 0 + 0 - 1 = -1;  A_0 = 1.4 + 0.72 * -1 = 0.68
    ended = compute_gae(rewards, values, dones, torch.zeros(3, 1), last, gamma=0.9, gae_lambda=0.8)
    torch.testing.assert_close(ended, column(0.68, -1.0, 4.1))
    # truncated with V(final observation) = 3: delta_1 = 0 + 0.9 * 3 - 1 = 1.7;  A_0 = 1.4 + 0.72 * 1.7 = 2.624
    cut = compute_gae(rewards, values, dones, column(0.0, 3.0, 0.0), last, gamma=0.9, gae_lambda=0.8)
    torch.testing.assert_close(cut, column(2.624, 1.7, 4.1))


def test_lambda_one_is_the_return_and_lambda_zero_is_the_td_error() -> None:
    torch.manual_seed(0)
    rewards, values, last = torch.randn(6, 3), torch.randn(6, 3), torch.randn(3)
    dones = torch.zeros(6, 3, dtype=torch.bool)
    returns = compute_gae(rewards, values, dones, None, last, gamma=0.9, gae_lambda=1.0) + values
    expected = last
    for t in reversed(range(6)):
        expected = rewards[t] + 0.9 * expected
    torch.testing.assert_close(returns[0], expected)
    errors = compute_gae(rewards, values, dones, None, last, gamma=0.9, gae_lambda=0.0)
    torch.testing.assert_close(errors[2], rewards[2] + 0.9 * values[3] - values[2])
