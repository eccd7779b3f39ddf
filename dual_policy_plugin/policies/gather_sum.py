"""The first layer over tokens: a weighted sum of table rows, without a one-hot on the forward path.

`y[n] = sum_k weights[n, k] * table[index[n, k]]`. Forward gathers; backward is neither a scatter into the table nor a
materialised one-hot of the whole batch: blocks of rows are counted into a small dense matrix that stays in the cache,
and one matrix product per block adds its share of the table's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS = 1024  # with a thousand table rows a block is 4 MB: it stays in the last-level cache


def gather_sum_plain(index: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """The plain twin of `gather_sum`: gathers every row, weighs it and sums."""
    rows = table[index.long()]  # (num_rows, num_terms, width)
    return (rows * weights.unsqueeze(-1)).sum(dim=1)


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: Tensor, weights: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(index, weights)
        ctx.table_rows, ctx.dtype = table.shape[0], table.dtype
        return F.embedding_bag(index, table, mode="sum", per_sample_weights=weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        index, weights = ctx.saved_tensors
        num_rows = len(index)
        block = min(BLOCK_ROWS, num_rows)
        dense = torch.empty(block, ctx.table_rows, device=grad.device)  # (block, table_rows) float32
        table_grad = torch.zeros(ctx.table_rows, grad.shape[1], device=grad.device)
        for start in range(0, num_rows, block):
            rows = slice(start, start + block)
            part = index[rows]
            counts = dense[: len(part)].zero_()
            counts.scatter_add_(1, part.long(), weights[rows].float())
            # dL/dtable[r] = sum_n counts[n, r] * dL/dy[n]
            table_grad += counts.to(grad.dtype).t() @ grad[rows]
        return None, None, table_grad.to(ctx.dtype)


def gather_sum(index: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """Weighted sums of table rows, differentiable in `table`.

    Args:
        index: (num_rows, num_terms) int32 or int64, rows of the table.
        weights: (num_rows, num_terms) in the table's dtype.
        table: (table_rows, width) float32 or bfloat16.

    Returns:
        (num_rows, width) in the table's dtype.
    """
    result: Tensor = _GatherSum.apply(index, weights, table)  # type: ignore[no-untyped-call]
    return result
