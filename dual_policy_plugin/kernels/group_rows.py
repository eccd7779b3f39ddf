"""Sorts the NPC rows by policy on the device: which row sits in which slot, which policy plays which tile.

Takes the pool's `npc_of_env`; gives RowGroups to `kernels/policy_step.py`. A counting sort in two small kernels,
without atomics or a sync, so the result is the same every time and can be captured in a CUDA graph.
"""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# ruff: noqa: N803 -- constants of a kernel are written in capitals

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_PROGRAMS = 128  # every program of the second kernel reads the counts of all


@dataclass(kw_only=True, slots=True, frozen=True)
class RowGroups:
    """NPC rows sorted by policy (stable), each group padded to whole tiles; `group_rows` rewrites it in place.

    Slot s is lane s % tile of tile s // tile. Policies are numbered as in the stacked weights: NPC k is 1 + k.
    """

    row_of_slot: Tensor
    """(max_tiles * tile,) int32; -1 where no row sits."""
    policy_of_tile: Tensor
    """(max_tiles,) int32; -1 for a tile without rows (all of them behind the last one used)."""
    counts: Tensor
    """(MAX_PROGRAMS, num_npcs up to the next power of two) int32, scratch: envs per program and NPC."""
    num_npcs: int
    rows_per_env: int
    tile: int


def allocate_row_groups(
    *, num_envs: int, num_npcs: int, rows_per_env: int, tile: int, device: torch.device
) -> RowGroups:
    """Empty groups: ceil(num_envs * rows_per_env / tile) + num_npcs tiles hold whatever the sorting gives."""
    max_tiles = triton.cdiv(num_envs * rows_per_env, tile) + num_npcs
    columns = triton.next_power_of_2(num_npcs)
    return RowGroups(
        row_of_slot=torch.full((max_tiles * tile,), -1, dtype=torch.int32, device=device),
        policy_of_tile=torch.full((max_tiles,), -1, dtype=torch.int32, device=device),
        counts=torch.zeros(MAX_PROGRAMS, columns, dtype=torch.int32, device=device),
        num_npcs=num_npcs,
        rows_per_env=rows_per_env,
        tile=tile,
    )


def group_rows(npc_of_env: Tensor, groups: RowGroups, *, block: int = 128) -> None:
    """Rewrites `groups` for the NPCs that play now.

    Args:
        npc_of_env: (num_envs,) int64, NPC k in [0, num_npcs).
        groups: allocated for this number of envs.
        block: envs that a program looks at together, a power of two.
    """
    num_envs = npc_of_env.shape[0]
    num_tiles = groups.policy_of_tile.shape[0]
    assert num_tiles == triton.cdiv(num_envs * groups.rows_per_env, groups.tile) + groups.num_npcs
    num_programs = min(triton.cdiv(num_envs, block), MAX_PROGRAMS)
    # all constants but num_envs are fixed for a run: the kernels are compiled once
    columns = groups.counts.shape[1]
    blocks = triton.cdiv(num_envs, num_programs * block)
    count_envs_kernel[(num_programs,)](
        npc_of_env, groups.counts, groups.row_of_slot, num_envs, num_tiles * groups.tile,
        COLUMNS=columns, BLOCK=block, BLOCKS_PER_PROGRAM=blocks,
        SLOT_BLOCKS_PER_PROGRAM=triton.cdiv(num_tiles * groups.tile, num_programs * block),
    )  # fmt: skip
    scatter_rows_kernel[(num_programs,)](
        npc_of_env, groups.counts, groups.row_of_slot, groups.policy_of_tile, num_envs, num_tiles, num_programs,
        COLUMNS=columns, BLOCK=block, BLOCKS_PER_PROGRAM=blocks, ROWS_PER_ENV=groups.rows_per_env, TILE=groups.tile,
        PROGRAMS=triton.next_power_of_2(num_programs),
        TILE_BLOCKS_PER_PROGRAM=triton.cdiv(num_tiles, num_programs * block),
    )  # fmt: skip


