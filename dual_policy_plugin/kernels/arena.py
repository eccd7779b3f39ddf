"""The arena on CUDA: one kernel steps all envs, one writes what agents see. Called by `envs/arena.py` and the fused
rollout; bit-equal to the torch twin in `envs/arena.py`, given the actions.
"""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# ruff: noqa: N803, N806 -- constants of a kernel are written in capitals

from __future__ import annotations

from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from dual_policy_plugin.kernels.arena_maps import MARGIN
from dual_policy_plugin.kernels.arena_step import step_kernel
from dual_policy_plugin.types import StepResult

WINDOW = tl.constexpr(2 * MARGIN.value + 1)
NUM_CELLS_SEEN = tl.constexpr(WINDOW.value**2)
NUM_OWN = tl.constexpr(5)
ROW_BYTES = tl.constexpr(128)
OBSERVE_ROWS = 16  # rows of observations a program writes
CELLS_PER_THREAD = 4  # of a new map at a time; more of them cost registers in every step


class ArenaTensors(Protocol):
    """What the kernels read of an `Arena`. E envs, A agents each, C canvas cells per env."""

    config: Any
    """An ArenaConfig (which stands on a higher floor)."""
    seat_keys: Tensor
    """(A,) int32."""
    teams: Tensor
    """(A,) int64: 0 or 1."""
    views: Tensor
    """(E, 2, C) uint8."""
    amounts: Tensor
    """(E, C) uint8."""
    positions: Tensor
    """(E, A) int64: env * C + cell."""
    view_cells: Tensor
    """(2, E, A) int64."""
    facings: Tensor
    """(E, A) int64."""
    carried: Tensor
    """(5, E, A) uint8."""
    totals: Tensor
    """(4, E, A) float32."""
    steps_left: Tensor
    """(E,) int32, like the next three."""
    episodes: Tensor
    env_keys: Tensor
    priority_keys: Tensor
    final_totals: Tensor
    """(E, A, 4) float32."""
    result: StepResult


def step_arena(arena: ArenaTensors, actions: Tensor) -> None:
    """Steps all envs: `arena`'s state and its result are rewritten in place; nothing is allocated.

    Args:
        arena: contiguous tensors on one CUDA device. `final_totals` is written where an episode ended, only.
        actions: (E, A) int64, contiguous.
    """
    assert actions.is_contiguous(), "actions must be contiguous"
    assert actions.dtype == torch.int64, actions.dtype
    result = arena.result
    sizes = step_sizes(arena.config)
    step_kernel[(arena.positions.shape[0],)](
        actions, arena.views, arena.amounts, arena.positions, arena.view_cells, arena.facings, arena.carried,
        arena.totals, arena.steps_left, arena.episodes, arena.env_keys, arena.priority_keys, arena.seat_keys,
        arena.teams, result.rewards, result.dones, result.episode_ends, arena.final_totals,
        **sizes, num_warps=step_warps(sizes),
    )  # fmt: skip


