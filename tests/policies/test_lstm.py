"""The hand-written LSTM segment against its plain twin, with episode ends inside the segment."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dual_policy_plugin.policies.lstm import lstm_segment, lstm_segment_plain

HORIZON, ROWS, SIZE = 24, 10, 16


def run(segment: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gates = torch.randn(HORIZON, ROWS, 4 * SIZE, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(SIZE, 4 * SIZE, generator=generator) * 0.3).to(dtype).requires_grad_()
    state = torch.randn(ROWS, 2 * SIZE, generator=generator) * 0.3
    dones = torch.rand(HORIZON, ROWS, generator=generator) < 0.1
    assert dones[1:-1].any()
    outputs = segment(gates, weight, state, dones)
    (outputs.float() * torch.linspace(-1, 1, SIZE)).sum().backward()
    assert gates.grad is not None
    assert weight.grad is not None
    return outputs.detach(), gates.grad, weight.grad


def test_agrees_with_plain_twin_in_float32() -> None:
    for fused, plain in zip(run(lstm_segment, torch.float32), run(lstm_segment_plain, torch.float32), strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_near_float32() -> None:
    for fused, plain in zip(run(lstm_segment, torch.bfloat16), run(lstm_segment_plain, torch.float32), strict=True):
        scale = plain.abs().max()
        assert float((fused.float() - plain).abs().max() / scale) < 0.03


@pytest.mark.parametrize("segment", [lstm_segment, lstm_segment_plain])
def test_nothing_passes_an_episode_end(segment: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    gates = torch.randn(6, 1, 4 * SIZE, requires_grad=True)
    weight = torch.randn(SIZE, 4 * SIZE)
    dones = torch.zeros(6, 1, dtype=torch.bool)
    dones[2] = True
    state = torch.randn(1, 2 * SIZE)
    outputs = segment(gates, weight, state, dones)
    fresh = segment(gates.detach()[3:], weight, torch.zeros(1, 2 * SIZE), dones[3:])
    torch.testing.assert_close(outputs[3:].detach(), fresh, rtol=0, atol=0)
    outputs[3:].sum().backward()
    assert gates.grad is not None
    assert gates.grad[:3].abs().max() == 0
    assert gates.grad[3:].abs().max() > 0
