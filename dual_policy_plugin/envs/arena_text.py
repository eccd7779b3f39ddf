"""An arena's map as text, both ways: to set up a situation by hand, and to look at one.

A line per row of the inner map, a character per cell: `.` free, `#` wall, `M` mine, `A` altar, and for a seat the
character at its number in SEATS: 0 to 9, then small letters, then the large letters but A and M, then @$%&.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dual_policy_plugin.envs.arena import Arena
from dual_policy_plugin.envs.arena_config import ACTIONS
from dual_policy_plugin.envs.arena_maps import ALTAR, MARGIN

OBJECTS = ".#MA"
SEATS = "0123456789abcdefghijklmnopqrstuvwxyzBCDEFGHIJKLNOPQRSTUVWXYZ@$%&"


def write_map(
    arena: Arena,
    text: str,
    *,
    env: int = 0,
    facing: Mapping[int, str] | None = None,
    ore: Mapping[int, int] | None = None,
    frozen: Mapping[int, int] | None = None,
    cooldown: Mapping[int, int] | None = None,
    stock: int | None = None,
) -> None:
    """Replaces the map and the agents of one env; its clock and counters go on.

    Args:
        arena: an arena that was reset, of the size of the text.
        text: the map; every seat stands on it once. Rows stand apart by any blanks.
        env: which env.
        facing: seat -> north, south, west or east; north where not named.
        ore: seat -> ore; 0 where not named.
        frozen: seat -> frozen steps left; 0 where not named.
        cooldown: seat -> cooldown steps left; 0 where not named.
        stock: hearts that each altar has left; altar_stock if None.
    """
    rows = text.split()
    config, stride = arena.config, arena.drawer.stride
    if len(rows) != config.height or any(len(row) != config.width for row in rows):
        raise ValueError(f"the map is not {config.height} rows of {config.width}")
    codes, amounts = arena.drawer.blank.clone(), torch.zeros_like(arena.drawer.blank)
    places: dict[int, int] = {}
    for y, row in enumerate(rows):
        for x, character in enumerate(row):
            cell = (y + MARGIN) * stride + x + MARGIN
            if character in SEATS:
                places[SEATS.index(character)] = cell
            else:
                codes[cell] = OBJECTS.index(character)
    if sorted(places) != list(range(config.num_agents)):
        raise ValueError(f"the map has seats {sorted(places)}, not each of {config.num_agents} once")
    amounts[codes == ALTAR] = config.altar_stock if stock is None else stock
    arena.views[env] = codes
    arena.amounts[env] = amounts
    for seat, cell in places.items():
        arena.positions[env, seat] = env * arena.drawer.num_cells + cell
        arena.facings[env, seat] = ACTIONS.index((facing or {}).get(seat, "north"))
        for target, values in ((arena.ore, ore), (arena.frozen, frozen), (arena.cooldown, cooldown)):
            target[env, seat] = (values or {}).get(seat, 0)
    arena.place_agents()


def show_map(arena: Arena, env: int = 0) -> str:
    """Returns the map of one env as text."""
    codes = arena.views[env, 0].view(-1, arena.drawer.stride)
    inner = codes[MARGIN:-MARGIN, MARGIN:-MARGIN].tolist()
    rows = [[OBJECTS[code] if code <= ALTAR else "?" for code in row] for row in inner]
    for seat, position in enumerate(arena.positions[env].tolist()):
        y, x = divmod(position - env * arena.drawer.num_cells, arena.drawer.stride)
        rows[y - MARGIN][x - MARGIN] = SEATS[seat]
    return "\n".join("".join(row) for row in rows)
