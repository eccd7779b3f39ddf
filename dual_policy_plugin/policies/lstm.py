"""An LSTM over a segment whose episodes may end at any step, forward and backward written by hand.

Gate order i, f, o, g: the three sigmoids lie side by side. The input projection of all steps is one matrix product
outside; here is what must go step by step. Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def lstm_cell(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """One step: pre-activations gates (num_rows, 4 * hidden), cell (num_rows, hidden) -> hidden, cell (float32)."""
    hidden = cell.shape[1]
    i, f, o = gates[:, : 3 * hidden].sigmoid().chunk(3, dim=1)
    g = gates[:, 3 * hidden :].tanh()
    cell = torch.addcmul(i * g, f, cell)  # c' = f * c + i * g
    return o * cell.tanh(), cell


def lstm_segment_plain(gates_x: Tensor, weight_hh: Tensor, state: Tensor, dones: Tensor) -> Tensor:
    """The plain twin of `lstm_segment`: the same recurrence through autograd, step by step."""
    hidden, cell = state.chunk(2, dim=1)
    outputs = []
    for t in range(gates_x.shape[0]):
        hidden, cell = lstm_cell(gates_x[t] + hidden.to(weight_hh.dtype) @ weight_hh, cell)
        outputs.append(hidden)
        alive = (~dones[t]).unsqueeze(1)
        hidden, cell = hidden * alive, cell * alive
    return torch.stack(outputs).to(gates_x.dtype)


def _tanh(x: Tensor, wide: Tensor, one: Tensor, *, out: Tensor) -> None:
    """tanh(x) = 1 - 2 sigmoid(-2x), in float32: on a CPU torch's own tanh takes three to ten times as long.

    Args:
        x, out: (num_rows, hidden) of any dtype, possibly the same tensor.
        wide: (num_rows, hidden) float32, scratch.
        one: () float32, 1.
    """
    torch.mul(x, -2.0, out=wide).sigmoid_()
    torch.add(one, wide, alpha=-2.0, out=out)


class _LstmSegment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates_x: Tensor, weight_hh: Tensor, state: Tensor, alive: Tensor) -> Tensor:
        horizon, num_rows, width = gates_x.shape
        size = width // 4
        dtype = gates_x.dtype
        gates = torch.empty_like(gates_x)  # (horizon, num_rows, 4 * size): activated i, f, o, g
        cells = torch.empty(horizon + 1, num_rows, size, device=gates.device)  # [t]: c before step t, float32
        hiddens = torch.empty(horizon + 1, num_rows, size, dtype=dtype, device=gates.device)  # [t]: h before step t
        cell_tanh = torch.empty(horizon, num_rows, size, dtype=dtype, device=gates.device)
        outputs = torch.empty(horizon, num_rows, size, dtype=dtype, device=gates.device)
        hiddens[0] = state[:, :size]
        cells[0] = state[:, size:]
        wide = torch.empty(num_rows, size, device=gates.device)
        one = torch.ones((), device=gates.device)
        for t in range(horizon):
            step = gates[t]
            torch.addmm(gates_x[t], hiddens[t], weight_hh, out=step)
            sigmoids, g = step[:, : 3 * size], step[:, 3 * size :]
            sigmoids.sigmoid_()
            _tanh(g, wide, one, out=g)
            i, f, o = sigmoids.chunk(3, dim=1)
            cell = torch.mul(f, cells[t], out=cells[t + 1])  # c' = f * c + i * g
            cell.add_(torch.mul(i, g))
            _tanh(cell, wide, one, out=cell_tanh[t])
            torch.mul(o, cell_tanh[t], out=outputs[t])
            torch.mul(outputs[t], alive[t], out=hiddens[t + 1])
            cell.mul_(alive[t])
        ctx.save_for_backward(gates, weight_hh, cells, hiddens, cell_tanh, alive)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gates, weight_hh, cells, hiddens, cell_tanh, alive = ctx.saved_tensors
        horizon, num_rows, width = gates.shape
        size = width // 4
        dtype = gates.dtype
        grad_gates = torch.empty_like(gates)
        grad_hidden = torch.zeros(num_rows, size, dtype=dtype, device=gates.device)  # dL/dh' from the steps behind
        grad_cell = torch.zeros(num_rows, size, device=gates.device)  # dL/dc' from the steps behind, float32
        weight_t = weight_hh.t().contiguous()
        for t in reversed(range(horizon)):
            i, f, o, g = gates[t].chunk(4, dim=1)
            grad_i, grad_f, grad_o, grad_g = grad_gates[t].chunk(4, dim=1)
            grad_hidden.mul_(alive[t]).add_(grad_outputs[t])
            # dL/dc' = alive * (from behind) + dL/dh' * o * (1 - tanh(c')^2)
            grad_cell.mul_(alive[t]).add_(torch.ops.aten.tanh_backward(grad_hidden * o, cell_tanh[t]))
            torch.mul(grad_hidden, cell_tanh[t], out=grad_o)
            grad_c = grad_cell.to(dtype)
            torch.mul(grad_c, g, out=grad_i)
            grad_f.copy_(grad_cell * cells[t])
            torch.mul(grad_c, i, out=grad_g)
            grad_cell.mul_(f)
            step = grad_gates[t]
            sigmoids, tanhs = step[:, : 3 * size], step[:, 3 * size :]
            sigmoids.copy_(torch.ops.aten.sigmoid_backward(sigmoids, gates[t][:, : 3 * size]))
            tanhs.copy_(torch.ops.aten.tanh_backward(tanhs, g))
            torch.mm(step, weight_t, out=grad_hidden)
        grad_weight = hiddens[:-1].flatten(0, 1).t() @ grad_gates.flatten(0, 1)
        return grad_gates, grad_weight, None, None


class _FusedLstmSegment(torch.autograd.Function):
    """The fused twin of `_LstmSegment`: one launch forward, one backward."""

    @staticmethod
    def forward(ctx: Any, gates_x: Tensor, weight_hh: Tensor, state: Tensor, dones: Tensor) -> Tensor:
        from dual_policy_plugin.kernels.lstm import lstm_forward  # a machine without a GPU has no Triton

        outputs, gates, cells, hiddens = lstm_forward(gates_x, weight_hh, state, dones)
        ctx.save_for_backward(gates, weight_hh, cells, hiddens, dones)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        from dual_policy_plugin.kernels.lstm import lstm_backward

        gates, weight_hh, cells, hiddens, dones = ctx.saved_tensors
        grad_gates = lstm_backward(grad_outputs, gates, weight_hh, cells, dones)
        grad_weight = hiddens.flatten(0, 1).t() @ grad_gates.flatten(0, 1)
        return grad_gates, grad_weight, None, None


def lstm_segment(
    gates_x: Tensor, weight_hh: Tensor, state: Tensor, dones: Tensor, *, use_kernels: bool = False
) -> Tensor:
    """Hidden outputs of every step of a segment; h and c are zeroed after a step that ended the episode.

    No gradient flows into `state`: a segment starts from the state that the rollout had (truncated backpropagation).

    Args:
        gates_x: (horizon, num_rows, 4 * size) input projections with bias, float32 or bfloat16.
        weight_hh: (size, 4 * size), same dtype.
        state: (num_rows, 2 * size) float32, h and c before the first step.
        dones: (horizon, num_rows) bool.
        use_kernels: whether to run the Triton kernels; `kernels.lstm.supports` says for which sizes there are some.

    Returns:
        (horizon, num_rows, size) in the dtype of gates_x.
    """
    result: Tensor
    if use_kernels:
        result = _FusedLstmSegment.apply(gates_x, weight_hh, state, dones)  # type: ignore[no-untyped-call]
        return result
    alive = (~dones).to(gates_x.dtype).unsqueeze(-1)
    result = _LstmSegment.apply(gates_x, weight_hh, state, alive)  # type: ignore[no-untyped-call]
    return result
