"""Draws map, start places and facings of one env's next episode; called inside the arena's step kernel.

Bit-equal to `MapDrawer.draw` of envs/arena_maps.py, without its sorts. There the slots with the lowest keys get the
mines, then the altars, then the walls. Here three border keys are found (of the last mine, altar and wall), and with
them every cell says for itself what stands on it: its slot, the slot's key and the shifts are all hashes.
"""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# ruff: noqa: N803, N806 -- constants of a kernel are written in capitals

from __future__ import annotations

import triton
import triton.language as tl

from dual_policy_plugin import rng
from dual_policy_plugin.kernels.hashing import distinct_keys, extend

MARGIN = tl.constexpr(5)
EMPTY = tl.constexpr(0)
WALL = tl.constexpr(1)
MINE = tl.constexpr(2)
ALTAR = tl.constexpr(3)
MAP = tl.constexpr(rng.MAP)
SEAT_ORDER = tl.constexpr(rng.SEAT_ORDER)
START_FACING = tl.constexpr(rng.START_FACING)
START_PLACE = tl.constexpr(rng.START_PLACE)
LARGEST = tl.constexpr(2**31 - 1)


@triton.jit
def slot_cell(slot_row, slot_column, WIDTH: tl.constexpr):
    """Returns the canvas cell of a slot before the shifts; it names the slot in the draws."""
    return (2 * slot_row + MARGIN) * (WIDTH + 2 * MARGIN) + 2 * slot_column + MARGIN


