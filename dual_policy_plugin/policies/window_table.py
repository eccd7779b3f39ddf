"""A window encoder's answer as one sum of table rows, for which neighbouring cells share a lookup; and its gradient.

Takes a WindowEncoder's parameters; gives a table and, for observations, which of its rows to sum. A pair of cells has
one row for each pair of codes, so that half the rows are read; an own-state byte has one row for each of its values;
the first lookup's rows hold the bias. Rows are summed in float32 before they are rounded to the compute dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dual_policy_plugin.types import ObservationSpace

NUM_BYTES = 256
BLOCK_ROWS = 1024  # a (1024, 974) block is 4 MB: it stays in the last-level cache
_FOUR_LANES = 0x0001000100010001
MAX_PAIR_BITS = 3
"""Of a code. A pair of longer ones would have 256 rows and more: a table beyond the cache."""


@dataclass(kw_only=True, slots=True, frozen=True)
class WindowLayout:
    """Where a space's terms stand in a table: pairs of cells, then single cells, then own-state bytes."""

    num_cells: int
    num_codes: int
    num_own: int
    scales: tuple[float, ...]
    """What each own-state byte is divided by."""
    num_pairs: int
    """Pairs of cells; the cells behind them are looked up one by one."""

    @property
    def code_bits(self) -> int:
        """Bits that a code takes."""
        return (self.num_codes - 1).bit_length()

    @property
    def num_terms(self) -> int:
        """Rows that one observation sums."""
        return self.num_cells - self.num_pairs + self.num_own

    @property
    def num_rows(self) -> int:
        """Rows of a policy's table."""
        return sum(self._rows_of_terms())

    def offsets(self) -> Tensor:
        """(num_terms,) int32: each term's first row."""
        ends = accumulate(self._rows_of_terms(), initial=0)
        return torch.tensor(list(ends)[:-1], dtype=torch.int32)

    def _rows_of_terms(self) -> list[int]:
        codes = 1 << self.code_bits
        num_single = self.num_cells - 2 * self.num_pairs
        return [codes * codes] * self.num_pairs + [codes] * num_single + [NUM_BYTES] * self.num_own

    @torch.no_grad()
    def table(self, cells: Tensor, own: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """The (num_rows, width) table of an encoder.

        Args:
            cells: (num_cells, num_codes - 1, width); code 0 is an empty cell and adds nothing.
            own: (num_own, width), what one unit of each own-state byte adds.
            bias: (width,).
            dtype: of the table.
        """
        codes, width = 1 << self.code_bits, bias.shape[0]
        cells = F.pad(cells.float(), (0, 0, 1, codes - self.num_codes))  # codes beyond the space's do not occur
        paired = cells[: 2 * self.num_pairs].view(self.num_pairs, 2, codes, width)
        # row second * codes + first of a pair
        pairs = paired[:, 1].unsqueeze(2) + paired[:, 0].unsqueeze(1)
        values = torch.arange(NUM_BYTES, device=own.device).view(1, -1, 1) * own.unsqueeze(1)  # (num_own, 256, width)
        terms = (pairs, cells[2 * self.num_pairs :], values)
        table = torch.cat([rows.reshape(-1, width) for rows in terms])
        table[: self._rows_of_terms()[0]] += bias
        return table.to(dtype)

    def index(self, obs: Tensor, offsets: Tensor) -> Tensor:
        """Which rows each observation sums: (num_rows, num_terms) int32.

        Args:
            obs: (num_rows, num_bytes) uint8, contiguous.
            offsets: (num_terms,) int32, each term's first row.
        """
        num_pairs, bits = self.num_pairs, self.code_bits
        index = torch.empty(len(obs), self.num_terms, dtype=torch.int32, device=obs.device)
        if num_pairs:
            # a 16-bit lane holds first | second << 8 (little-endian) and becomes first | second << bits; four at a time
            is_wide = obs.shape[1] % 8 == 0
            lanes = obs.view(torch.int64 if is_wide else torch.int16)
            mask = (1 << 2 * bits) - 1
            packed = (lanes >> (8 - bits)).bitwise_or_(lanes).bitwise_and_(mask * (_FOUR_LANES if is_wide else 1))
            index[:, :num_pairs].copy_(packed.view(torch.int16)[:, :num_pairs])
        index[:, num_pairs:].copy_(obs[:, 2 * num_pairs : self.num_cells + self.num_own])
        return index.add_(offsets)


def window_layout(space: ObservationSpace) -> WindowLayout:
    """The layout for a window space."""
    num_cells, num_codes = space.window[0] * space.window[1], len(space.features)
    # two neighbouring bytes are read as one 16-bit word, which must not straddle rows
    has_pairs = (num_codes - 1).bit_length() <= MAX_PAIR_BITS and space.shape[0] % 2 == 0
    num_pairs = num_cells // 2 if has_pairs else 0
    return WindowLayout(
        num_cells=num_cells, num_codes=num_codes, num_own=len(space.own), scales=space.scales, num_pairs=num_pairs
    )


class _WindowSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, obs: Tensor, cells: Tensor, own: Tensor, bias: Tensor, scale: Tensor, table: Tensor, index: Tensor
    ) -> Tensor:
        ctx.save_for_backward(obs, scale)
        ctx.shape = cells.shape
        return F.embedding_bag(index, table, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        obs, scale = ctx.saved_tensors
        num_cells, num_codes, width = ctx.shape[0], ctx.shape[1] + 1, ctx.shape[2]
        num_own, num_rows = len(scale), len(obs)
        first_own = num_cells * num_codes
        # rows of the gradient: one for each code of each cell, one for each own-state byte, one for the bias
        total = torch.zeros(first_own + num_own + 1, width, device=grad.device)
        block = min(BLOCK_ROWS, num_rows)
        features = torch.empty(block, len(total), device=grad.device)  # (block, rows of the gradient) float32
        ones = torch.ones(block, num_cells, device=grad.device)
        first_codes = torch.arange(num_cells, device=grad.device) * num_codes  # (num_cells,) int64
        for start in range(0, num_rows, block):
            rows = obs[start : start + block]
            part = features[: len(rows)].zero_()
            # no two cells share a column; still scatter_add_ into float32 is by far the fastest of torch's scatters
            part.scatter_add_(1, rows[:, :num_cells] + first_codes, ones[: len(rows)])
            part[:, first_own:-1] = rows[:, num_cells : num_cells + num_own] * scale
            part[:, -1] = 1.0
            # dL/dtable = features^T dL/dy
            total += part.to(grad.dtype).t() @ grad[start : start + block]
        cells_grad = total[:first_own].view(num_cells, num_codes, width)[:, 1:]
        return None, cells_grad, total[first_own:-1], total[-1], None, None, None


def window_sum(
    layout: WindowLayout, obs: Tensor, offsets: Tensor, scale: Tensor, cells: Tensor, own: Tensor, bias: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Encodings of a window encoder, differentiable in its parameters: (num_rows, width) in `dtype`.

    Forward looks up pairs of cells. Backward is neither a scatter into the table nor a one-hot of the whole batch:
    blocks of rows become a small dense matrix that stays in the cache, and one matrix product a block adds its share.

    Args:
        layout: of the space.
        obs: (num_rows, num_bytes) uint8.
        offsets: as `WindowLayout.index` takes them.
        scale: (num_own,) float32, what an own-state byte is multiplied by.
        cells, own, bias: the parameters (num_cells, num_codes - 1, width), (num_own, width), (width,) float32.
        dtype: of the sum and of the gradient's products.
    """
    obs = obs.contiguous()
    table = layout.table(cells, own * scale.unsqueeze(1), bias, dtype)
    result: Tensor = _WindowSum.apply(obs, cells, own, bias, scale, table, layout.index(obs, offsets))  # type: ignore[no-untyped-call]
    return result
