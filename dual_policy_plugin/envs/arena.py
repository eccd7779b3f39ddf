"""The arena: two teams on a walled grid, all envs at once in plain tensor ops. Takes actions; gives observations.

Rule book
  Map. `height` x `width` cells inside a border of wall. Mines, altars and inner walls never touch each other, so each
    can be reached. Map, start places and facings are drawn anew for every episode.
  Time. An episode lasts `episode_steps` steps; the agents see how many are left, so its end is a termination.
  Actions. noop, north, south, west, east, attack. A frozen agent does nothing, whatever its action.
  Moving turns the agent to that side, even if it cannot go there. What stands in the cell ahead decides the rest:
    nothing: the agent goes there. An agent that leaves its cell in this step still blocks it in this step.
    mine: the agent takes 1 ore, unless it carries `ore_capacity`. Mines never run out.
    altar: the agent turns 1 ore into 1 heart, its reward of 1. After `altar_stock` hearts an altar is a wall.
    wall or agent: nothing happens.
  Attack works on a foe that stands in the cell ahead and is not frozen, if the attacker's cooldown is 0. The foe is
    frozen for the next `freeze_steps` steps and loses all its ore; the attacker takes that ore up to its capacity and
    the rest is lost. For the next `attack_cooldown` steps the attacker cannot attack. An attack on anything else does
    nothing and starts no cooldown. Own-team agents cannot be attacked.
  One step. Everything is decided on the state at the step's start. Attacks come first: an agent that is hit in a step
    neither moves, mines nor uses an altar in it, but its own attack counts (so two agents may freeze each other).
    Where several agents want one cell, one altar (one use per altar and step) or one foe's ore, the highest of their
    hashed priorities, drawn anew each step, has it; what an agent claimed and cannot take, because it was hit, goes to
    nobody. Every attacker of one foe pays its cooldown.
  Sight. An agent sees the 11x11 cells around it: empty, wall, mine, altar, ally, foe, frozen_ally, frozen_foe. Beyond
    the border all is wall. The centre is the agent itself: its code there is its facing, 1 north, 2 south, 3 west,
    4 east. Then five bytes of its own state: ore, hearts (255 at most), frozen steps left, cooldown steps left, and
    the time left, 255 at the start and above 0 until the end.

Randomness is a hash of (seed, env, episode, step, seat key, purpose). No rule looks at a seat's number: seats are told
apart by their keys and their teams only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dual_policy_plugin.config_checks import check_range
from dual_policy_plugin.envs.arena_config import (
    ACTIONS,
    COUNTERS,
    FEATURES,
    OWN,
    ROW_BYTES,
    WINDOW,
    ArenaConfig,
    observation_space,
    parse_arena_args,
    team_of_seat,
)
from dual_policy_plugin.envs.arena_maps import ALTAR, EMPTY, MARGIN, MINE, WALL, MapDrawer
from dual_policy_plugin.errors import RunError
from dual_policy_plugin.rng import GOLDEN, MAP, PRIORITY, distinct_keys, extend, hash32
from dual_policy_plugin.types import EnvSpec, StepResult

ALLY, FOE, FROZEN_ALLY, FROZEN_FOE = (FEATURES.index(name) for name in ("ally", "foe", "frozen_ally", "frozen_foe"))
NUM_CELLS_SEEN = WINDOW * WINDOW
CENTRE = NUM_CELLS_SEEN // 2
# What an action, given what stands ahead, tries to do; 0 is nothing.
GO, MINE_ORE, OFFER, HIT = 1, 2, 3, 4
STATE_NAMES = (
    "views", "amounts", "positions", "facings", "carried", "totals", "steps_left", "episodes", "env_keys",
    "priority_keys",
)  # fmt: skip


def make_arena(
    num_envs: int, args: dict[str, Any], device: torch.device | str, env_numbers: Sequence[int] | None = None
) -> Arena:
    """Returns an arena of num_envs copies; args are the config's `env` keys of the arena, checked."""
    return Arena(parse_arena_args(args), num_envs, device, env_numbers=env_numbers)


