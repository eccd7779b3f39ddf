"""The kernel that steps the arena, one program per env, with a lane per seat. Launched by `kernels/arena.py`.

The rule book of `envs/arena.py` holds word for word. Seats that want one cell are compared in pairs, in registers.
All reads of a step come before a barrier and all writes to what was read behind it. No two of these go to one address,
because a cell that is left in a step cannot be entered in it: old cells, new cells and altars are three different
things. An env whose episode ends draws its next one in the same program instead: the map, a barrier, the agents.
"""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# ruff: noqa: N803, N806 -- constants of a kernel are written in capitals

from __future__ import annotations

import triton
import triton.language as tl

from dual_policy_plugin import rng
from dual_policy_plugin.kernels.arena_maps import ALTAR, EMPTY, MARGIN, MINE, WALL, draw_episode
from dual_policy_plugin.kernels.hashing import distinct_keys, extend

ALLY, FOE, FROZEN_ALLY = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)  # a code + 1 is that of the other team
ATTACK = tl.constexpr(5)
PRIORITY = tl.constexpr(rng.PRIORITY)


@triton.jit
def resolve_claims(claiming, ahead, cell, priority):
    """Returns (SEATS,) bool: who has what it claims in the cell ahead; who is hit. By comparison of all pairs."""
    same = claiming[None, :] & (ahead[None, :] == ahead[:, None])
    highest = tl.max(tl.where(same, priority[None, :], -1), axis=1)
    hits = tl.max((claiming[None, :] & (ahead[None, :] == cell[:, None])).to(tl.int32), axis=1)
    return claiming & (highest == priority), hits > 0


@triton.jit
def put_cell(views, amounts, cell, own_code, other_code, amount, team, mask, NUM_CELLS: tl.constexpr):
    """Writes one cell per seat: its code into the view of the seat's team and into the other, and its amount."""
    tl.store(views + team * NUM_CELLS + cell, own_code.to(tl.uint8), mask=mask)
    tl.store(views + (1 - team) * NUM_CELLS + cell, other_code.to(tl.uint8), mask=mask)
    tl.store(amounts + cell, amount.to(tl.uint8), mask=mask)


