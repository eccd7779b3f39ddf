"""One step of the learner and of K NPCs in one launch: encoder, LSTM cell, heads and sampling, all on the chip.

Takes the rows of both sides, their states and the stacked weights; gives actions in the env's table and what
Experience stores of the learner. A program owns a tile of rows that one policy plays: the learner's tiles first, then
those of the NPCs, in the order of `kernels/group_rows.py`. Only weights, observations, states and results touch the
device's memory. The plain twin is `FastPolicy.forward_step`, then `sample_actions` and `log_probs_of`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
# ruff: noqa: N803, N806 -- constants of a kernel are written in capitals

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from dual_policy_plugin.kernels.group_rows import RowGroups
from dual_policy_plugin.kernels.window import count_features, window_encoding

TILE = 64  # rows of a program on the device: one warp group's matrix instruction
MAX_HIDDEN_SIZE = 256  # a tile of encodings must fit the registers
MAX_FLOAT32_SIZE = 64  # no tensor cores: 128 spills tens of kilobytes a thread, 256 overflows shared memory
UNITS = 16


class StepWeights(Protocol):
    """P = 1 + K policies of one architecture, stacked, as `StackedPolicies` is; 0 is the learner, 1 + k is NPC k.

    F is the number of feature rows, H the hidden size, A the number of actions. All weights in the compute dtype.

    encoder: (P, F, H), each policy's `WindowEncoder.stacked_rows`.
    lstm: (P, 2H, 4H), rows for x, then for h; columns i, f, o, g.
    lstm_bias: (P, 4H).
    heads: (P, H, A + 1); the last column is the value.
    heads_bias: (P, A + 1).
    is_greedy: (P,) bool; True takes the most likely action.
    own_scale: (num_own,) float32, what an own-state byte is multiplied by.
    num_cells, num_codes: of the window; the empty code counts.
    """

    encoder: Tensor
    lstm: Tensor
    lstm_bias: Tensor
    heads: Tensor
    heads_bias: Tensor
    is_greedy: Tensor
    own_scale: Tensor
    num_cells: int
    num_codes: int


@dataclass(kw_only=True, slots=True, frozen=True)
class StepRows:
    """The rows of one side, env-major: row = env * num_seats + j sits on seat `seats[j]` of its env."""

    obs: Tensor
    """(num_rows, row_bytes) uint8."""
    state: Tensor
    """(num_rows, 2H) float32, h and c; updated in place."""
    uniforms: Tensor
    """(num_rows,) float32 in [0, 1)."""
    seats: Tensor
    """(num_seats,) int64."""


def policy_step(
    weights: StepWeights,
    learner: StepRows,
    npc: StepRows | None,
    groups: RowGroups | None,
    *,
    actions: Tensor,
    learner_actions: Tensor,
    log_probs: Tensor,
    values: Tensor,
    tile: int = TILE,
) -> None:
    """Steps the policies of all rows in one launch; no sync, nothing allocated.

    Args:
        weights: of the learner and of all NPCs.
        learner: always policy 0.
        npc: None where no NPC plays.
        groups: which NPC plays which row, freshly sorted; None where there is one NPC: policy 1 plays every row.
        actions: (num_envs, num_agents) int64, the env's table; receives the actions of both sides.
        learner_actions: (num_learner_rows,) int64, receives the learner's.
        log_probs, values: (num_learner_rows,) float32, receive those of the learner.
        tile: rows of a program, that of `groups`; 64 on a device (128 reads the weights half as often and pads more).
    """
    num_policies, num_features, hidden = weights.encoder.shape
    assert num_features == count_features(weights.num_cells, weights.num_codes, weights.own_scale.shape[0])
    assert hidden * tile <= MAX_HIDDEN_SIZE * TILE
    assert groups is None or groups.tile == tile
    learner_tiles = triton.cdiv(learner.obs.shape[0], tile)
    if npc is None:
        npc, npc_rows, npc_tiles = learner, 0, 0  # the pointers are not followed
    else:
        assert groups is not None or num_policies == 2
        npc_rows = npc.obs.shape[0]
        npc_tiles = groups.policy_of_tile.shape[0] if groups is not None else triton.cdiv(npc_rows, tile)
    _check(weights, learner, npc, actions, learner_actions, log_probs, values)
    policy_step_kernel[(learner_tiles + npc_tiles,)](
        learner.obs, learner.state, learner.uniforms, learner.seats, learner_actions, log_probs, values,
        npc.obs, npc.state, npc.uniforms, npc.seats,
        groups.row_of_slot if groups is not None else None, groups.policy_of_tile if groups is not None else None,
        weights.encoder, weights.own_scale, weights.lstm, weights.lstm_bias, weights.heads, weights.heads_bias,
        weights.is_greedy, actions, learner.obs.shape[0], npc_rows,
        LEARNER_SEATS=learner.seats.shape[0], NPC_SEATS=npc.seats.shape[0], NUM_AGENTS=actions.shape[1],
        HAS_GROUPS=groups is not None, TILE=tile,
        **kernel_sizes(
            num_cells=weights.num_cells, num_codes=weights.num_codes, num_own=weights.own_scale.shape[0],
            row_bytes=learner.obs.shape[1], hidden=hidden, num_actions=weights.heads.shape[2] - 1,
        ),
        **launch_options(hidden, tile),
    )  # fmt: skip


def kernel_sizes(
    *, num_cells: int, num_codes: int, num_own: int, row_bytes: int, hidden: int, num_actions: int
) -> dict[str, int]:
    """The kernel's constants that follow from an architecture."""
    return {
        "NUM_CELLS": num_cells,
        "NUM_CODES": num_codes,
        "NUM_OWN": num_own,
        "ROW_BYTES": row_bytes,
        "NUM_FEATURES": count_features(num_cells, num_codes, num_own),
        "HIDDEN": hidden,
        "BLOCK_HIDDEN": max(16, triton.next_power_of_2(hidden)),
        "UNITS": UNITS,
        "NUM_ACTIONS": num_actions,
        "HEAD_COLUMNS": max(16, triton.next_power_of_2(num_actions + 1)),  # a matrix instruction's least width
    }


