"""A mine-and-altar game on MettaGrid, built from `env.args`, as a host.

Rules: an agent that moves onto a mine gets one ore (up to `ore_limit`), onto an altar turns one ore into one heart
from the altar's stock of `hearts`, which is finite, so agents compete. Reward: hearts gained. After `steps` steps the
episode is truncated. Walls, mines, altars and agents lie at random, drawn anew for every episode.

We drive the simulator itself: its Puffer class needs pufferlib and resets one step late. MettaGrid numbers agents by
their place on the map, row by row, and shows the numbers; a policy that trains on the first seats would learn to be a
northerner called 0 to 3 and be lost on the others. So seats are dealt to the agents anew in every episode, and the
numbers in the observations are zeroed (`agent_numbers: true` keeps them).

Location bytes need no translation: MettaGrid's are row << 4 | column too, with 0xFE for global and 0xFF for padding.
Features do. A net weighs a feature's vector by the token's value, and MettaGrid numbers what it has names for: an agent
is a `tag` of value 0, which weighs nothing, an altar half a mine. So each kind of object and each last action is a
feature of its own with value 1 here (`type:altar`, `last_action:noop`), counts are scaled by their limits, and tokens
that say nothing in this game (group, vibe) become padding where they stand.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dual_policy_plugin.config_checks import check, check_range
from dual_policy_plugin.envs.host import HostSpec, Rows
from dual_policy_plugin.errors import EnvError
from dual_policy_plugin.types import ObservationSpace

RESOURCES = ("ore", "heart")
COUNTERS = {"hearts": "heart.gained", "ore": "ore.gained"}  # our name -> MettaGrid's agent statistic
COMPLETION, LAST_ACTION, TAG, AGENT_ID = "episode_completion_pct", "last_action", "tag", "agent_id"
PADDING = 0xFF  # as location, feature and value
TOKENS_PER_AGENT = 6  # type, group, number, vibe, ore, hearts
TOKENS_PER_ALTAR = 3  # type, hearts, hearts / 256
GLOBAL_TOKENS = 2  # time, last action


@dataclass(kw_only=True, slots=True, frozen=True)
class MettagridConfig:
    """`env.args` of env.name=mettagrid."""

    num_agents: int = 8
    """Seats per env."""
    size: int = 16
    """Rows and columns inside the outer wall."""
    steps: int = 256
    """Length of an episode."""
    mines: int = 6
    """Cells that give ore."""
    altars: int = 4
    """Cells that turn one ore into one heart."""
    walls: int = 10
    """Single wall cells inside."""
    hearts: int = 16
    """Stock of each altar at an episode's start."""
    ore_limit: int = 5
    """How much ore an agent can carry."""
    window: int = 11
    """Rows and columns of the window an agent sees; odd."""
    num_tokens: int | None = None
    """Observation tokens per agent; None: as many as can ever be needed."""
    agent_numbers: bool = False
    """Whether an agent sees its own number and those of others."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("num_agents", 1, 64), ("size", 3, 200), ("steps", 1, 100_000), ("mines", 0, 1000), ("altars", 0, 1000),
            ("walls", 0, 10_000), ("hearts", 0, 65_535), ("ore_limit", 1, 255), ("window", 3, 15),
        ):  # fmt: skip
            value = getattr(self, name)
            check(type(value) is int, f"env.{name}", value, "use a whole number")
            check_range(f"env.{name}", value, low, high)
        check(self.window % 2 == 1, "env.window", self.window, "use an odd number")
        things, cells = self.num_agents + self.mines + self.altars + self.walls, self.size**2
        check(things <= cells, "env.size", self.size, f"{things} agents and objects do not fit into {cells} cells")
        check(type(self.num_tokens) in (int, type(None)), "env.num_tokens", self.num_tokens, "use a number or null")
        if self.num_tokens is not None:
            needed = tokens_needed(self)
            check(self.num_tokens >= needed, "env.num_tokens", self.num_tokens, f"use at least {needed}, or null")


def tokens_needed(config: MettagridConfig) -> int:
    """The most tokens one observation can hold: everything there is in one window, and the outer wall around it."""
    cells = config.window**2
    counts = ((config.num_agents, TOKENS_PER_AGENT), (config.altars, TOKENS_PER_ALTAR), (config.mines, 1))
    total = GLOBAL_TOKENS
    for count, tokens in counts:  # the richest things first: no more of them than cells
        total += min(count, cells) * tokens
        cells -= min(count, cells)
    # Of the outer wall a window smaller than the map sees two sides that meet, a larger one all four.
    sides = 2 * config.window - 1 if config.window // 2 < config.size - config.window // 2 else 4 * (config.size + 1)
    return total + min(cells, config.walls + sides)


def check_args(**args: Any) -> None:
    """Raises a ConfigError unless the args are possible."""
    MettagridConfig(**args)


def make(index: int, **args: Any) -> MettagridHost:
    """One game; an EnvError where MettaGrid is not installed."""
    del index
    try:
        importlib.import_module("mettagrid.simulator.simulator")
    except ImportError as error:
        raise EnvError(f"env.name=mettagrid cannot be imported ({error}); pip install mettagrid==0.26.22") from error
    return MettagridHost(MettagridConfig(**args))


def game_config(config: MettagridConfig) -> Any:
    """The game in MettaGrid's own terms (a MettaGridConfig)."""
    from mettagrid.config import action_config as actions
    from mettagrid.config import handler_config as handlers
    from mettagrid.config import mettagrid_config as grid
    from mettagrid.config.obs_config import GlobalObsConfig, ObsConfig
    from mettagrid.config.reward_config import inventoryReward
    from mettagrid.mapgen.mapgen import MapGenConfig
    from mettagrid.mapgen.scenes.random import RandomConfig

    dig = handlers.Handler(mutations=[handlers.updateActor({"ore": 1})])
    offer = handlers.Handler(
        filters=[handlers.actorHas({"ore": 1}), handlers.targetHas({"heart": 1})],
        mutations=[handlers.updateActor({"ore": -1}), handlers.withdraw({"heart": 1})],
    )
    stock = grid.InventoryConfig(initial={"heart": config.hearts})
    purse = grid.InventoryConfig(
        default_limit=config.ore_limit, limits={"heart": grid.ResourceLimitsConfig(base=65_535, resources=["heart"])}
    )
    scene = RandomConfig(
        agents=config.num_agents,
        objects={"wall": config.walls, "mine": config.mines, "altar": config.altars},
        too_many_is_ok=False,
    )
    return grid.MettaGridConfig(
        game=grid.GameConfig(
            num_agents=config.num_agents,
            max_steps=config.steps,
            episode_truncates=True,
            resource_names=list(RESOURCES),
            obs=ObsConfig(
                width=config.window,
                height=config.window,
                num_tokens=config.num_tokens or tokens_needed(config),
                global_obs=GlobalObsConfig(last_reward=False),  # here it would always be 0
            ),
            actions=actions.ActionsConfig(
                noop=actions.NoopActionConfig(),
                move=actions.MoveActionConfig(),
                change_vibe=actions.ChangeVibeActionConfig(enabled=False),
            ),
            objects={
                "wall": grid.WallConfig(),
                "mine": grid.GridObjectConfig(name="mine", on_use_handler=dig),
                "altar": grid.GridObjectConfig(name="altar", inventory=stock, on_use_handler=offer),
            },
            agent=grid.AgentConfig(inventory=purse, rewards={"heart": inventoryReward("heart")}),
            map_builder=MapGenConfig(width=config.size, height=config.size, border_width=1, seed=0, instance=scene),
        )
    )