@triton.jit
def step_kernel(
    actions, views, amounts, positions, view_cells, facings, carried,
    totals, steps_left, episodes, env_keys, priority_keys, seat_keys,
    teams, rewards, dones, episode_ends, final_totals,
    NUM_AGENTS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, MINES: tl.constexpr, ALTARS: tl.constexpr,
    WALLS: tl.constexpr, ALTAR_STOCK: tl.constexpr, ORE_CAPACITY: tl.constexpr, FREEZE_STEPS: tl.constexpr,
    ATTACK_COOLDOWN: tl.constexpr, EPISODE_STEPS: tl.constexpr,
    SEATS: tl.constexpr, SLOT_LANES: tl.constexpr, INNER_LANES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Steps one env a program. Pointers: `actions` (E, A) int64, then as in `ArenaTensors` and `StepResult`.

    SEATS, SLOT_LANES, INNER_LANES: powers of two that hold the agents, the slots and the inner cells.
    CHUNK: cells of a new map drawn at a time, a power of two.
    """
    STRIDE: tl.constexpr = WIDTH + 2 * MARGIN
    NUM_CELLS: tl.constexpr = (HEIGHT + 2 * MARGIN) * STRIDE
    env = tl.program_id(0).to(tl.int64)
    num_rows = tl.num_programs(0).to(tl.int64) * NUM_AGENTS  # from one layer of carried and totals to the next
    seat = tl.arange(0, SEATS)
    is_seat = seat < NUM_AGENTS
    rows = env * NUM_AGENTS + seat
    views += env * (2 * NUM_CELLS)
    amounts += env * NUM_CELLS
    carried += rows
    totals += rows
    seat_key = tl.load(seat_keys + seat, mask=is_seat, other=0)
    team = tl.load(teams + seat, mask=is_seat, other=0).to(tl.int32)

    # What each seat tries, given what stands ahead of it.
    cell = (tl.load(positions + rows, mask=is_seat, other=-1) - env * NUM_CELLS).to(tl.int32)
    cell = tl.where(is_seat, cell, -1)
    facing = tl.load(facings + rows, mask=is_seat, other=1).to(tl.int32)
    ore = tl.load(carried, mask=is_seat, other=0).to(tl.int32)
    frozen = tl.load(carried + 2 * num_rows, mask=is_seat, other=0).to(tl.int32)
    cooldown = tl.load(carried + 3 * num_rows, mask=is_seat, other=0).to(tl.int32)
    action = tl.load(actions + rows, mask=is_seat, other=0).to(tl.int32)
    action = tl.where(frozen > 0, 0, action)
    is_move = (action >= 1) & (action <= 4)
    facing = tl.where(is_move, action, facing)
    ahead = cell + tl.where(facing <= 2, tl.where(facing == 1, -STRIDE, STRIDE), tl.where(facing == 3, -1, 1))
    codes = tl.load(views + team * NUM_CELLS + ahead, mask=is_seat, other=WALL).to(tl.int32)
    amount = tl.load(amounts + ahead, mask=is_seat, other=0).to(tl.int32)
    going = is_move & (codes == EMPTY)
    mining = is_move & (codes == MINE) & (ore < ORE_CAPACITY)
    offering = is_move & (codes == ALTAR) & (ore > 0)
    hitting = (action == ATTACK) & (codes == FOE) & (cooldown == 0)

    # Attacks come first; of those who want one thing, the seat with the highest priority has it.
    left = tl.load(steps_left + env)
    priority = distinct_keys(extend(tl.load(priority_keys + env), left), seat_key)
    winning, hit = resolve_claims(going | offering | hitting, ahead, cell, priority)
    unhurt = hit == 0
    going &= winning & unhurt
    mining &= unhurt
    offering &= winning & unhurt

    ore = tl.where(hit, 0, ore) + mining.to(tl.int32) - offering.to(tl.int32) + tl.where(winning & hitting, amount, 0)
    ore = tl.minimum(ore, ORE_CAPACITY)
    frozen = tl.where(hit, FREEZE_STEPS, tl.maximum(frozen - 1, 0))
    cooldown = tl.where(hitting, ATTACK_COOLDOWN, tl.maximum(cooldown - 1, 0))
    hearts_made = tl.load(totals, mask=is_seat, other=0.0) + offering.to(tl.float32)
    ore_mined = tl.load(totals + num_rows, mask=is_seat, other=0.0) + mining.to(tl.float32)
    attacks = tl.load(totals + 2 * num_rows, mask=is_seat, other=0.0) + hitting.to(tl.float32)
    times_frozen = tl.load(totals + 3 * num_rows, mask=is_seat, other=0.0) + hit.to(tl.float32)

    episode = tl.load(episodes + env) + 1
    episode_key = extend(tl.load(env_keys + env), episode)
    left -= 1
    has_ended = left == 0
    tl.store(rewards + rows, offering.to(tl.float32), mask=is_seat)
    tl.store(dones + rows, has_ended, mask=is_seat)
    tl.store(episode_ends + env, has_ended)
    tl.debug_barrier()  # all has been read; from here on it is written
    if has_ended:
        finals = final_totals + 4 * rows
        tl.store(finals, hearts_made, mask=is_seat)
        tl.store(finals + 1, ore_mined, mask=is_seat)
        tl.store(finals + 2, attacks, mask=is_seat)
        tl.store(finals + 3, times_frozen, mask=is_seat)
        tl.store(episodes + env, episode)
        tl.store(priority_keys + env, extend(episode_key, PRIORITY).to(tl.int32))
        cell, facing = draw_episode(
            episode_key, views, amounts, seat_key, is_seat, HEIGHT, WIDTH, MINES, ALTARS, WALLS, ALTAR_STOCK,
            NUM_AGENTS, SLOT_LANES, INNER_LANES, CHUNK,
        )  # fmt: skip
        left += EPISODE_STEPS
        ore *= 0
        frozen *= 0
        cooldown *= 0
        hearts_made *= 0.0
        ore_mined *= 0.0
        attacks *= 0.0
        times_frozen *= 0.0
        tl.debug_barrier()  # the map is drawn; the agents are written over it
    else:
        stock = amount - 1
        altar_code = tl.where(stock == 0, WALL, ALTAR)
        put_cell(views, amounts, ahead, altar_code, altar_code, stock, team, offering, NUM_CELLS)
        nothing = tl.zeros_like(cell)
        put_cell(views, amounts, cell, nothing, nothing, nothing, team, going, NUM_CELLS)
        cell = tl.where(going, ahead, cell)

    codes = tl.where(frozen > 0, FROZEN_ALLY, ALLY)
    put_cell(views, amounts, cell, codes, codes + 1, ore, team, is_seat, NUM_CELLS)
    position = env * NUM_CELLS + cell
    tl.store(positions + rows, position, mask=is_seat)
    tl.store(view_cells + rows, position + (env + team) * NUM_CELLS, mask=is_seat)
    tl.store(view_cells + num_rows + rows, position + (env + 1 - team) * NUM_CELLS, mask=is_seat)
    tl.store(facings + rows, facing.to(tl.int64), mask=is_seat)
    tl.store(carried, ore.to(tl.uint8), mask=is_seat)
    tl.store(carried + num_rows, tl.minimum(hearts_made, 255.0).to(tl.int32).to(tl.uint8), mask=is_seat)
    tl.store(carried + 2 * num_rows, frozen.to(tl.uint8), mask=is_seat)
    tl.store(carried + 3 * num_rows, cooldown.to(tl.uint8), mask=is_seat)
    time_left = (255 * left + EPISODE_STEPS - 1) // EPISODE_STEPS
    tl.store(carried + 4 * num_rows, time_left.to(tl.uint8), mask=is_seat)
    tl.store(totals, hearts_made, mask=is_seat)
    tl.store(totals + num_rows, ore_mined, mask=is_seat)
    tl.store(totals + 2 * num_rows, attacks, mask=is_seat)
    tl.store(totals + 3 * num_rows, times_frozen, mask=is_seat)
    tl.store(steps_left + env, left)
