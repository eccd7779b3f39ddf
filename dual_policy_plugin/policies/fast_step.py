"""One step of `fast` policies without gradients: encodings and states in, logits, values and new states out.

Takes what an encoder gave; used by FastPolicy for itself and by StackedPolicies for several of them at once. Rows are
worked through in blocks whose intermediate results stay in the cache, in buffers that are allocated once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ROWS = 1024


@dataclass(kw_only=True, slots=True, frozen=True)
class LstmLayer:
    """Packed in the compute dtype; H is the hidden size."""

    weight: Tensor
    """(2H, 4H): rows for x, then for h; columns i, f, o, g."""
    bias: Tensor
    """(4H,)."""


@dataclass(slots=True)
class Span:
    """Rows start ... stop - 1 of a block, which one policy plays."""

    lstm: LstmLayer
    start: int
    stop: int


class StepBuffers:
    """Scratch for a block of rows."""

    def __init__(self, lstm: LstmLayer, num_rows: int) -> None:
        two, four = lstm.weight.shape
        dtype, device = lstm.weight.dtype, lstm.weight.device
        self.inputs = torch.empty(num_rows, two, dtype=dtype, device=device)  # (num_rows, 2H): x, h
        self.gates = torch.empty(num_rows, four, dtype=dtype, device=device)  # (num_rows, 4H)
        # activated gates, float32
        self.active = self.gates if dtype == torch.float32 else torch.empty(num_rows, four, device=device)
        self.product = torch.empty(num_rows, two // 2, device=device)  # (num_rows, H) float32


def fitting_buffers(buffers: StepBuffers | None, lstm: LstmLayer, num_rows: int) -> StepBuffers:
    """`buffers` if they serve for `num_rows` rows of such a layer, else new ones.

    On a GPU always new ones: a captured graph keeps those it was recorded with, and they must stay its own.
    """
    if buffers is not None:
        mine, theirs = buffers.inputs, lstm.weight
        fits = (mine.dtype, mine.device) == (theirs.dtype, theirs.device) and len(mine) >= num_rows
        if fits and mine.device.type == "cpu":
            return buffers
    return StepBuffers(lstm, num_rows)


def row_blocks(num_rows: int, device: torch.device) -> Iterator[slice]:
    """Blocks of rows: on the CPU of a size that suits its caches, elsewhere all rows at once."""
    size = BLOCK_ROWS if device.type == "cpu" else max(num_rows, 1)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def fast_step(
    encoded: Tensor, state: Tensor, spans: Sequence[Span], buffers: StepBuffers, *, new_state: Tensor
) -> Tensor:
    """One step of a block of rows.

    Args:
        encoded: (num_rows, H) in the compute dtype, before the activation.
        state: (num_rows, 2H) float32, h and c.
        spans: which policy plays which of the rows; together all of them.
        buffers: scratch.
        new_state: as `state`, which it may be: overwritten.

    Returns:
        (num_rows, H) h in the compute dtype, for the heads; in the buffers, until the next step.
    """
    num_rows, size = encoded.shape
    inputs, gates, active = buffers.inputs[:num_rows], buffers.gates[:num_rows], buffers.active[:num_rows]
    product = buffers.product[:num_rows]
    new_hidden, new_cell = new_state[:, :size], new_state[:, size:]

    torch.clamp_min(encoded, 0.0, out=inputs[:, :size])
    inputs[:, size:].copy_(state[:, :size])
    for span in spans:
        rows = slice(span.start, span.stop)
        torch.addmm(span.lstm.bias, inputs[rows], span.lstm.weight, out=gates[rows])
    if active is not gates:
        active.copy_(gates)
    # tanh(x) = 1 - 2 sigmoid(-2x): torch's tanh takes ten times as long as its sigmoid
    i, f, o, g = active.chunk(4, dim=1)
    g.mul_(-2.0)
    active.sigmoid_()
    torch.addcmul(i, i, g, value=-2.0, out=product)  # i * tanh(g)
    torch.addcmul(product, f, state[:, size:], out=new_cell)  # c' = f * c + i * tanh(g)
    torch.mul(new_cell, -2.0, out=product).sigmoid_()
    torch.addcmul(o, o, product, value=-2.0, out=new_hidden)  # h' = o * tanh(c')
    return inputs[:, size:].copy_(new_hidden)
