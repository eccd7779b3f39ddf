"""Plays a MettaGrid game once more, in this process, and notes what stands where. Takes a Game; gives Frames.

`grid_objects()` costs twenty times a step: nobody else asks for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dual_policy_plugin.envs.host import Rows, episode_seed
from dual_policy_plugin.envs.mettagrid import MettagridConfig, MettagridHost, make
from dual_policy_plugin.envs.shared_rows import row_fields
from dual_policy_plugin.replay.frames import FACINGS, Frames, Game, empty_frames

BORDER = 1  # cells of wall around the map
KINDS = ("wall", "mine", "altar")
SHOWN = {"ore": "ore", "hearts": "heart"}  # our name -> MettaGrid's resource


def mettagrid_frames(game: Game, args: dict[str, Any]) -> Frames:
    """The frames of a game.

    Args:
        game: from MettaGrid.
        args: `env.args`.
    """
    host, config = make(0, **args), MettagridConfig(**args)
    rows = Rows(**{name: np.zeros(shape, dtype) for name, (dtype, shape) in row_fields(host.spec).items()})
    turns = [FACINGS.index(name.removeprefix("move_")) if "_" in name else 0 for name in host.spec.actions]
    host.start(episode_seed(game.seed, game.number, 0), rows)
    try:
        things = list(host.simulation.grid_objects().values())
        walls, mines, altars = ([_cell(one, config) for one in things if one["type_name"] == kind] for kind in KINDS)
        walls = [cell for cell in walls if cell >= 0]
        arrays = empty_frames(len(game.actions) + 1, config.num_agents, tuple(SHOWN), len(altars))
        _note(host, config, altars, arrays, 0)
        for t, actions in enumerate(game.actions):
            rows.actions[:] = actions
            host.step(rows)
            turned = np.array(turns, np.uint8)[actions]
            arrays["facings"][t + 1] = np.where(turned > 0, turned, arrays["facings"][t])
            arrays["returns"][t + 1] = arrays["returns"][t] + rows.rewards
            _note(host, config, altars, arrays, t + 1)
    finally:
        host.close()
    return Frames(
        height=config.size, width=config.size, actions=game.actions, walls=walls, mines=mines, altars=altars, **arrays
    )


def _cell(thing: dict[str, Any], config: MettagridConfig) -> int:
    """Where a thing stands inside the border; -1 for the border itself."""
    row, column = thing["r"] - BORDER, thing["c"] - BORDER
    return row * config.size + column if 0 <= row < config.size and 0 <= column < config.size else -1


def _note(host: MettagridHost, config: MettagridConfig, altars: list[int], arrays: dict[str, Any], t: int) -> None:
    """Writes how the game stands into frame t; seats in our order."""
    resources = host.simulation.resource_names
    seat_of_agent = np.argsort(host.agent_of_seat)
    for thing in host.simulation.grid_objects().values():
        if thing["type_name"] == "agent":
            seat = seat_of_agent[thing["agent_id"]]
            arrays["cells"][t, seat] = _cell(thing, config)
            for name, resource in SHOWN.items():
                arrays["state"][name][t, seat] = thing["inventory"].get(resources.index(resource), 0)
        elif thing["type_name"] == "altar":
            hearts = thing["inventory"].get(resources.index("heart"), 0)
            arrays["stocks"][t, altars.index(_cell(thing, config))] = hearts
