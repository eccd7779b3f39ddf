"""The step in blocks of rows: the same as all rows at once, whatever the buffers held before."""

from __future__ import annotations

import pytest
import torch

from dual_policy_plugin.policies import fast_step as step_module
from dual_policy_plugin.policies.fast_step import LstmLayer, Span, StepBuffers, fast_step, fitting_buffers
from dual_policy_plugin.policies.lstm import lstm_cell
from tests.policies.test_stacked import make_policy, make_rows


def make_layer(size: int, dtype: torch.dtype = torch.float32) -> LstmLayer:
    torch.manual_seed(1)
    return LstmLayer(weight=torch.randn(2 * size, 4 * size).to(dtype), bias=torch.randn(4 * size).to(dtype))


@pytest.mark.parametrize("is_in_place", [False, True])
def test_a_step_is_the_cells_formula(is_in_place: bool) -> None:
    layer = make_layer(8)
    encoded, state = torch.randn(5, 8), torch.randn(5, 16)
    hidden, cell = state.chunk(2, dim=1)
    gates = torch.cat([encoded.relu(), hidden], dim=1) @ layer.weight + layer.bias
    expected = torch.cat(lstm_cell(gates, cell), dim=1)
    buffers = StepBuffers(layer, 6)
    buffers.active.fill_(torch.nan)
    new_state = state if is_in_place else torch.empty_like(state)
    output = fast_step(encoded, state, [Span(layer, 0, 5)], buffers, new_state=new_state)
    torch.testing.assert_close(new_state, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(output, new_state[:, :8])


def test_a_saturated_cell_is_finite() -> None:
    layer = LstmLayer(weight=torch.full((16, 32), 1e30), bias=torch.zeros(32))
    state = torch.full((2, 16), -1e30)
    new_state = torch.empty_like(state)
    fast_step(torch.ones(2, 8), state, [Span(layer, 0, 2)], StepBuffers(layer, 2), new_state=new_state)
    assert new_state.isfinite().all()


def test_rows_in_several_blocks_are_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(0)
    obs, state = make_rows(50)
    before = state.clone()
    expected = policy.forward_step(obs, state)
    monkeypatch.setattr(step_module, "BLOCK_ROWS", 16)
    for one, other in zip(policy.forward_step(obs, state), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert torch.equal(state, before)


def test_buffers_are_kept_while_they_serve() -> None:
    layer = make_layer(8)
    buffers = fitting_buffers(None, layer, 16)
    assert fitting_buffers(buffers, layer, 16) is buffers
    assert fitting_buffers(buffers, layer, 7) is buffers
    assert len(fitting_buffers(buffers, layer, 17).inputs) == 17
    assert fitting_buffers(buffers, make_layer(8, torch.bfloat16), 7).inputs.dtype == torch.bfloat16
    elsewhere = LstmLayer(weight=layer.weight.to("meta"), bias=layer.bias.to("meta"))
    first = fitting_buffers(None, elsewhere, 4)
    assert fitting_buffers(first, elsewhere, 4) is not first  # a captured graph keeps its own