def step_sizes(config: Any) -> dict[str, int]:
    """Returns the step kernel's compile-time numbers for an ArenaConfig."""
    names = "num_agents height width mines altars walls altar_stock ore_capacity freeze_steps attack_cooldown"
    sizes: dict[str, int] = {name.upper(): getattr(config, name) for name in [*names.split(), "episode_steps"]}
    sizes["SEATS"] = triton.next_power_of_2(config.num_agents)
    sizes["SLOT_LANES"] = triton.next_power_of_2((config.height // 2) * (config.width // 2))
    sizes["INNER_LANES"] = triton.next_power_of_2(config.height * config.width)
    sizes["CHUNK"] = 32 * step_warps(sizes) * CELLS_PER_THREAD
    return sizes


def step_warps(sizes: dict[str, int]) -> int:
    """Returns the warps of a step program: one, whose lanes need no shared memory, unless registers would not do."""
    return 1 if max(sizes["SEATS"] ** 2, sizes["INNER_LANES"]) <= 1024 else 4


def observe_arena(
    arena: ArenaTensors,
    seats: Tensor,
    out: Tensor,
    more_seats: Tensor | None = None,
    more_out: Tensor | None = None,
) -> None:
    """Writes what some seats see, in one launch for up to two groups of seats (the learner's and the NPCs').

    Args:
        arena: contiguous tensors on one CUDA device.
        seats: (S,) int64, as is more_seats.
        out: (E * S, 128) uint8, contiguous, env-major, as is more_out.
        more_seats, more_out: a second group, or None both.
    """
    num_envs = arena.positions.shape[0]
    num_seats, num_more = len(seats), 0 if more_seats is None else len(more_seats)
    more_seats = seats if more_seats is None else more_seats
    more_out = out if more_out is None else more_out
    for rows, group in ((out, num_seats), (more_out, num_more)):
        assert rows.is_contiguous(), "observations must be contiguous"
        assert not group or rows.shape == (num_envs * group, ROW_BYTES.value), rows.shape
    num_blocks = triton.cdiv(num_envs * num_seats, OBSERVE_ROWS) + triton.cdiv(num_envs * num_more, OBSERVE_ROWS)
    observe_kernel[(num_blocks,)](
        arena.views, arena.positions, arena.facings, arena.carried, arena.teams, seats, out, more_seats, more_out,
        num_envs,
        NUM_SEATS=num_seats, NUM_MORE=num_more, NUM_AGENTS=arena.config.num_agents, HEIGHT=arena.config.height,
        WIDTH=arena.config.width, ROWS=OBSERVE_ROWS, num_warps=4,
    )  # fmt: skip


@triton.jit
def observe_kernel(
    views, positions, facings, carried, teams, seats, out, more_seats, more_out, num_envs,
    NUM_SEATS: tl.constexpr, NUM_MORE: tl.constexpr, NUM_AGENTS: tl.constexpr, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes ROWS rows of `out` a program; those behind them write `more_out`. Pointers as in observe_arena."""
    block = tl.program_id(0)
    num_blocks = tl.cdiv(num_envs * NUM_SEATS, ROWS)
    if block < num_blocks:
        observe_rows(
            views, positions, facings, carried, teams, seats, out, block, num_envs,
            NUM_SEATS, NUM_AGENTS, HEIGHT, WIDTH, ROWS,
        )  # fmt: skip
    else:
        if NUM_MORE > 0:
            observe_rows(
                views, positions, facings, carried, teams, more_seats, more_out, block - num_blocks, num_envs,
                NUM_MORE, NUM_AGENTS, HEIGHT, WIDTH, ROWS,
            )  # fmt: skip


@triton.jit
def observe_rows(
    views, positions, facings, carried, teams, seats, out, block, num_envs,
    NUM_SEATS: tl.constexpr, NUM_AGENTS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes rows block * ROWS and on of one group of seats."""
    STRIDE: tl.constexpr = WIDTH + 2 * MARGIN
    NUM_CELLS: tl.constexpr = (HEIGHT + 2 * MARGIN) * STRIDE
    row = block * ROWS + tl.arange(0, ROWS)
    is_row = row < num_envs * NUM_SEATS
    env = (row // NUM_SEATS).to(tl.int64)
    seat = tl.load(seats + row % NUM_SEATS, mask=is_row, other=0)
    team = tl.load(teams + seat, mask=is_row, other=0)
    place = env * NUM_AGENTS + seat  # in positions, facings and each layer of carried
    position = tl.load(positions + place, mask=is_row, other=0)
    facing = tl.load(facings + place, mask=is_row, other=0).to(tl.uint8)
    corner = position + (env + team) * NUM_CELLS - MARGIN * STRIDE - MARGIN  # env * 2C + team * C + cell - ...

    byte = tl.arange(0, ROW_BYTES)
    is_window = is_row[:, None] & (byte < NUM_CELLS_SEEN)[None, :]
    step = (byte // WINDOW) * STRIDE + byte % WINDOW
    seen = tl.load(views + corner[:, None] + step[None, :], mask=is_window, other=0)
    own = byte - NUM_CELLS_SEEN
    is_own = is_row[:, None] & ((own >= 0) & (own < NUM_OWN))[None, :]
    layer = own.to(tl.int64) * num_envs * NUM_AGENTS
    seen += tl.load(carried + place[:, None] + layer[None, :], mask=is_own, other=0)
    seen = tl.where((byte == NUM_CELLS_SEEN // 2)[None, :], facing[:, None], seen)
    tl.store(out + row.to(tl.int64)[:, None] * ROW_BYTES + byte[None, :], seen, mask=is_row[:, None])
