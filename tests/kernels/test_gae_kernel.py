"""The GAE kernel against the plain loop: ends, truncations, one step, one row, rows that fill no block."""

from __future__ import annotations

import pytest
import torch

from dual_policy_plugin.kernels.gae import BLOCK_ROWS
from dual_policy_plugin.learning.advantage import compute_gae


@pytest.mark.parametrize("has_final_values", [False, True])
@pytest.mark.parametrize(("horizon", "num_rows"), [(1, 1), (7, 5), (16, BLOCK_ROWS), (5, 2 * BLOCK_ROWS + 3)])
def test_kernel_and_loop_agree(horizon: int, num_rows: int, has_final_values: bool) -> None:
    generator = torch.Generator().manual_seed(horizon * num_rows)
    rewards, values, final_values = torch.randn(3, horizon, num_rows, generator=generator)
    dones = torch.rand(horizon, num_rows, generator=generator) < 0.2
    dones[:, 0], dones[-1, -1] = False, True  # a row without an end, a row that ends with the segment
    truncated = final_values * (dones & (torch.rand(horizon, num_rows, generator=generator) < 0.5))
    last = torch.randn(num_rows, generator=generator)
    columns = (rewards, values, dones, truncated if has_final_values else None, last)
    plain = compute_gae(*columns, gamma=0.97, gae_lambda=0.9)
    fused = compute_gae(*columns, gamma=0.97, gae_lambda=0.9, use_kernels=True)
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(fused, compute_gae(*columns, gamma=0.97, gae_lambda=0.8), atol=1e-3) or horizon == 1


def test_three_steps_by_hand() -> None:
    rewards, values = torch.tensor([[1.0], [0.0], [2.0]]), torch.tensor([[0.5], [1.0], [1.5]])
    dones, last = torch.tensor([[False], [True], [False]]), torch.tensor([4.0])
    final_values = torch.tensor([[0.0], [3.0], [0.0]])
    # gamma 0.9, lambda 0.8: delta_2 = 2 + 0.9 * 4 - 1.5 = 4.1;  delta_1 = 0 + 0.9 * 3 - 1 = 1.7
    # A_0 = 1 + 0.9 * 1 - 0.5 + 0.72 * 1.7 = 2.624
    fused = compute_gae(rewards, values, dones, final_values, last, gamma=0.9, gae_lambda=0.8, use_kernels=True)
    torch.testing.assert_close(fused, torch.tensor([[2.624], [1.7], [4.1]]))
