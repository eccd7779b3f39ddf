"""Players written by hand for the arena: random, forager, hunter. They anchor every rating, and serve as first NPCs.

They are policies like any other: they see the same 128 bytes, and their chance is expressed as logits, so the shared
sampler draws for them. Equally good actions have equal logits; bad ones are out of reach.

Paths are found on bit boards: a window row of 11 cells is one int32, so that a step of the search over all windows is
a few shifts. The search starts at the goals and spreads over free cells until it touches a neighbour of the agent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dual_policy_plugin.errors import SpacesError
from dual_policy_plugin.types import ObservationSpace

MOVES = ("north", "south", "west", "east")
"""In the order of the facings 1 to 4, which stand in the centre of a window."""
FEATURES = ("empty", "mine", "altar", "foe")
OWN = ("ore", "cooldown")
STRAIGHT_ON = 3.0
"""Logit of walking on in the same direction while no goal is in sight; that of a turn is 0."""
TURN_BACK = -3.0
OUT_OF_REACH = -1e9
LAST_RESORT = -1e6
"""Logit of noop: taken only where everything else is out of reach."""
FORAGE_STEPS = 16
"""Longest path to a mine or an altar that is searched for."""
HUNT_STEPS = 4
"""Longest path to a foe that a hunter follows."""


class ScriptedPolicy(nn.Module):
    """A `Policy` without weights and state: one of the `play_*` functions below, and where things stand."""

    state_size = 0
    move_actions: Tensor
    neighbours: Tensor
    neighbour_rows: Tensor
    neighbour_columns: Tensor
    opposite: Tensor
    bit_weights: Tensor

    def __init__(
        self,
        observation_space: ObservationSpace,
        actions: tuple[str, ...],
        *,
        play: Callable[[ScriptedPolicy, Tensor], Tensor],
    ) -> None:
        """Looks up by name where everything stands; SpacesError where env or actions are not the arena's."""
        super().__init__()
        _check_spaces(observation_space, actions)
        self.play = play
        self.num_actions = len(actions)
        self.noop, self.attack = actions.index("noop"), actions.index("attack")
        self.window = height, width = observation_space.window
        self.code = {name: observation_space.features.index(name) for name in FEATURES}
        self.own_byte = {name: height * width + observation_space.own.index(name) for name in OWN}
        self.row, self.column = height // 2, width // 2
        rows, columns = torch.tensor([-1, 1, 0, 0]) + self.row, torch.tensor([0, 0, -1, 1]) + self.column
        for name, table in (
            ("move_actions", torch.tensor([actions.index(name) for name in MOVES])),  # (4,) int64
            ("neighbours", rows * width + columns),  # (4,) bytes of the cells around the agent
            ("neighbour_rows", rows),
            ("neighbour_columns", columns.to(torch.int32)[:, None]),
            ("opposite", torch.tensor([1, 0, 3, 2])),
            ("bit_weights", 2.0 ** torch.arange(width)),  # (width,) float32
        ):
            self.register_buffer(name, table, persistent=False)

    def pack(self) -> None:
        """Nothing to take note of: there are no parameters."""

    def forward_step(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step: obs (num_rows, num_bytes) uint8 -> logits (num_rows, num_actions), values of 0, the same state."""
        return self.play(self, obs), torch.zeros(len(obs), device=obs.device), state

    def forward_segment(self, obs: Tensor, state: Tensor, dones: Tensor) -> tuple[Tensor, Tensor]:
        """A segment: obs (horizon, num_rows, num_bytes) -> logits and values with the leading dims of obs."""
        logits = self.play(self, obs.flatten(0, 1)).view(*obs.shape[:2], self.num_actions)
        return logits, torch.zeros(obs.shape[:2], device=obs.device)


def play_random(policy: ScriptedPolicy, obs: Tensor) -> Tensor:
    """Logits (num_rows, num_actions) of all actions alike."""
    return torch.zeros(len(obs), policy.num_actions, device=obs.device)


def play_forager(policy: ScriptedPolicy, obs: Tensor) -> Tensor:
    """Logits of one who carries ore to the nearest altar, without ore goes to the nearest mine, else explores."""
    has_ore = obs[:, policy.own_byte["ore"], None] > 0  # (num_rows, 1)
    goal_code = policy.code["mine"] + (policy.code["altar"] - policy.code["mine"]) * has_ore
    first = _first_moves(
        policy, _board(policy, obs, policy.code["empty"]), _board(policy, obs, goal_code), FORAGE_STEPS
    )
    moves = torch.where(first, 0.0, OUT_OF_REACH)
    moves = torch.where(first.any(dim=1, keepdim=True), moves, _explore(policy, obs))
    return _with_other_actions(policy, moves)


def play_hunter(policy: ScriptedPolicy, obs: Tensor) -> Tensor:
    """Logits of one who, whenever it may attack, goes for a foe nearby and hits it; else it is a forager."""
    is_ready = obs[:, policy.own_byte["cooldown"], None] == 0  # (num_rows, 1)
    foe = policy.code["foe"]
    first = _first_moves(policy, _board(policy, obs, policy.code["empty"]), _board(policy, obs, foe), HUNT_STEPS)
    chase = _with_other_actions(policy, torch.where(first, 0.0, OUT_OF_REACH))
    logits = torch.where(is_ready & first.any(dim=1, keepdim=True), chase, play_forager(policy, obs))
    ahead = obs[:, policy.neighbours].gather(1, _facing(policy, obs))  # (num_rows, 1)
    strike = torch.full((policy.num_actions,), OUT_OF_REACH, device=obs.device)
    strike[policy.attack] = 0.0
    return torch.where(is_ready & (ahead == foe), strike, logits)


def _board(policy: ScriptedPolicy, obs: Tensor, code: Tensor | int) -> Tensor:
    """Returns (height, num_rows) int32: bit x of row y tells whether the cell has `code`; the own cell never has.

    Args:
        policy: knows the window.
        obs: (num_rows, num_bytes) uint8.
        code: one, or one per row (num_rows, 1).
    """
    height, width = policy.window
    is_code = (obs[:, : height * width] == code).view(-1, height, width)
    board = (is_code.to(torch.float32) @ policy.bit_weights).T.to(torch.int32, memory_format=torch.contiguous_format)
    board[policy.row].bitwise_and_(~(1 << policy.column))
    return board


def _first_moves(policy: ScriptedPolicy, free: Tensor, goals: Tensor, max_steps: int) -> Tensor:
    """Returns (num_rows, 4) bool: the moves that begin a shortest path over free cells to, or onto, a goal.

    Args:
        policy: knows the window.
        free: (height, num_rows) int32 board of the cells one can walk on.
        goals: (height, num_rows) int32 board.
        max_steps: no longer path is found.
    """
    reached, spread = goals.clone(), torch.empty_like(goals)
    # For how many steps of the search a neighbour had been reached: the most for the first one.
    waited = torch.zeros(len(MOVES), goals.shape[1], dtype=torch.int32, device=goals.device)
    for _ in range(max_steps):
        waited += (reached.index_select(0, policy.neighbour_rows) >> policy.neighbour_columns) & 1
        torch.bitwise_left_shift(reached, 1, out=spread)
        spread |= reached >> 1
        spread[1:] |= reached[:-1]
        spread[:-1] |= reached[1:]
        reached |= spread.bitwise_and_(free)
    return ((waited == waited.amax(dim=0)) & (waited > 0)).T


def _explore(policy: ScriptedPolicy, obs: Tensor) -> Tensor:
    """Returns (num_rows, 4) logits: straight on most of the time, a turn where that is blocked, seldom back."""
    facing = _facing(policy, obs)
    moves = torch.zeros(len(obs), len(MOVES), device=obs.device)
    moves.scatter_(1, facing, STRAIGHT_ON).scatter_(1, policy.opposite[facing], TURN_BACK)
    return moves.masked_fill_(obs[:, policy.neighbours] != policy.code["empty"], OUT_OF_REACH)


def _facing(policy: ScriptedPolicy, obs: Tensor) -> Tensor:
    """Returns (num_rows, 1) int64: the facing as an index of MOVES; the centre of a window has it, counted from 1."""
    centre = policy.row * policy.window[1] + policy.column
    return obs[:, centre, None].to(torch.int64).sub_(1).clamp_(0, len(MOVES) - 1)


def _with_other_actions(policy: ScriptedPolicy, moves: Tensor) -> Tensor:
    """Returns (num_rows, num_actions) logits from those of the moves (num_rows, 4)."""
    logits = moves.new_full((len(moves), policy.num_actions), OUT_OF_REACH)
    logits[:, policy.noop] = LAST_RESORT
    return logits.index_copy_(1, policy.move_actions, moves)


def _check_spaces(space: ObservationSpace, actions: tuple[str, ...]) -> None:
    """Raises a SpacesError that names the first thing a scripted policy misses."""
    if space.kind != "window" or min(space.window) < 3:
        raise SpacesError(f"a scripted policy plays the arena only; this env's observations are of kind {space.kind}")
    for what, wanted, there in (
        ("feature", FEATURES, space.features),
        ("own-state byte", OWN, space.own),
        ("action", ("noop", *MOVES, "attack"), actions),
    ):
        for name in wanted:
            if name not in there:
                has = ", ".join(there) or "none"
                raise SpacesError(f"a scripted policy plays the arena only; this env has no {what} {name!r} but {has}")


SCRIPTED: dict[str, Callable[..., ScriptedPolicy]] = {
    "random": partial(ScriptedPolicy, play=play_random),
    "forager": partial(ScriptedPolicy, play=play_forager),
    "hunter": partial(ScriptedPolicy, play=play_hunter),
}
"""Name -> constructor (observation_space, actions)."""
