"""gather_sum against its plain twin, over more rows than one block."""

from __future__ import annotations

import pytest
import torch

from dual_policy_plugin.policies.gather_sum import BLOCK_ROWS, gather_sum, gather_sum_plain


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_agrees_with_plain_twin(index_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    num_rows, num_terms, table_rows, width = BLOCK_ROWS + 77, 9, 40, 8
    index = torch.randint(0, table_rows, (num_rows, num_terms)).to(index_dtype)
    weights = torch.rand(num_rows, num_terms)
    grad = torch.randn(num_rows, width)
    results = []
    for function in (gather_sum, gather_sum_plain):
        table = torch.linspace(-1, 1, table_rows * width).view(table_rows, width).requires_grad_()
        output = function(index, weights, table)
        output.backward(grad)
        results.append((output.detach(), table.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-4)