def feature_scales(config: MettagridConfig, interface: Any) -> dict[str, float]:
    """Name -> scale of every feature that an observation here may hold, in their order."""
    scales = {COMPLETION: 255.0}
    scales |= {f"{LAST_ACTION}:{action}": 1.0 for action in interface.action_names}
    scales |= dict.fromkeys(interface.tags, 1.0)
    scales |= {"inv:ore": float(config.ore_limit), "inv:heart": float(max(1, min(config.hearts, 255)))}
    scales |= {"inv:heart:p1": 1.0}  # hearts / 256
    return scales | ({AGENT_ID: float(config.num_agents)} if config.agent_numbers else {})


def translation(interface: Any, features: tuple[str, ...]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """What MettaGrid's feature and value become, ours both (256 * 256,), at place feature * 256 + value."""
    number = {name: index for index, name in enumerate(features)}
    feature_of = np.full((256, 256), PADDING, np.uint8)
    value_of = np.full((256, 256), PADDING, np.uint8)
    categories = {
        TAG: interface.tag_id_to_name,
        LAST_ACTION: {index: f"{LAST_ACTION}:{name}" for index, name in enumerate(interface.action_names)},
    }
    for theirs in interface.obs_features:
        for value, name in categories.get(theirs.name, {}).items():
            feature_of[theirs.id, value], value_of[theirs.id, value] = number[name], 1
        if theirs.name in number:
            feature_of[theirs.id], value_of[theirs.id] = number[theirs.name], np.arange(256)
    return feature_of.ravel(), value_of.ravel()


class MettagridHost:
    """One game; the simulator writes to its own small buffers, from where seats are dealt to the shared rows."""

    def __init__(self, config: MettagridConfig) -> None:
        from mettagrid.policy.policy_env_interface import PolicyEnvInterface
        from mettagrid.simulator.simulator import Buffers

        self._game = game_config(config)
        interface = PolicyEnvInterface.from_mg_cfg(self._game)
        scales = feature_scales(config, interface)
        self._feature_of, self._value_of = translation(interface, tuple(scales))
        agents = config.num_agents
        self.spec = HostSpec(
            num_agents=agents,
            observation_space=ObservationSpace(
                kind="tokens",
                shape=tuple(interface.observation_shape),
                features=tuple(scales),
                window=(config.window, config.window),
                scales=tuple(scales.values()),
            ),
            actions=tuple(interface.action_names),
            max_episode_steps=config.steps,
            counters=tuple(COUNTERS),
        )
        self.agent_of_seat = np.arange(agents)  # which of the simulator's agents a seat plays in this episode
        self._buffers = Buffers(
            observations=np.zeros((agents, *self.spec.observation_space.shape), np.uint8),
            terminals=np.zeros(agents, bool),
            truncations=np.zeros(agents, bool),
            rewards=np.zeros(agents, np.float32),
            masks=np.ones(agents, bool),
            actions=np.zeros(agents, np.int32),
            vibe_actions=np.zeros(agents, np.int32),
            teacher_actions=np.zeros(agents, np.int32),
        )
        self.simulation: Any = None
        self._step: Any = None

    def start(self, seed: int, rows: Rows) -> None:
        """Draws a map and deals the seats, both from `seed`."""
        from mettagrid.simulator.simulator import Simulation

        self.close()
        self.agent_of_seat = np.random.default_rng(seed).permutation(self.spec.num_agents)
        self._game.game.map_builder.seed = seed  # without it every map would come from the system's entropy
        self.simulation = Simulation(self._game, seed, buffers=self._buffers)
        self._step = self.simulation._c_sim.step
        self._deal(rows)

    def step(self, rows: Rows) -> bool:
        """One step of the simulator; all agents are truncated together at its end."""
        buffers, agents = self._buffers, self.agent_of_seat
        buffers.actions[agents] = rows.actions
        self._step()
        rows.rewards[:] = buffers.rewards[agents]
        rows.weights[:] = 1
        rows.truncated[:] = buffers.truncations[agents] & ~buffers.terminals[agents]
        rows.dones[:] = (buffers.truncations | buffers.terminals)[agents]
        self._deal(rows)
        ended = bool(rows.dones.all())
        if ended:
            rows.final_observations[:] = rows.observations
        return ended

    def count(self, rows: Rows) -> None:
        """Hearts made and ore dug by each seat."""
        read = self.simulation._c_sim.get_agent_stat
        for seat, agent in enumerate(self.agent_of_seat.tolist()):
            rows.counters[seat] = [read(agent, name) or 0.0 for name in COUNTERS.values()]

    def close(self) -> None:
        """Frees the simulation."""
        if self.simulation is not None:
            self._step = None
            self.simulation.close()
            self.simulation = None

    def _deal(self, rows: Rows) -> None:
        """Observations from the simulator's order of agents and numbers of features to ours."""
        seen = self._buffers.observations[self.agent_of_seat]  # (num_agents, num_tokens, 3)
        code = seen[..., 1] * np.uint16(256) + seen[..., 2]  # (num_agents, num_tokens)
        feature = self._feature_of[code]
        rows.observations[..., 0] = np.where(feature == PADDING, PADDING, seen[..., 0])
        rows.observations[..., 1] = feature
        rows.observations[..., 2] = self._value_of[code]