@triton.jit
def find_borders(
    map_key,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, MINES: tl.constexpr, ALTARS: tl.constexpr, WALLS: tl.constexpr,
    SLOT_LANES: tl.constexpr,
):  # fmt: skip
    """Returns the slot keys of the last mine, the last altar and the last wall, int32; no sort.

    The k-th smallest key is the largest number that has fewer than k keys below it: found bit by bit.
    """
    slot = tl.arange(0, SLOT_LANES)
    keys = distinct_keys(map_key, slot_cell(slot // (WIDTH // 2), slot % (WIDTH // 2), WIDTH))
    keys = tl.where(slot < (HEIGHT // 2) * (WIDTH // 2), keys, LARGEST)
    last_mine = tl.full((), 0, tl.int32)
    last_altar = tl.full((), 0, tl.int32)
    last_wall = tl.full((), 0, tl.int32)
    bit = tl.full((), 1 << 30, tl.int32)
    for _ in range(31):
        num_lower = tl.sum((keys < (last_mine | bit)).to(tl.int32), axis=0)
        last_mine = tl.where(num_lower < MINES, last_mine | bit, last_mine)
        num_lower = tl.sum((keys < (last_altar | bit)).to(tl.int32), axis=0)
        last_altar = tl.where(num_lower < MINES + ALTARS, last_altar | bit, last_altar)
        num_lower = tl.sum((keys < (last_wall | bit)).to(tl.int32), axis=0)
        last_wall = tl.where(num_lower < MINES + ALTARS + WALLS, last_wall | bit, last_wall)
        bit = bit >> 1
    return last_mine, last_altar, last_wall


@triton.jit
def code_at(
    row, column, map_key, last_mine, last_altar, last_wall, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Returns what the map has at (row, column), both counted inside the border: EMPTY, MINE, ALTAR or WALL."""
    south = ((extend(map_key, -1) & 3) >> 1).to(tl.int32)
    slot_row = (row - south) >> 1
    east = ((extend(map_key, slot_row) & 3) >> 1).to(tl.int32)
    slot_column = (column - east) >> 1
    is_slot = (2 * slot_row + south == row) & (slot_row >= 0) & (slot_row < HEIGHT // 2)
    is_slot &= (2 * slot_column + east == column) & (slot_column >= 0) & (slot_column < WIDTH // 2)
    key = distinct_keys(map_key, slot_cell(slot_row, slot_column, WIDTH))
    codes = tl.where(key <= last_wall, WALL, EMPTY)
    codes = tl.where(key <= last_altar, ALTAR, codes)
    codes = tl.where(key <= last_mine, MINE, codes)
    return tl.where(is_slot, codes, EMPTY)


@triton.jit
def draw_map(
    views, amounts, map_key, last_mine, last_altar, last_wall,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ALTAR_STOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes the map, without agents, over one env's two views and its amounts, CHUNK cells at a time."""
    STRIDE: tl.constexpr = WIDTH + 2 * MARGIN
    NUM_CELLS: tl.constexpr = (HEIGHT + 2 * MARGIN) * STRIDE
    for start in range(0, NUM_CELLS, CHUNK):
        cell = start + tl.arange(0, CHUNK)
        row = cell // STRIDE - MARGIN
        column = cell % STRIDE - MARGIN
        codes = code_at(row, column, map_key, last_mine, last_altar, last_wall, HEIGHT, WIDTH)
        is_inside = (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
        codes = tl.where(is_inside, codes, WALL)
        is_cell = cell < NUM_CELLS
        tl.store(views + cell, codes.to(tl.uint8), mask=is_cell)
        tl.store(views + NUM_CELLS + cell, codes.to(tl.uint8), mask=is_cell)
        tl.store(amounts + cell, tl.where(codes == ALTAR, ALTAR_STOCK, 0).to(tl.uint8), mask=is_cell)


@triton.jit
def place_seats(
    episode_key, map_key, last_mine, last_altar, last_wall, seat_key, is_seat,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, NUM_AGENTS: tl.constexpr, INNER_LANES: tl.constexpr,
):  # fmt: skip
    """Returns where each seat starts, (SEATS,) int32 cells of the canvas.

    The free cells with the highest keys, dealt to the seats in the order of the seats' own keys.
    """
    inner = tl.arange(0, INNER_LANES)
    row = inner // WIDTH
    column = inner % WIDTH
    cell = (row + MARGIN) * (WIDTH + 2 * MARGIN) + column + MARGIN
    is_free = code_at(row, column, map_key, last_mine, last_altar, last_wall, HEIGHT, WIDTH) == EMPTY
    keys = distinct_keys(extend(episode_key, START_PLACE), cell)
    keys = tl.where(is_free & (row < HEIGHT), keys, -1)

    order = distinct_keys(extend(episode_key, SEAT_ORDER), seat_key)
    order = tl.where(is_seat, order, LARGEST)
    rank = tl.sum((order[None, :] < order[:, None]).to(tl.int32), axis=1)
    place = tl.zeros_like(rank)
    for i in range(NUM_AGENTS):
        highest = tl.max(keys, axis=0)
        place = tl.where(rank == i, tl.sum(tl.where(keys == highest, cell, 0), axis=0), place)
        keys = tl.where(keys == highest, -1, keys)
    return place


@triton.jit
def draw_episode(
    episode_key, views, amounts, seat_key, is_seat,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, MINES: tl.constexpr, ALTARS: tl.constexpr, WALLS: tl.constexpr,
    ALTAR_STOCK: tl.constexpr, NUM_AGENTS: tl.constexpr,
    SLOT_LANES: tl.constexpr, INNER_LANES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes a new episode's map and returns (cells, facings) of the seats, (SEATS,) int32 both.

    Args:
        episode_key: uint32 hash of seed, env and episode.
        views: one env's two views, 2 * C uint8, overwritten without agents.
        amounts: one env's C uint8, overwritten.
        seat_key: (SEATS,) int32.
        is_seat: (SEATS,) bool, False beyond the last seat.
        HEIGHT, WIDTH, MINES, ALTARS, WALLS, ALTAR_STOCK, NUM_AGENTS: of the config.
        SLOT_LANES, INNER_LANES, CHUNK: powers of two; slots at least, inner cells at least, cells drawn at a time.
    """
    map_key = extend(episode_key, MAP)
    last_mine, last_altar, last_wall = find_borders(map_key, HEIGHT, WIDTH, MINES, ALTARS, WALLS, SLOT_LANES)
    draw_map(views, amounts, map_key, last_mine, last_altar, last_wall, HEIGHT, WIDTH, ALTAR_STOCK, CHUNK)
    cell = place_seats(
        episode_key, map_key, last_mine, last_altar, last_wall, seat_key, is_seat,
        HEIGHT, WIDTH, NUM_AGENTS, INNER_LANES,
    )  # fmt: skip
    facing = (extend(extend(episode_key, START_FACING), seat_key) & 3).to(tl.int32) + 1
    return cell, facing