def group_rows_plain(npc_of_env: Tensor, *, num_npcs: int, rows_per_env: int, tile: int) -> tuple[Tensor, Tensor]:
    """The plain twin of `group_rows`: row_of_slot and policy_of_tile as in RowGroups."""
    npc_of_row = npc_of_env.repeat_interleave(rows_per_env)
    num_rows = npc_of_row.shape[0]
    order = npc_of_row.argsort(stable=True)
    sizes = npc_of_row.bincount(minlength=num_npcs)
    tiles = (sizes + tile - 1) // tile
    first_tile = tiles.cumsum(0) - tiles
    first_place = sizes.cumsum(0) - sizes
    sorted_npc = npc_of_row[order]
    slots = first_tile[sorted_npc] * tile + torch.arange(num_rows) - first_place[sorted_npc]
    max_tiles = -(-num_rows // tile) + num_npcs
    row_of_slot = torch.full((max_tiles * tile,), -1, dtype=torch.int32)
    row_of_slot[slots] = order.int()
    policy_of_tile = torch.full((max_tiles,), -1, dtype=torch.int32)
    policy_of_tile[: int(tiles.sum())] = torch.arange(1, num_npcs + 1, dtype=torch.int32).repeat_interleave(tiles)
    return row_of_slot, policy_of_tile


@triton.jit
def count_envs_kernel(
    npc_of_env, counts, row_of_slot, num_envs, num_slots,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr, SLOT_BLOCKS_PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    """Counts this program's envs per NPC and clears its share of the slots."""
    program = tl.program_id(0)
    npcs = tl.arange(0, COLUMNS)
    lanes = tl.arange(0, BLOCK)
    count = tl.zeros((COLUMNS,), dtype=tl.int32)
    for block in range(BLOCKS_PER_PROGRAM):
        envs = (program * BLOCKS_PER_PROGRAM + block) * BLOCK + lanes
        npc = tl.load(npc_of_env + envs, mask=envs < num_envs, other=-1).to(tl.int32)
        count += tl.sum((npc[:, None] == npcs[None, :]).to(tl.int32), axis=0)
    tl.store(counts + program * COLUMNS + npcs, count)
    for block in range(SLOT_BLOCKS_PER_PROGRAM):
        slots = (program * SLOT_BLOCKS_PER_PROGRAM + block) * BLOCK + lanes
        tl.store(row_of_slot + slots, -1, mask=slots < num_slots)


@triton.jit
def scatter_rows_kernel(
    npc_of_env, counts, row_of_slot, policy_of_tile, num_envs, num_tiles, num_programs,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS_PER_PROGRAM: tl.constexpr, ROWS_PER_ENV: tl.constexpr,
    TILE: tl.constexpr, PROGRAMS: tl.constexpr, TILE_BLOCKS_PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    """Puts this program's rows into their slots and names the policy of its share of the tiles."""
    program = tl.program_id(0)
    npcs = tl.arange(0, COLUMNS)
    lanes = tl.arange(0, BLOCK)
    programs = tl.arange(0, PROGRAMS)
    all_counts = tl.load(
        counts + programs[:, None] * COLUMNS + npcs[None, :], mask=programs[:, None] < num_programs, other=0
    )
    num_tiles_of = tl.cdiv(tl.sum(all_counts, axis=0) * ROWS_PER_ENV, TILE)
    end_tile = tl.cumsum(num_tiles_of, axis=0)
    # slot of the next env's first row, per NPC: behind those of the programs before this one
    before = tl.sum(tl.where(programs[:, None] < program, all_counts, 0), axis=0)
    next_slot = (end_tile - num_tiles_of) * TILE + before * ROWS_PER_ENV
    for block in range(BLOCKS_PER_PROGRAM):
        envs = (program * BLOCKS_PER_PROGRAM + block) * BLOCK + lanes
        npc = tl.load(npc_of_env + envs, mask=envs < num_envs, other=-1).to(tl.int32)
        is_its = (npc[:, None] == npcs[None, :]).to(tl.int32)  # (BLOCK, COLUMNS)
        rank = tl.cumsum(is_its, axis=0) - 1
        slot = tl.sum(is_its * (next_slot[None, :] + rank * ROWS_PER_ENV), axis=1)
        for j in range(ROWS_PER_ENV):
            tl.store(row_of_slot + slot + j, envs * ROWS_PER_ENV + j, mask=envs < num_envs)
        next_slot += tl.sum(is_its, axis=0) * ROWS_PER_ENV

    total_tiles = tl.sum(num_tiles_of, axis=0)
    for block in range(TILE_BLOCKS_PER_PROGRAM):
        tiles = (program * TILE_BLOCKS_PER_PROGRAM + block) * BLOCK + lanes
        npc_of_tile = tl.sum((tiles[:, None] >= end_tile[None, :]).to(tl.int32), axis=1)  # groups that end before it
        tl.store(policy_of_tile + tiles, tl.where(tiles < total_tiles, 1 + npc_of_tile, -1), mask=tiles < num_tiles)