def launch_options(hidden: int, tile: int) -> dict[str, int]:
    """Warps and pipeline stages for a hidden size and a number of rows."""
    return {"num_warps": 4 if hidden * tile <= 128 * 64 else 8, "num_stages": 2}


def shared_bytes(hidden: int, dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """Bound of a program's shared memory in bytes, for hidden sizes from 64 on."""
    # chips of 9.x and 10.x feed their matrix instructions from shared memory, the others from registers
    padded = int(triton.next_power_of_2(hidden))
    return (416 if (9, 0) <= capability < (12, 0) else 320) * padded * dtype.itemsize


def supports(hidden: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel runs at a hidden size; on a CUDA device also whether the chip holds a program."""
    if device.type != "cuda":
        return hidden <= MAX_HIDDEN_SIZE
    if hidden > (MAX_FLOAT32_SIZE if dtype == torch.float32 else MAX_HIDDEN_SIZE):
        return False
    capability = torch.cuda.get_device_capability(device)
    properties = torch.cuda.get_device_properties(device)
    available: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in torch's stubs
    return shared_bytes(hidden, dtype, capability) <= available


def _check(weights: StepWeights, learner: StepRows, npc: StepRows, *outputs: Tensor) -> None:
    """Our own invariants: the kernel takes every tensor as contiguous."""
    hidden = weights.encoder.shape[2]
    for rows in (learner, npc):
        assert rows.state.shape[1] == 2 * hidden
        assert rows.state.dtype == torch.float32
        assert rows.obs.shape[1] == learner.obs.shape[1]
        outputs += (rows.obs, rows.state, rows.uniforms, rows.seats)
    for tensor in (weights.encoder, weights.lstm, weights.lstm_bias, weights.heads, weights.heads_bias, *outputs):
        assert tensor.is_contiguous()


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def policy_step_kernel(
    learner_obs, learner_state, learner_uniforms, learner_seats, learner_actions, log_probs, values,
    npc_obs, npc_state, npc_uniforms, npc_seats, row_of_slot, policy_of_tile,
    encoder, own_scale, lstm, lstm_bias, heads, heads_bias, is_greedy, actions,
    num_learner_rows, num_npc_rows,
    LEARNER_SEATS: tl.constexpr, NPC_SEATS: tl.constexpr, NUM_AGENTS: tl.constexpr,
    HAS_GROUPS: tl.constexpr, TILE: tl.constexpr,
    NUM_CELLS: tl.constexpr, NUM_CODES: tl.constexpr, NUM_OWN: tl.constexpr, ROW_BYTES: tl.constexpr,
    NUM_FEATURES: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, UNITS: tl.constexpr,
    NUM_ACTIONS: tl.constexpr, HEAD_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Steps one tile of rows that one policy plays; `policy_step` says what the arguments are."""
    DTYPE: tl.constexpr = encoder.dtype.element_ty
    PRECISION: tl.constexpr = "ieee" if encoder.dtype.element_ty == tl.float32 else "tf32"
    lanes = tl.arange(0, TILE)
    tile = tl.program_id(0)
    learner_tiles = tl.cdiv(num_learner_rows, TILE)
    is_learner = tile < learner_tiles

    # whose rows: the pointers of this tile's side
    if is_learner:
        policy = 0
        rows = tile * TILE + lanes
        row_mask = rows < num_learner_rows
        obs, state, uniforms = learner_obs, learner_state, learner_uniforms
        env = rows // LEARNER_SEATS
        seat = tl.load(learner_seats + rows % LEARNER_SEATS)
    else:
        if HAS_GROUPS:
            policy = tl.load(policy_of_tile + tile - learner_tiles)
            rows = tl.load(row_of_slot + (tile - learner_tiles) * TILE + lanes)
            row_mask = rows >= 0
            rows = tl.maximum(rows, 0)
        else:
            policy = 1
            rows = (tile - learner_tiles) * TILE + lanes
            row_mask = rows < num_npc_rows
        obs, state, uniforms = npc_obs, npc_state, npc_uniforms
        env = rows // NPC_SEATS
        seat = tl.load(npc_seats + rows % NPC_SEATS)
    if policy < 0:
        return

    # x = relu(encoder(obs))
    x = window_encoding(
        obs, rows, row_mask, encoder + policy * NUM_FEATURES * HIDDEN, own_scale, 0,
        NUM_CELLS, NUM_CODES, NUM_OWN, ROW_BYTES, HIDDEN, TILE, BLOCK_HIDDEN, DTYPE,
    )  # fmt: skip
    x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL).to(DTYPE)

    # the old h, all of it, before any of it is overwritten
    columns = tl.arange(0, BLOCK_HIDDEN)
    state_rows = state + rows.to(tl.int64)[:, None] * (2 * HIDDEN)
    h_mask = row_mask[:, None] & (columns < HIDDEN)[None, :]
    h = tl.load(state_rows + columns[None, :], mask=h_mask, other=0.0).to(DTYPE)
    tl.debug_barrier()

    # gates = [x, h] @ lstm + bias, for a block of units at a time; their h goes straight into the heads
    GATES: tl.constexpr = 4 * UNITS
    gate = tl.arange(0, GATES) // UNITS  # columns of a block: the units' i, then their f, o, g
    policy_lstm = lstm + policy * (2 * HIDDEN * 4 * HIDDEN)
    policy_bias = lstm_bias + policy * (4 * HIDDEN)
    head_columns = tl.arange(0, HEAD_COLUMNS)
    head_mask = (head_columns < NUM_ACTIONS + 1)[None, :]
    outputs = tl.zeros((TILE, HEAD_COLUMNS), tl.float32)
    for first_unit in range(0, HIDDEN, UNITS):
        gate_units = first_unit + tl.arange(0, GATES) % UNITS
        gate_columns = gate * HIDDEN + gate_units
        at = columns[:, None] * (4 * HIDDEN) + gate_columns[None, :]
        mask = (columns < HIDDEN)[:, None] & (gate_units < HIDDEN)[None, :]
        weight_x = tl.load(policy_lstm + at, mask=mask, other=0.0)
        weight_h = tl.load(policy_lstm + HIDDEN * 4 * HIDDEN + at, mask=mask, other=0.0)
        gates = tl.dot(x, weight_x, input_precision=PRECISION)
        gates = tl.dot(h, weight_h, gates, input_precision=PRECISION)
        gates += tl.load(policy_bias + gate_columns, mask=gate_units < HIDDEN, other=0.0).to(tl.float32)[None, :]
        # (TILE, 4 * UNITS), a gate is 2 * a + b -> (TILE, UNITS, b, a), and apart; all in the registers they are in
        gates_if, gates_og = tl.split(gates.reshape(TILE, 2, 2, UNITS).permute(0, 3, 2, 1))
        gate_i, gate_f = tl.split(gates_if)
        gate_o, gate_g = tl.split(gates_og)

        units = first_unit + tl.arange(0, UNITS)
        unit_mask = row_mask[:, None] & (units < HIDDEN)[None, :]
        cell_at = state_rows + (HIDDEN + units)[None, :]
        cell = tl.load(cell_at, mask=unit_mask, other=0.0)
        cell = tl.sigmoid(gate_f) * cell + tl.sigmoid(gate_i) * _tanh(gate_g)  # c' = f * c + i * g
        hidden = tl.sigmoid(gate_o) * _tanh(cell)
        tl.store(cell_at, cell, mask=unit_mask)
        tl.store(state_rows + units[None, :], hidden, mask=unit_mask)

        head_at = (policy * HIDDEN + units)[:, None] * (NUM_ACTIONS + 1) + head_columns[None, :]
        block = tl.load(heads + head_at, mask=(units < HIDDEN)[:, None] & head_mask, other=0.0)
        outputs = tl.dot(hidden.to(DTYPE), block, outputs, input_precision=PRECISION)
    head_bias_at = heads_bias + policy * (NUM_ACTIONS + 1) + head_columns
    outputs += tl.load(head_bias_at, mask=head_columns < NUM_ACTIONS + 1, other=0.0).to(tl.float32)[None, :]

    # the action: inverse of the cumulative distribution, or the most likely one
    logits = tl.where((head_columns < NUM_ACTIONS)[None, :], outputs, float("-inf"))
    logits -= tl.max(logits, axis=1)[:, None]
    cumulative = tl.cumsum(tl.exp(logits), axis=1)
    total = tl.sum(tl.where((head_columns == NUM_ACTIONS - 1)[None, :], cumulative, 0.0), axis=1)
    drawn = tl.load(uniforms + rows, mask=row_mask, other=0.0) * total
    # the last column is left out: rounding must not give an action beyond the last
    is_behind = (drawn[:, None] >= cumulative) & (head_columns < NUM_ACTIONS - 1)[None, :]
    action = tl.sum(is_behind.to(tl.int32), axis=1)
    if tl.load(is_greedy + policy):
        action = tl.minimum(tl.argmax(logits, axis=1), NUM_ACTIONS - 1)
    tl.store(actions + env.to(tl.int64) * NUM_AGENTS + seat, action.to(tl.int64), mask=row_mask)

    if is_learner:
        tl.store(learner_actions + rows, action.to(tl.int64), mask=row_mask)
        chosen = tl.sum(tl.where(head_columns[None, :] == action[:, None], logits, 0.0), axis=1)
        tl.store(log_probs + rows, chosen - tl.log(total), mask=row_mask)
        value = tl.sum(tl.where((head_columns == NUM_ACTIONS)[None, :], outputs, 0.0), axis=1)
        tl.store(values + rows, value, mask=row_mask)
