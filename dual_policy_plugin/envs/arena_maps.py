"""Draws the maps and start places of new arena episodes, many at once. Called by `envs/arena.py`.

Every draw is a hash of an episode's key, so a map depends on (seed, env, episode) alone.

Objects (mines, altars, inner walls) stand on slots two cells apart: one slot per 2x2 block, all rows of slots shifted
south by 0 or 1, and each row shifted east by 0 or 1 for itself. So no two objects touch, not even at a corner, and an
object that touches the border touches nothing else: the free cells stay connected and each object can be reached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dual_policy_plugin.envs.arena_config import FEATURES, WINDOW, ArenaConfig
from dual_policy_plugin.rng import MAP, SEAT_ORDER, START_FACING, START_PLACE, distinct_keys, extend

EMPTY, WALL, MINE, ALTAR = (FEATURES.index(name) for name in ("empty", "wall", "mine", "altar"))
MARGIN = WINDOW // 2
"""Wall cells drawn around the inner map, so that a window never leaves the canvas."""


@dataclass(kw_only=True, slots=True, frozen=True)
class NewEpisodes:
    """How n episodes begin. A cell is row * stride + column on the canvas, margin included."""

    codes: Tensor
    """(n, num_cells) uint8: what stands where, agents left out."""
    stock: Tensor
    """(n, num_cells) uint8: altar_stock at altars, else 0."""
    cells: Tensor
    """(n, num_agents) int64: where each seat starts."""
    facings: Tensor
    """(n, num_agents) int32: 1 north, 2 south, 3 west, 4 east."""


class MapDrawer:
    """Holds the constant tables from which episodes are drawn."""

    def __init__(self, config: ArenaConfig, seat_keys: Tensor) -> None:
        """Builds the tables on the device of seat_keys (num_agents,) int32, which tell the seats' draws apart."""
        self.config, self.seat_keys, device = config, seat_keys, seat_keys.device
        self.stride = config.width + 2 * MARGIN
        self.num_cells = (config.height + 2 * MARGIN) * self.stride
        rows = torch.arange(config.height, device=device) + MARGIN
        columns = torch.arange(config.width, device=device) + MARGIN
        self.inner_cells = (rows[:, None] * self.stride + columns).flatten()  # (height * width,) int64
        self.blank = torch.full((self.num_cells,), WALL, dtype=torch.uint8, device=device)  # (num_cells,)
        self.blank[self.inner_cells] = EMPTY
        slot_rows = torch.arange(config.height // 2, device=device)  # (slot_rows,)
        slot_columns = torch.arange(config.width // 2, device=device)
        slots = (2 * slot_rows[:, None] + MARGIN) * self.stride + 2 * slot_columns + MARGIN
        self.slot_cells = slots.flatten()  # (num_slots,) int64, before the shifts
        self.slot_row_of = slot_rows[:, None].expand_as(slots).flatten()  # (num_slots,) int64
        codes = [MINE] * config.mines + [ALTAR] * config.altars + [WALL] * config.walls
        self.object_codes = torch.tensor(codes, dtype=torch.uint8, device=device)  # (num_objects,)
        self.object_stock = (self.object_codes == ALTAR).to(torch.uint8) * config.altar_stock

        # All draws of an episode in two hashes: plain draws, and keys that are distinct within a purpose.
        kinds = [MAP] * (1 + len(slot_rows)) + [START_FACING] * len(seat_keys)
        self.draw_purposes = torch.tensor(kinds, dtype=torch.int32, device=device)
        self.draw_ids = torch.cat([slot_rows.new_tensor([-1]), slot_rows, seat_keys]).to(torch.int32)
        self.draw_sizes = (1, len(slot_rows), len(seat_keys))
        self.order_sizes = (len(self.slot_cells), len(self.inner_cells), len(seat_keys))
        kinds = [
            kind
            for kind, size in zip((MAP, START_PLACE, SEAT_ORDER), self.order_sizes, strict=True)
            for _ in range(size)
        ]
        self.order_purposes = torch.tensor(kinds, dtype=torch.int32, device=device)
        self.order_ids = torch.cat([self.slot_cells, self.inner_cells, seat_keys]).to(torch.int32)

    def draw(self, episode_keys: Tensor) -> NewEpisodes:
        """Returns the begin of an episode for each of episode_keys (n,) int32."""
        n, num_agents = len(episode_keys), self.config.num_agents
        draws = extend(episode_keys[:, None], self.draw_purposes, self.draw_ids)
        south, east, facing = draws.bitwise_and_(3).split_with_sizes(self.draw_sizes, dim=1)
        keys = extend(episode_keys[:, None], self.order_purposes)
        slot_order, cell_order, seat_order = distinct_keys(keys, self.order_ids).split_with_sizes(
            self.order_sizes, dim=1
        )

        slots = slot_order.argsort(dim=1)[:, : self.config.num_objects]  # (n, num_objects)
        east = (east >> 1).gather(1, self.slot_row_of[slots])
        objects = self.slot_cells[slots] + (south >> 1) * self.stride + east
        codes = self.blank.expand(n, -1).clone().scatter_(1, objects, self.object_codes.expand(n, -1))
        stock = torch.zeros_like(codes).scatter_(1, objects, self.object_stock.expand(n, -1))
        # The free cells with the highest keys, dealt to the seats in the order of the seats' own keys.
        taken = codes.index_select(1, self.inner_cells).bool()
        places = self.inner_cells[cell_order.masked_fill(taken, -1).topk(num_agents, dim=1).indices]
        cells = torch.empty_like(places).scatter_(1, seat_order.argsort(dim=1), places)
        return NewEpisodes(codes=codes, stock=stock, cells=cells, facings=facing + 1)
