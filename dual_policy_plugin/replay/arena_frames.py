"""Plays an arena's game once more, on the host, and notes what stands where. Takes a Game; gives Frames.

The arena is the same bit for bit on every device, so the actions are all that is needed of the game itself.
"""

from __future__ import annotations

from typing import Any

import torch

from dual_policy_plugin.envs.arena import Arena, make_arena
from dual_policy_plugin.envs.arena_config import OWN
from dual_policy_plugin.envs.arena_maps import ALTAR, MARGIN, MINE, WALL
from dual_policy_plugin.replay.frames import Frames, Game, empty_frames

SHOWN = OWN[:-1]  # the time left is the same for all


def arena_frames(game: Game, args: dict[str, Any]) -> Frames:
    """The frames of a game.

    Args:
        game: from the arena.
        args: the config's `env` keys of the arena.
    """
    arena = make_arena(1, args, "cpu", env_numbers=[game.number])
    arena.stays_ended = True
    arena.reset(game.seed)
    config, stride = arena.config, arena.drawer.stride
    codes = arena.views[0, 0].view(-1, stride)[MARGIN:-MARGIN, MARGIN:-MARGIN].flatten()
    walls, mines, altars = ((codes == code).nonzero().flatten().tolist() for code in (WALL, MINE, ALTAR))
    arrays = empty_frames(len(game.actions) + 1, config.num_agents, SHOWN, len(altars))
    _note(arena, altars, arrays, 0)
    for t, actions in enumerate(torch.from_numpy(game.actions).long()):
        rewards = arena.step(actions.unsqueeze(0)).rewards[0]
        arrays["returns"][t + 1] = arrays["returns"][t] + rewards.numpy()
        _note(arena, altars, arrays, t + 1)
    return Frames(
        height=config.height, width=config.width, actions=game.actions, walls=walls, mines=mines, altars=altars,
        **arrays,
    )  # fmt: skip


def _note(arena: Arena, altars: list[int], arrays: dict[str, Any], t: int) -> None:
    """Writes how the arena stands into frame t."""
    stride, width = arena.drawer.stride, arena.config.width
    arrays["cells"][t] = (arena.positions[0] // stride - MARGIN) * width + arena.positions[0] % stride - MARGIN
    arrays["facings"][t] = arena.facings[0]
    for name, values in zip(SHOWN, arena.carried[:, 0], strict=False):
        arrays["state"][name][t] = values
    inner = arena.amounts[0].view(-1, stride)[MARGIN:-MARGIN, MARGIN:-MARGIN].flatten()
    arrays["stocks"][t] = inner[altars]
