"""Records games: plays them as evaluation does, notes who did what, and has the frames made from that.

Takes two pinned policies and a config; gives a Recording. While the games are played only actions and rewards are
noted, so they are evaluation's own games, draw for draw; `arena_frames.py` and `mettagrid_frames.py` play each once
more on the host to see what stood where, and its returns must be those that evaluation counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dual_policy_plugin.config import Config
from dual_policy_plugin.envs.arena_config import parse_arena_args, team_of_seat
from dual_policy_plugin.errors import ConfigError, EnvError
from dual_policy_plugin.evaluate import SEED_OFFSET, evaluate_pinned, read_spec
from dual_policy_plugin.evaluation.matches import MatchResult, plan_rounds, seatings_of
from dual_policy_plugin.npc.resolver import PinnedPolicy
from dual_policy_plugin.replay.arena_frames import arena_frames
from dual_policy_plugin.replay.frames import Frames, Game
from dual_policy_plugin.replay.mettagrid_frames import mettagrid_frames
from dual_policy_plugin.rollout.assignment import Assignment, assign
from dual_policy_plugin.rollout.episode_metrics import win_shares
from dual_policy_plugin.types import EnvSpec, StepResult, VecEnv
from dual_policy_plugin.waiting import waiting

MAKE_FRAMES: dict[str, Callable[[Game, dict[str, Any]], Frames]] = {
    "arena": arena_frames,
    "mettagrid": mettagrid_frames,
}
MAX_AGENT_STEPS = 1_000_000
"""Episodes x steps x agents of a recording: about 20 MB of page."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Episode:
    """One game and who played it."""

    start: int
    """Episodes of one start have the same map, places and random numbers, with the seats swapped."""
    policy_of_seat: tuple[int, ...]
    """0: the policy, 1: the NPC."""
    frames: Frames
    share: float
    """1: the policy won; 0: the NPC did; 1/2: a draw."""

    def means(self, t: int) -> tuple[float, float]:
        """Both sides' mean returns per agent before step t."""
        returns, sides = self.frames.returns[t].astype(np.float64), np.array(self.policy_of_seat)
        return float(returns[sides == 0].mean()), float(returns[sides == 1].mean())


@dataclass(kw_only=True, slots=True, frozen=True)
class Recording:
    """All that a page or a GIF is made from."""

    env: str
    actions: tuple[str, ...]
    """Names of the actions."""
    seed: int
    """As `record` was given it."""
    policies: tuple[PinnedPolicy, PinnedPolicy]
    """The policy and the NPC."""
    teams: tuple[int, ...]
    """The team of each seat; empty where the env has none."""
    capacity: int
    """Ore that an agent can carry."""
    episodes: tuple[Episode, ...]


def record(
    policy: PinnedPolicy,
    npc: PinnedPolicy,
    config: Config,
    *,
    episodes: int,
    seed: int,
    device: torch.device,
    is_greedy: bool = False,
) -> tuple[Recording, MatchResult]:
    """The first games of an evaluation (see `evaluate_pinned`) of the policy against the NPC.

    Args:
        policy: on the learner's seats of the config, and on the others where the seats can be swapped.
        npc: against whom.
        config: the env, the share of the seats, and how policies are loaded.
        episodes: at least 1.
        seed: of a run whose evaluation begins with these games.
        device: where they act.
        is_greedy: the NPC takes its most likely action instead of drawing one.

    Returns:
        The games, and the record of all that were played for them (one more, where an odd number is asked for).

    Raises:
        DualPolicyError: an env that cannot be drawn, too many episodes, a policy that cannot be had or does not fit.
    """
    spec = check_recordable(config, episodes)
    seatings = _seatings(config, spec)
    logs: list[ActionLog] = []

    def watch(env: VecEnv) -> VecEnv:
        logs.append(ActionLog(env))
        return logs[0]

    (result,) = evaluate_pinned(
        policy,
        [npc],
        config,
        episodes=episodes,
        seed=seed + SEED_OFFSET,
        device=device,
        watch=watch,
        is_greedy=is_greedy,
    )
    args = {key: value for key, value in config.env.args.items() if value is not None}
    recorded = []
    with waiting("looking at the games again", episodes) as advance:
        for start, seating, game in _games(logs[0].rounds(), len(seatings), episodes, config.env.num_envs):
            recorded.append(make_episode(start, seatings[seating], game, MAKE_FRAMES[spec.name](game, args), spec.name))
            advance(1)
    arena = parse_arena_args(args) if spec.name == "arena" else None
    return Recording(
        env=spec.name,
        actions=spec.actions,
        seed=seed,
        policies=(policy, npc),
        teams=tuple(team_of_seat(arena.teams, spec.num_agents)) if arena else (),
        capacity=arena.ore_capacity if arena else args.get("ore_limit", 5),
        episodes=tuple(recorded),
    ), result


