"""Several `fast` policies of one size over a window, with their weights side by side.

Takes packed policies; gives one grouped step for rows that are sorted by policy: the encoder's gather, the cell and
the heads' results are worked through for all rows together, and only the matrix products are one for each policy. The
fused CUDA step (`kernels/policy_step.py`) reads the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_policy_plugin.policies.encoders import WindowEncoder
from dual_policy_plugin.policies.fast_step import BLOCK_ROWS, LstmLayer, Span, StepBuffers, fast_step, fitting_buffers
from dual_policy_plugin.policies.nets import FastPolicy

TILE = 8
"""What a policy's share of the slots is rounded up to. A matrix product is prepared for each number of rows that comes
up, at the price of several products: so there are few such numbers."""


@dataclass(kw_only=True, slots=True, frozen=True)
class SortedRows:
    """Rows in the order of the policies that play them.

    Each policy's rows lie side by side in slots; where its last slots are left over, they hold row 0 once more, and
    nothing reads what comes of it.
    """

    policy_of_env: Tensor
    """(num_envs,) int64, what this was made for."""
    row_of_slot: Tensor
    """(num_slots,) int64."""
    policy_of_slot: Tensor
    """(num_slots,) int64, ascending."""
    slot_of_row: Tensor
    """(num_rows,) int64."""
    bounds: list[tuple[int, int, int]]
    """(policy, first slot, slot behind the last) of each policy that plays any."""


class StackedPolicies:
    """The packed weights of P policies; F feature rows, hidden size H, A actions, all weights in the compute dtype.

    All tensors are written in place and never replaced: a captured graph stays right when a policy is put.

    Attributes:
        encoder: (P, F, H), each policy's `WindowEncoder.stacked_rows`.
        lstm: (P, 2H, 4H), rows for x, then for h; columns i, f, o, g.
        lstm_bias: (P, 4H).
        heads: (P, H, A + 1), the last column is the value.
        heads_bias: (P, A + 1).
        is_greedy: (P,) bool, whether the policy takes its most likely action.
        own_scale: (num_own,) float32, what an own-state byte is multiplied by; the same for all.
        num_cells, num_codes: of the window.
        tables: (P * T, H) on the CPU: what `WindowLayout.table` gives, T rows for each policy. Empty elsewhere.
    """

    def __init__(self, like: FastPolicy, num_policies: int) -> None:
        """Room for `num_policies` policies that fit `like`, on its device and in its compute dtype."""
        assert isinstance(like.encoder, WindowEncoder)
        dtype, device = like.compute_dtype, like.heads.weight.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(num_policies, *shape, dtype=dtype, device=device)

        size, num_outputs = like.hidden_size, like.num_actions + 1
        self.layout, self._offsets = like.encoder.layout, like.encoder.offsets
        self.encoder = zeros(*like.encoder.stacked_rows(dtype).shape)
        self.lstm, self.lstm_bias = zeros(2 * size, 4 * size), zeros(4 * size)
        self.heads, self.heads_bias = zeros(size, num_outputs), zeros(num_outputs)
        self.is_greedy = torch.zeros(num_policies, dtype=torch.bool, device=device)
        self.own_scale, self.num_cells, self.num_codes = (
            like.encoder.own_scale,
            like.encoder.num_cells,
            like.encoder.num_codes,
        )
        num_rows = num_policies * self.layout.num_rows if device.type == "cpu" else 0
        self.tables = torch.zeros(num_rows, size, dtype=dtype, device=device)
        self._lstms = [LstmLayer(weight=w, bias=b) for w, b in zip(self.lstm, self.lstm_bias, strict=True)]
        self._scratch: StepBuffers | None = None

    @staticmethod
    def fits(policy: nn.Module, like: nn.Module) -> bool:
        """Whether a policy can stand beside `like` in one stack."""
        return (
            type(policy) is FastPolicy
            and type(like) is FastPolicy
            and isinstance(policy.encoder, WindowEncoder)
            and isinstance(like.encoder, WindowEncoder)
            and policy.encoder.layout == like.encoder.layout
            and (policy.hidden_size, policy.num_actions) == (like.hidden_size, like.num_actions)
            and policy.compute_dtype == like.compute_dtype
            and policy.heads.weight.device == like.heads.weight.device
        )

    @torch.no_grad()
    def put(self, k: int, policy: nn.Module, *, is_greedy: bool = False) -> None:
        """Copies a policy that fits, and that has been packed, into place k; asks nothing of the device."""
        assert isinstance(policy, FastPolicy)
        assert isinstance(policy.encoder, WindowEncoder)
        assert policy.lstm is not None, "pack comes first"
        self.encoder[k].copy_(policy.encoder.stacked_rows(self.encoder.dtype))
        self.lstm[k].copy_(policy.lstm.weight)
        self.lstm_bias[k].copy_(policy.lstm.bias)
        self.heads[k].copy_(policy.packed("heads", "weight"))
        self.heads_bias[k].copy_(policy.packed("heads", "bias"))
        self.is_greedy[k].fill_(is_greedy)
        if len(self.tables):
            num_rows = self.layout.num_rows
            self.tables[k * num_rows : (k + 1) * num_rows].copy_(policy.packed("encoder", "table"))

    @torch.no_grad()
    def step(self, obs: Tensor, state: Tensor, rows: SortedRows) -> tuple[Tensor, Tensor]:
        """One step of rows by their policies, on the CPU.

        Args:
            obs: (num_rows, num_bytes) uint8, contiguous.
            state: (num_rows, 2H) float32.
            rows: the rows in the order of their policies.

        Returns:
            outputs (A + 1, num_slots) float32, logits and last the value; new states (num_slots, 2H) float32.
        """
        num_slots = len(rows.row_of_slot)
        outputs, new_state = torch.empty(self.heads.shape[2], num_slots), torch.empty(num_slots, state.shape[1])
        # (num_slots, 1): each slot's first row in `tables`
        first_rows = (rows.policy_of_slot * self.layout.num_rows).to(torch.int32).unsqueeze(1)
        for block in _blocks(rows.bounds):
            first = block[0][1]
            slots = slice(first, block[-1][2])
            self._scratch = fitting_buffers(self._scratch, self._lstms[0], slots.stop - first)
            rows_here = rows.row_of_slot[slots]
            index = self.layout.index(obs.index_select(0, rows_here), self._offsets).add_(first_rows[slots])
            hidden = fast_step(
                F.embedding_bag(index, self.tables, mode="sum"), state.index_select(0, rows_here),
                [Span(self._lstms[k], start - first, stop - first) for k, start, stop in block],
                self._scratch, new_state=new_state[slots],
            )  # fmt: skip
            self._heads(hidden, block, outputs[:, slots])
        return outputs, new_state

    def _heads(self, hidden: Tensor, block: Sequence[tuple[int, int, int]], outputs: Tensor) -> None:
        """Writes the heads' results for a block into outputs (A + 1, num_slots).

        One product for the heads of all policies in the block, of which each slot reads its own: cheaper than a small
        product for each policy.
        """
        lowest, first, width = block[0][0], block[0][1], outputs.shape[0]
        policies = slice(lowest, block[-1][0] + 1)
        weights = self.heads[policies].transpose(0, 1).flatten(1)  # (H, policies * (A + 1))
        every = torch.addmm(self.heads_bias[policies].flatten(), hidden, weights)
        for k, start, stop in block:
            column = (k - lowest) * width
            own = slice(start - first, stop - first)
            outputs[:, own] = every[own, column : column + width].t()


def sort_rows(policy_of_env: Tensor, num_policies: int, *, rows_per_env: int, tile: int = 1) -> SortedRows:
    """Sorts rows by their env's policy, stably; each policy's slots are a multiple of `tile`. Runs on the CPU."""
    # NumPy: these are a dozen tiny operations at almost every step, and it begins one in a fraction of torch's time
    policies = policy_of_env.numpy()
    envs = policies.astype(np.int16).argsort(kind="stable")  # of 16-bit numbers: a radix sort
    counts = np.bincount(policies, minlength=num_policies) * rows_per_env  # (num_policies,)
    num_slots = (counts + tile - 1) // tile * tile
    stops = num_slots.cumsum()
    starts = stops - num_slots
    # the i-th row of a policy goes to its i-th slot
    shifts = starts - (counts.cumsum() - counts)
    seats = np.arange(rows_per_env)
    rows = ((envs * rows_per_env)[:, None] + seats).reshape(-1)  # sorted
    first_slots = np.arange(len(envs)) * rows_per_env + shifts[policies[envs]]
    slots = (first_slots[:, None] + seats).reshape(-1)
    row_of_slot = np.zeros(num_slots.sum(), dtype=np.int64)
    row_of_slot[slots] = rows
    slot_of_row = np.empty_like(rows)
    slot_of_row[rows] = slots
    bounds = zip(starts.tolist(), stops.tolist(), strict=True)
    return SortedRows(
        policy_of_env=policy_of_env.clone(),
        row_of_slot=torch.from_numpy(row_of_slot),
        policy_of_slot=torch.from_numpy(np.arange(num_policies).repeat(num_slots)),
        slot_of_row=torch.from_numpy(slot_of_row),
        bounds=[(k, start, stop) for k, (start, stop) in enumerate(bounds) if stop > start],
    )


def _blocks(bounds: Sequence[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Blocks of about BLOCK_ROWS slots, less than two times as many: some small groups, or a piece of a large one."""
    block: list[tuple[int, int, int]] = []
    for k, first, last in bounds:
        num_pieces = max(1, round((last - first) / BLOCK_ROWS))
        size = -(-(last - first) // (num_pieces * TILE)) * TILE
        for start in range(first, last, size):
            stop = min(start + size, last)
            if block and stop - block[0][1] >= 2 * BLOCK_ROWS:
                yield block
                block = []
            block.append((k, start, stop))
            if stop - block[0][1] >= BLOCK_ROWS:
                yield block
                block = []
    if block:
        yield block
