"""Generalized advantage estimation in one launch: the fused twin of the loop in `learning/advantage.py`."""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# ruff: noqa: N803 -- constants of a kernel are written in capitals

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 128
"""Rows that one program walks back through time; neighbours in memory, so every load of a step is one stretch."""


@triton.jit
def gae_kernel(
    rewards, values, dones, final_values, last_values, advantages, num_rows, gamma, decay,
    HORIZON: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """A_t = delta_t + decay * alive_t * A_{t+1}, from the last step to the first; the rows are independent."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = rows < num_rows
    running = tl.zeros((BLOCK_ROWS,), tl.float32)
    next_values = tl.load(last_values + rows, mask=is_row, other=0.0)
    at = tl.full((), HORIZON - 1, tl.int64) * num_rows + rows  # horizon * num_rows may pass 2^31
    for _ in range(HORIZON):
        alive = 1.0 - tl.load(dones + at, mask=is_row, other=1).to(tl.float32)
        bootstrap = next_values * alive
        if final_values is not None:
            bootstrap += tl.load(final_values + at, mask=is_row, other=0.0)
        step_values = tl.load(values + at, mask=is_row, other=0.0)
        # delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)
        delta = tl.load(rewards + at, mask=is_row, other=0.0) + gamma * bootstrap - step_values
        running = delta + alive * decay * running
        tl.store(advantages + at, running, mask=is_row)
        next_values = step_values
        at -= num_rows


def launch_gae(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor,
    final_values: Tensor | None,
    last_values: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Advantages as `learning.advantage.compute_gae` gives them, whose arguments it takes.

    Args:
        rewards, values: (horizon, num_rows) float32, contiguous.
        dones: (horizon, num_rows) bool, contiguous.
        final_values: (horizon, num_rows) float32, contiguous, or None: all 0.
        last_values: (num_rows,) float32.
        gamma: discount per step; fixed in a captured graph.
        gae_lambda: likewise.

    Returns:
        (horizon, num_rows) float32.
    """
    for tensor in (rewards, values, dones, last_values, final_values):
        assert tensor is None or tensor.is_contiguous()
    horizon, num_rows = rewards.shape
    advantages = torch.empty_like(values)
    gae_kernel[(triton.cdiv(num_rows, BLOCK_ROWS),)](
        rewards, values, dones, final_values, last_values, advantages, num_rows, gamma, gamma * gae_lambda,
        HORIZON=horizon, BLOCK_ROWS=BLOCK_ROWS,
    )  # fmt: skip
    return advantages