class Arena:
    """A `VecEnv`. E envs, A agents each, C canvas cells per env (the map and a margin of wall around it).

    Two layers hold the map. `views` has what each team sees, so that an observation is a plain gather; `amounts` has
    the ore of the agent, or the stock of the altar, that stands in a cell.

    A step writes every tensor in place, so that a captured CUDA graph goes on working; with `use_kernels` it also
    allocates nothing.
    """

    spec: EnvSpec
    use_kernels: bool = False
    """Whether `step` and `observe` are the kernels of `kernels/arena.py`, bit-equal to the torch ops here. For CUDA
    (or Triton's interpreter); set it before `reset`."""
    stays_ended: bool = False
    """Whether an ended episode stays as it is, to be looked at, and no next one begins; not with `use_kernels`."""

    def __init__(
        self,
        config: ArenaConfig,
        num_envs: int,
        device: torch.device | str = "cpu",
        *,
        env_numbers: Sequence[int] | None = None,
        seat_keys: Sequence[int] | None = None,
    ) -> None:
        """Allocates everything; `reset` must follow.

        Args:
            config: the settings.
            num_envs: how many envs, 1 to 65,536.
            device: where the state lives.
            env_numbers: the global number of each env (several ranks share one numbering), part of every draw: envs of
                one number play one episode, given equal actions. None: 0, 1, 2, ...
            seat_keys: distinct ints that tell the seats' draws apart; default 0, 1, 2, ...
        """
        check_range("env.num_envs", num_envs, 1, 65536)
        self.config, self.device = config, torch.device(device)
        self.spec = EnvSpec(
            name="arena",
            num_envs=num_envs,
            num_agents=config.num_agents,
            observation_space=observation_space(config),
            actions=ACTIONS,
            max_episode_steps=config.episode_steps,
            counters=COUNTERS,
        )
        keys = range(config.num_agents) if seat_keys is None else seat_keys
        self.seat_keys = torch.tensor(list(keys), dtype=torch.int32, device=self.device)  # (A,) int32
        self.drawer = MapDrawer(config, self.seat_keys)
        self._fixed_shapes = self.device.type != "cpu"
        self._allocate_state(num_envs, config.num_agents, self.drawer.num_cells)
        numbers = range(num_envs) if env_numbers is None else env_numbers
        assert len(numbers) == num_envs, "a number for every env"
        self.env_numbers = torch.tensor(list(numbers), dtype=torch.int64, device=self.device)  # (E,) global
        self._make_tables(num_envs, self.drawer.num_cells, self.drawer.stride)

    def _allocate_state(self, num_envs: int, num_agents: int, num_cells: int) -> None:
        """Allocates what changes between steps."""

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        rows = (num_envs, num_agents)
        self.views = zeros(num_envs, 2, num_cells, dtype=torch.uint8)  # (E, 2, C) codes, as team 0 and team 1 see them
        self.amounts = zeros(num_envs, num_cells, dtype=torch.uint8)  # (E, C)
        self.claims = torch.full((num_envs * num_cells,), -1, dtype=torch.int32, device=self.device)  # -1 between steps
        self.positions = zeros(*rows, dtype=torch.int64)  # (E, A) env * C + cell
        self.facings = zeros(*rows, dtype=torch.int64)  # (E, A) 1 north, 2 south, 3 west, 4 east
        self.carried = zeros(5, *rows, dtype=torch.uint8)  # (5, E, A) the own-state bytes, in the order of OWN
        self.ore, self.hearts, self.frozen, self.cooldown, self.time_left = self.carried.unbind(0)
        self.totals = zeros(len(COUNTERS), *rows, dtype=torch.float32)  # (4, E, A) in the order of COUNTERS
        self.steps_left = zeros(num_envs, dtype=torch.int32)  # (E,)
        self.episodes = zeros(num_envs, dtype=torch.int32)  # (E,) number of the current episode
        self.env_keys = zeros(num_envs, dtype=torch.int32)  # (E,) hash of seed and env
        self.priority_keys = zeros(num_envs, dtype=torch.int32)  # (E,) hash of seed, env, episode and PRIORITY
        self.due = zeros(self.config.episode_steps, 0, dtype=torch.int64)  # (episode_steps, K), see _plan_ends
        self.tick = zeros(1, dtype=torch.int64)  # (1,) row of `due` that comes next
        self.view_cells = zeros(2, *rows, dtype=torch.int64)  # (2, E, A) positions in the own, in the other team's view
        self.events = zeros(len(COUNTERS), *rows, dtype=torch.bool)  # (4, E, A) what this step adds to totals
        self.final_totals = zeros(*rows, len(COUNTERS), dtype=torch.float32)  # (E, A, 4) right where an episode ended
        self.result = StepResult(
            rewards=zeros(*rows, dtype=torch.float32),
            dones=zeros(*rows, dtype=torch.bool),
            episode_ends=zeros(num_envs, dtype=torch.bool),
            counters=self.final_totals,
        )

    def _make_tables(self, num_envs: int, num_cells: int, stride: int) -> None:
        """Makes the constant tensors."""

        def table(values: Any, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        config = self.config
        env = torch.arange(num_envs, device=self.device)
        self.cell_base = (env * num_cells)[:, None]  # (E, 1)
        self.teams = team = table(team_of_seat(config.teams, config.num_agents), torch.int64)  # (A,)
        # What leads from a position to the same cell of the own team's view, and of the other team's.
        own = (env[:, None] + team) * num_cells
        other = (env[:, None] + 1 - team) * num_cells
        self.to_views = torch.stack([own, other])  # (2, E, A)
        self.turns = table([0, 1, 2, 3, 4, 0], torch.int64)  # (6,) action -> new facing, 0: unchanged
        self.offsets = table([0, -stride, stride, -1, 1], torch.int64)  # (5,) facing -> step on the canvas
        kinds = [[0] * len(FEATURES) for _ in ACTIONS]
        for action in range(1, 5):
            kinds[action][EMPTY], kinds[action][MINE], kinds[action][ALTAR] = GO, MINE_ORE, OFFER
        kinds[ACTIONS.index("attack")][FOE] = HIT
        self.kinds = table(kinds, torch.uint8).flatten()  # (6 * 8,) action and code ahead -> what it tries
        self.kind_numbers = table([GO, MINE_ORE, OFFER, HIT], torch.uint8)[:, None, None]  # (4, 1, 1)
        self.agent_codes = table([ALLY, FOE], torch.uint8)[:, None, None]  # (2, 1, 1) in own, other view
        self.frozen_codes = table([FROZEN_ALLY, FROZEN_FOE], torch.uint8)[:, None, None]
        self.no_claim = torch.full((num_envs * config.num_agents,), -1, dtype=torch.int32, device=self.device)
        self.minus_one = table(-1, torch.int32)
        self.capacity = table(config.ore_capacity, torch.uint8)
        limit = config.episode_steps
        self.time_bytes = table([-(-255 * left // limit) for left in range(limit + 1)], torch.uint8)
        rows = torch.arange(WINDOW, device=self.device) - MARGIN
        self.window_rows = rows * stride - MARGIN  # (11,) from an agent's cell to the first cell of a window row
        # Every run of 11 neighbouring cells as a row that overlaps the next; a window is 11 of these.
        self.runs = self.views.as_strided((self.views.numel() - WINDOW + 1, WINDOW), (1, 1))

    def reset(self, seed: int, *, stagger: bool = False) -> None:
        """Starts a first episode in every env.

        With `stagger`, env e begins at step floor(frac(e * golden ratio) * episode_steps) of its first episode (e the
        global number): spread evenly over the clock for any range of envs, and neighbours far apart.
        """
        self.env_keys.copy_(hash32(seed, MAP, self.env_numbers))
        self.episodes.fill_(-1)
        self.totals.zero_()
        self._begin_episodes(torch.arange(self.spec.num_envs, device=self.device), None)
        if stagger:
            begun = ((self.env_numbers * (GOLDEN % 2**32)) & 0xFFFFFFFF) * self.config.episode_steps >> 32
            self.steps_left.sub_(begun.to(torch.int32))
        self._show_time()
        self._plan_ends()

    def step(self, actions: Tensor) -> StepResult:
        """Steps all envs with actions (E, A) int64; the next observation of an ended env is of its next episode."""
        if self.use_kernels:
            from dual_policy_plugin.kernels.arena import step_arena

            step_arena(self, actions)
            return self.result
        result, events = self.result, self.events
        awake = self.frozen.logical_not()  # (E, A) bool, like all flags below
        choice = actions * awake
        turned = torch.take(self.turns, choice)
        torch.where(turned.bool(), turned, self.facings, out=self.facings)
        ahead = self.positions + torch.take(self.offsets, self.facings)  # (E, A) the cell in front
        code = torch.take(self.views, ahead + self.to_views[0])
        amount = torch.take(self.amounts, ahead)  # ore of the agent, or stock of the altar, ahead
        kind = torch.take(self.kinds, choice.mul_(len(FEATURES)).add_(code))
        going, mining, offering, hitting = (kind == self.kind_numbers).unbind(0)
        ready = self.cooldown.logical_not()
        mining &= self.ore < self.capacity
        offering &= self.ore.bool()
        hitting &= ready

        claiming = going | offering | hitting
        winning, hit = self._resolve_claims(claiming, ahead)
        unhurt = hit.logical_not()
        winning_unhurt = winning & unhurt
        going &= winning_unhurt
        mining &= unhurt
        offering &= winning_unhurt

        self.ore.mul_(unhurt.view(torch.uint8)).add_(mining.view(torch.uint8)).sub_(offering.view(torch.uint8))
        self.ore.add_(amount * (winning & hitting)).clamp_(max=self.config.ore_capacity)
        self.frozen.sub_(awake.logical_not_().view(torch.uint8)).masked_fill_(hit, self.config.freeze_steps)
        self.cooldown.sub_(ready.logical_not_().view(torch.uint8)).masked_fill_(hitting, self.config.attack_cooldown)
        torch.stack((offering, mining, hitting, hit), out=events)
        self.totals.add_(events)
        self.hearts.copy_(self.totals[0].clamp(max=255))
        result.rewards.copy_(offering)

        self._draw_changes(ahead, amount, going, offering)
        self._advance_clock()
        return result

    def _resolve_claims(self, claiming: Tensor, ahead: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (E, A) bool: who has what it claims in the cell ahead; who is hit.

        A cell is claimed by those who would go there, or offer there, or hit the one who stands there: never by two
        kinds at once. Priorities of one env's seats are distinct, and a maximum does not depend on the order.
        """
        step_keys = extend(self.priority_keys, self.steps_left)[:, None]
        priority = torch.where(claiming, distinct_keys(step_keys, self.seat_keys), self.minus_one)
        cells = ahead.view(-1)
        self.claims.scatter_reduce_(0, cells, priority.view(-1), "amax")
        winning = torch.take(self.claims, ahead).eq(priority).logical_and_(claiming)
        hit = torch.take(self.claims, self.positions) > self.minus_one
        self.claims.scatter_(0, cells, self.no_claim)
        return winning, hit

    def _draw_changes(self, ahead: Tensor, amount: Tensor, going: Tensor, offering: Tensor) -> None:
        """Moves those who are going and brings both layers up to date."""
        views, amounts = self.views.view(-1), self.amounts.view(-1)
        # Lift all agents off the map. One who offers writes to the altar instead; its own cell is rewritten below.
        stock = (amount - offering.view(torch.uint8)).mul_(offering)
        spent = offering.logical_xor(stock)  # offered, and nothing is left: the altar becomes a wall
        target = torch.where(offering, ahead, self.positions)
        amounts.scatter_(0, target.view(-1), stock.view(-1))
        target = torch.where(spent, ahead, self.positions)
        erased = spent.view(torch.uint8) * WALL
        views.scatter_(0, (target + self.to_views).view(-1), erased.expand(2, *erased.shape).reshape(-1))
        torch.where(going, ahead, self.positions, out=self.positions)
        self.place_agents()

    def place_agents(self) -> None:
        """Writes the agents onto both layers, at their positions."""
        torch.add(self.positions, self.to_views, out=self.view_cells)
        codes = torch.where(self.frozen.bool(), self.frozen_codes, self.agent_codes)  # (2, E, A)
        self.views.view(-1).scatter_(0, self.view_cells.view(-1), codes.view(-1))
        self.amounts.view(-1).scatter_(0, self.positions.view(-1), self.ore.view(-1))

    def _advance_clock(self) -> None:
        """Counts the step, says which episodes it ended, and begins the next ones."""
        ends = self.result.episode_ends
        self.steps_left.sub_(1)
        torch.logical_not(self.steps_left, out=ends)
        self.result.dones.copy_(ends[:, None])
        if self.stays_ended:
            self.final_totals.copy_(self.totals.permute(1, 2, 0))
        elif self._fixed_shapes:
            ids = self.due.index_select(0, self.tick)[0]  # (K,)
            self.tick.add_(1).remainder_(self.config.episode_steps)
            self.final_totals.copy_(self.totals.permute(1, 2, 0))
            self._begin_episodes(ids, ends.index_select(0, ids))
        elif ends.any():
            self.final_totals.copy_(self.totals.permute(1, 2, 0))
            self._begin_episodes(ends.nonzero().squeeze(1), None)
        self._show_time()

    def _begin_episodes(self, ids: Tensor, begins: Tensor | None) -> None:
        """Begins the next episode in the envs ids (n,) int64: all of them, or where begins (n,) bool.

        An id may repeat only where it does not begin.
        """

        def put(target: Tensor, value: Tensor, dim: int = 0) -> None:
            if begins is not None:
                mask = begins.view([-1 if axis == dim else 1 for axis in range(target.dim())])
                value = torch.where(mask, value, target.index_select(dim, ids))
            target.index_copy_(dim, ids, value.to(target.dtype))

        num, num_agents = len(ids), self.config.num_agents
        episodes = self.episodes.index_select(0, ids) + 1
        keys = extend(self.env_keys.index_select(0, ids), episodes)
        new = self.drawer.draw(keys)
        put(self.episodes, episodes)
        put(self.priority_keys, extend(keys, PRIORITY))
        put(self.steps_left, torch.full_like(episodes, self.config.episode_steps))
        put(self.views, new.codes[:, None].expand(-1, 2, -1))
        put(self.amounts, new.stock)
        put(self.positions, new.cells + self.cell_base.index_select(0, ids))
        put(self.facings, new.facings)
        put(self.carried, self.carried.new_zeros(len(OWN), num, num_agents), dim=1)
        put(self.totals, self.totals.new_zeros(len(COUNTERS), num, num_agents), dim=1)
        self.place_agents()

    def _show_time(self) -> None:
        """Writes the time left into the own-state bytes."""
        self.time_left.copy_(self.time_bytes.index_select(0, self.steps_left)[:, None])

    def _plan_ends(self) -> None:
        """Tabulates which envs end at which tick, for devices on which a step may not ask how many ended.

        All episodes have one length, so an env ends every episode_steps ticks. Row t of `due` (episode_steps, K) has
        the envs that end at tick t, K at most; a shorter row is filled with an env that does not end then.
        The kernels do without: a program reads its env's clock.
        """
        if not self._fixed_shapes or self.use_kernels:
            return
        limit = self.config.episode_steps
        rows: list[list[int]] = [[] for _ in range(limit)]
        for env, left in enumerate(self.steps_left.tolist()):
            rows[left - 1].append(env)
        width = max(map(len, rows))
        firsts = [row[0] for row in rows if row][:2]
        for row in rows:
            filler = firsts[-1] if row and row[0] == firsts[0] else firsts[0]
            row.extend([filler] * (width - len(row)))
        due = torch.tensor(rows, dtype=torch.int64, device=self.device)
        if due.shape == self.due.shape:
            self.due.copy_(due)  # in place, for a captured graph; one captured before K changed is void
        else:
            self.due = due
        self.tick.zero_()

    def observe(self, seats: Tensor, out: Tensor) -> None:
        """Writes what seats (S,) int64 see into out (E * S, 128) uint8, env-major; costs in proportion to S."""
        if self.use_kernels:
            from dual_policy_plugin.kernels.arena import observe_arena

            observe_arena(self, seats, out)
            return
        cells = self.view_cells[0].index_select(1, seats)  # (E, S)
        starts = cells.view(-1, 1) + self.window_rows  # (E * S, 11)
        seen = self.runs.index_select(0, starts.view(-1))  # (E * S * 11, 11)
        out[:, :NUM_CELLS_SEEN].copy_(seen.view(-1, NUM_CELLS_SEEN))
        grid = out.view(*cells.shape, ROW_BYTES)  # (E, S, 128)
        grid[..., CENTRE].copy_(self.facings.index_select(1, seats))
        own_end = NUM_CELLS_SEEN + len(OWN)
        grid[..., NUM_CELLS_SEEN:own_end].copy_(self.carried.index_select(2, seats).permute(1, 2, 0))
        out[:, own_end:].zero_()

    def observe_final(self, seats: Tensor, out: Tensor) -> None:
        """Leaves `out` as it is: no arena episode is truncated."""

    def close(self) -> None:
        """Does nothing: the arena holds no worker and no file."""

    def state_dict(self) -> dict[str, Tensor]:
        """Returns all that a continuation needs, by name: copies, on the env's device."""
        return {name: getattr(self, name).clone() for name in STATE_NAMES}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes up a state of an arena with the same settings, in place; RunError where names or shapes differ."""
        for name in STATE_NAMES:
            wanted, got = getattr(self, name), state.get(name)
            if got is None or got.shape != wanted.shape or got.dtype != wanted.dtype:
                came = "is missing" if got is None else f"is {got.dtype} {tuple(got.shape)}"
                raise RunError(f"arena state: {name} {came}, expected {wanted.dtype} {tuple(wanted.shape)}")
        for name in STATE_NAMES:
            getattr(self, name).copy_(state[name])
        self.place_agents()
        self._plan_ends()