def check_recordable(config: Config, episodes: int) -> EnvSpec:
    """The facts of the config's env; a ConfigError where its games cannot be drawn, or are too many.

    Raises:
        ConfigError: names the mend.
    """
    if config.env.name not in MAKE_FRAMES:
        raise ConfigError(
            f"env.name={config.env.name} cannot be drawn, replay knows {' and '.join(MAKE_FRAMES)}; to see your env, "
            "render it in your own code, and use `dual-policy evaluate` for who wins"
        )
    spec = read_spec(config)
    size = spec.max_episode_steps * spec.num_agents
    if episodes * size > MAX_AGENT_STEPS:
        most = MAX_AGENT_STEPS // size
        raise ConfigError(
            f"--episodes={episodes} of {spec.max_episode_steps} steps and {spec.num_agents} agents are too many for a "
            + (f"page; use --episodes {most} at most" if most else "page; use shorter episodes")
        )
    return spec


def _seatings(config: Config, spec: EnvSpec) -> tuple[Assignment, ...]:
    dual = config.trainer.dual_policy
    return seatings_of(assign(spec.num_agents, dual.training_agents_pct, dual.assignment), spec)


@dataclass(kw_only=True, slots=True)
class _Round:
    """What was done in all envs since they were reset, step by step."""

    seed: int
    actions: list[Tensor] = field(default_factory=list)
    """(num_envs, num_agents) uint8."""
    rewards: list[Tensor] = field(default_factory=list)
    """(num_envs, num_agents) float32."""
    ends: list[Tensor] = field(default_factory=list)
    """(num_envs,) bool."""


class ActionLog:
    """A VecEnv around another that keeps the seeds, actions and returns of its rounds."""

    def __init__(self, env: VecEnv) -> None:
        self.spec = env.spec
        self._env = env
        self._rounds: list[_Round] = []

    def reset(self, seed: int, *, stagger: bool = False) -> None:
        """Begins a round."""
        self._env.reset(seed, stagger=stagger)
        self._rounds.append(_Round(seed=seed))

    def observe(self, seats: Tensor, out: Tensor) -> None:
        """As the env."""
        self._env.observe(seats, out)

    def observe_final(self, seats: Tensor, out: Tensor) -> None:
        """As the env."""
        self._env.observe_final(seats, out)

    def step(self, actions: Tensor) -> StepResult:
        """As the env; notes what is done."""
        noted = self._rounds[-1]
        noted.actions.append(actions.to(torch.uint8, copy=True))
        result = self._env.step(actions)
        noted.rewards.append(result.rewards.clone())
        noted.ends.append(result.episode_ends.clone())
        return result

    def close(self) -> None:
        """As the env."""
        self._env.close()

    def rounds(self) -> list[list[Game]]:
        """For each round the first games of all envs."""
        return [[_first_game(one, env) for env in range(self.spec.num_envs)] for one in self._rounds]


def _first_game(noted: _Round, env: int) -> Game:
    length = int(torch.stack(noted.ends)[:, env].nonzero()[0]) + 1
    rewards = torch.stack([rewards[env] for rewards in noted.rewards[:length]])
    actions = torch.stack([actions[env] for actions in noted.actions[:length]])
    returns = rewards.double().sum(dim=0)
    return Game(seed=noted.seed, number=env, actions=actions.cpu().numpy(), returns=returns.cpu().numpy())


def _games(rounds: list[list[Game]], num_seatings: int, episodes: int, max_envs: int) -> list[tuple[int, int, Game]]:
    """(start, seating, game) of the first games, as `play_pairings` has dealt one pairing's over rounds and envs."""
    plan = plan_rounds(num_seatings, -(-episodes // num_seatings), max_envs)
    found = []
    for k, games in enumerate(rounds):
        group, i = divmod(k, plan.num_rounds)
        for env, game in enumerate(games):
            block, number = divmod(env, plan.envs_per_block)
            seating = group * plan.num_blocks + block
            if seating < num_seatings:
                start = i * plan.envs_per_block + number
                found.append((start, seating, replace(game, number=number)))
    return sorted(found, key=lambda one: one[:2])[:episodes]


def make_episode(start: int, split: Assignment, game: Game, frames: Frames, env: str) -> Episode:
    """A game and its outcome.

    Raises:
        EnvError: the frames' returns are not those that were counted.
    """
    if not np.array_equal(frames.returns[-1].astype(np.float64), game.returns):
        raise EnvError(
            f"env.name={env}: the same actions brought {frames.returns[-1].tolist()} where evaluation counted "
            f"{game.returns.tolist()}; the env is not deterministic, so its games cannot be drawn"
        )
    policy_of_seat = tuple(int(seat not in split.learner_seats) for seat in range(split.num_agents))
    sides = np.array(policy_of_seat)
    sums = torch.tensor([[game.returns[sides == 0].sum(), game.returns[sides == 1].sum()]])
    share = float(win_shares(sums, split.num_learner, split.num_npc))
    return Episode(start=start, policy_of_seat=policy_of_seat, frames=frames, share=share)
