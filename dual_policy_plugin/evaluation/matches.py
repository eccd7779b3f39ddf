"""Plays pairs of policies against each other, all pairs, seatings and seeds in one env tensor, and counts who won.

Takes policies, pairings of them and the seats of both sides; gives a record for each pairing. Episodes depend on their
seed and number alone, so every pairing sees the same maps and starts from each of its seatings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dual_policy_plugin import rng
from dual_policy_plugin.evaluation.intervals import wilson_interval
from dual_policy_plugin.heartbeat import beat
from dual_policy_plugin.policies.pool import Npc, NpcPool, zero_rows
from dual_policy_plugin.rollout.assignment import Assignment
from dual_policy_plugin.rollout.episode_metrics import win_shares
from dual_policy_plugin.types import EnvSpec, VecEnv
from dual_policy_plugin.waiting import Advance, waiting

CHECK_EVERY = 16  # steps between looks at whether all first episodes have ended

MakeEnv = Callable[[Sequence[int]], VecEnv]
"""Env numbers, which may repeat -> the envs of these numbers: equal numbers play equal episodes."""


@dataclass(kw_only=True, slots=True, frozen=True)
class PairingRecord:
    """The games of one policy against another."""

    first: int
    second: int
    """Which policies."""
    wins: float
    """Of the first, plus half the draws."""
    draws: int
    episodes: int
    effective_episodes: float
    """How many independent games are as sure (see `effective_episodes`)."""
    first_return: float
    second_return: float
    """Mean returns per agent."""

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the first's win rate: Wilson's, of the effective number of games."""
        share = self.effective_episodes / self.episodes
        return wilson_interval(self.wins * share, self.effective_episodes)


@dataclass(kw_only=True, slots=True, frozen=True)
class MatchResult:
    """A policy's record against one opponent."""

    opponent: str
    win_rate: float
    """Wins plus half the draws, over episodes."""
    low: float
    high: float
    """95 % interval of the win rate (Wilson's, of the effective number of games)."""
    episodes: int
    wins: float
    """Wins plus half the draws."""
    draws: int
    learner_return: float
    """Mean return per agent of the policy."""
    opponent_return: float

    def as_dict(self) -> dict[str, Any]:
        """For result.json."""
        return asdict(self)


def eval_metrics(evals: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The figures of results as result.json has them, by their metric names."""
    names = ("win_rate", "low", "high", "episodes")
    return {f"evals/{one['opponent']}/{name}": float(one[name]) for one in evals for name in names}


def match_result(record: PairingRecord, opponent: str) -> MatchResult:
    """The record as the first policy's result against the second, which is named."""
    low, high = record.interval
    return MatchResult(
        opponent=opponent,
        win_rate=record.wins / record.episodes,
        low=low,
        high=high,
        episodes=record.episodes,
        wins=record.wins,
        draws=record.draws,
        learner_return=record.first_return,
        opponent_return=record.second_return,
    )


def seatings_of(split: Assignment, spec: EnvSpec) -> tuple[Assignment, ...]:
    """The split and, where both sides have seats of the same roles, the one with the sides' seats swapped."""
    if not can_swap(split, spec):
        return (split,)
    return split, Assignment(num_agents=split.num_agents, learner_seats=split.npc_seats)


def can_swap(split: Assignment, spec: EnvSpec) -> bool:
    """Whether both sides of a split are equal, so that either policy could sit on either side."""
    roles = spec.roles or ("",) * spec.num_agents
    first, second = ([roles[seat] for seat in side] for side in (split.learner_seats, split.npc_seats))
    return sorted(first) == sorted(second)


def play_pairings(
    policies: Sequence[Npc],
    pairings: Sequence[tuple[int, int]],
    make_env: MakeEnv,
    seatings: Sequence[Assignment],
    *,
    episodes: int,
    seed: int,
    max_envs: int,
    device: torch.device,
) -> list[PairingRecord]:
    """Plays each pairing from each seating, at least `episodes` episodes in all, as many from one seating as another.

    Every env plays one episode a round and only its first counts, so that short episodes have no more say than long
    ones. Episode e has the same maps, starts and random numbers in every pairing and seating: a policy against itself
    plays mirrored games.

    Args:
        policies: in eval mode and packed.
        pairings: (first, second), as indices of `policies`; the first has a seating's learner seats, the second the
            others.
        make_env: gives the envs of some numbers; called once, and what it gives is closed here.
        seatings: one or several.
        episodes: per pairing; rounded up to whole rounds.
        seed: of the episodes and of all policies' draws.
        max_envs: how many envs at once at most; further games are played in further rounds.
        device: where the policies are.

    Returns:
        As many records as pairings.
    """
    blocks = [(pairing, seating) for seating in range(len(seatings)) for pairing in range(len(pairings))]
    plan = plan_rounds(len(blocks), -(-episodes // len(seatings)), max_envs)
    env = make_env([number for _ in range(plan.num_blocks) for number in range(plan.envs_per_block)])
    sums = torch.zeros(len(pairings), 4, dtype=torch.float64)  # wins, draws, the two sides' mean returns
    # the wins of every episode, its seatings together
    wins_of = torch.zeros(plan.num_rounds, len(pairings), plan.envs_per_block, dtype=torch.float64)
    num_groups = -(-len(blocks) // plan.num_blocks)
    what = f"playing {len(pairings)} x {episodes} episodes" if len(pairings) > 1 else f"playing {episodes} episodes"
    num_steps = num_groups * plan.num_rounds * env.spec.max_episode_steps
    with closing(env), waiting(what, num_steps) as advance:
        for start in range(0, len(blocks), plan.num_blocks):
            group = blocks[start : start + plan.num_blocks]
            table = _seat_table(group, plan, pairings, seatings)
            actors = Actors(policies, table.policy_of_seat.flatten(), device, are_pooled=device.type == "cpu")
            for i in range(plan.num_rounds):
                round_seed = int(rng.hash32(seed, i)) & rng.LOW_31_BITS
                outcome = _play_round(env, actors, round_seed, plan.envs_per_block, device, advance)
                figures = _figures(*outcome, table.is_first).view(plan.num_blocks, plan.envs_per_block, 4)[: len(group)]
                pairing_of_block = torch.tensor([pairing for pairing, _ in group])
                sums.index_add_(0, pairing_of_block, figures.sum(dim=1))
                wins_of[i].index_add_(0, pairing_of_block, figures[:, :, 0])
    played = plan.num_rounds * plan.envs_per_block * len(seatings)
    effective = effective_episodes(wins_of.transpose(0, 1).flatten(1) / len(seatings), len(seatings))
    return [
        PairingRecord(
            first=first, second=second, wins=wins, draws=int(draws), episodes=played, effective_episodes=games,
            first_return=first_return / played, second_return=second_return / played,
        )
        for (first, second), (wins, draws, first_return, second_return), games in zip(
            pairings, sums.tolist(), effective, strict=True
        )
    ]  # fmt: skip


def effective_episodes(scores: Tensor, num_seatings: int) -> list[float]:
    """How many independent games, won or lost, are as sure of a win rate as the games that were played.

    Games from several seatings of one start may end alike, where the map suits one of the policies. With s the mean
    score of a start over its seatings, the win rate's variance is Var(s) / num_starts, that of n independent games
    p (1 - p) / n; n is the effective sample size under clustering (Kish 1965). Never more than were played, nor fewer
    than starts; where all were won or all lost nothing tells, and it is the number of starts.

    Args:
        scores: (num_pairings, num_starts) float64 in [0, 1].
        num_seatings: games of each start.
    """
    num_starts = scores.shape[1]
    win_rate = scores.mean(dim=1)
    # about the mean, with all starts but one as degrees of freedom
    variance = (scores - win_rate.unsqueeze(1)).square().sum(dim=1) / max(1, num_starts - 1)
    coin = win_rate * (1 - win_rate)
    alike = num_starts * coin / variance.clamp(min=1e-12)
    games = torch.where(coin > 0, alike, 0.0).clamp(min=num_starts, max=num_starts * num_seatings)
    return [float(one) for one in games]


@dataclass(kw_only=True, slots=True, frozen=True)
class RoundPlan:
    """How games are spread over envs and rounds. A block is a pairing from one seating."""

    num_blocks: int
    """Blocks that are played at once."""
    envs_per_block: int
    num_rounds: int
    """Rounds that each block plays."""


def plan_rounds(num_blocks: int, games_per_block: int, max_envs: int) -> RoundPlan:
    """The plan of the fewest rounds, and in them the fewest games, with no more than `max_envs` envs."""
    num_groups = -(-num_blocks // max_envs)
    at_once = -(-num_blocks // num_groups)
    num_rounds = -(-games_per_block // min(games_per_block, max_envs // at_once))
    return RoundPlan(num_blocks=at_once, envs_per_block=-(-games_per_block // num_rounds), num_rounds=num_rounds)


@dataclass(kw_only=True, slots=True, frozen=True)
class _SeatTable:
    """Who sits where; on the host."""

    policy_of_seat: Tensor
    """(num_envs, num_agents) int64."""
    is_first: Tensor
    """(num_envs, num_agents) bool: seats of a pairing's first policy."""


def _seat_table(
    group: Sequence[tuple[int, int]],
    plan: RoundPlan,
    pairings: Sequence[tuple[int, int]],
    seatings: Sequence[Assignment],
) -> _SeatTable:
    """The seats of a group of blocks (pairing, seating); blocks that are left over play the group's first once more."""
    padded = [*group, *[group[0]] * (plan.num_blocks - len(group))]
    is_first = torch.zeros(len(padded), seatings[0].num_agents, dtype=torch.bool)
    for row, (_, seating) in zip(is_first, padded, strict=True):
        row[list(seatings[seating].learner_seats)] = True
    pair = torch.tensor([pairings[pairing] for pairing, _ in padded])  # (num_blocks, 2)
    policies = torch.where(is_first, pair[:, :1], pair[:, 1:])
    repeats = plan.envs_per_block
    return _SeatTable(
        policy_of_seat=policies.repeat_interleave(repeats, dim=0), is_first=is_first.repeat_interleave(repeats, dim=0)
    )


class Actors:
    """All policies over the rows of one group of envs, each on its own rows and no others.

    On the CPU all act in one pool, which sorts the rows and groups what can be grouped. On a GPU a pool of several
    would forward all rows by each of them: there each policy has a pool of its own.
    """

    def __init__(
        self, policies: Sequence[Npc], policy_of_row: Tensor, device: torch.device, *, are_pooled: bool
    ) -> None:
        """`policy_of_row` (num_rows,) int64, on the host; with `are_pooled` all act in one pool."""
        self._num_rows = len(policy_of_row)
        self._pools: list[tuple[NpcPool, Tensor | slice]] = []
        if are_pooled:
            pool = NpcPool(policies, num_envs=self._num_rows, num_npc=1, device=device)
            pool.npc_of_env.copy_(policy_of_row)
            self._pools.append((pool, slice(0, self._num_rows)))
            return
        for k in sorted(set(policy_of_row.tolist())):
            rows = (policy_of_row == k).nonzero().squeeze(1).to(device)
            self._pools.append((NpcPool([policies[k]], num_envs=len(rows), num_npc=1, device=device), rows))

    def restart(self) -> None:
        """All rows begin an episode."""
        for pool, _ in self._pools:
            pool.state.zero_()

    def act(self, obs: Tensor, uniforms: Tensor) -> Tensor:
        """Actions (num_rows,) int64 for obs (num_rows, *shape) and uniform numbers (num_rows,)."""
        actions = torch.empty(self._num_rows, dtype=torch.int64, device=obs.device)
        for pool, rows in self._pools:
            actions[rows] = pool.act(obs[rows], uniforms[rows])
        return actions

    def end_step(self, dones: Tensor) -> None:
        """Zeroes the states of rows that are done, dones (num_rows,) bool."""
        for pool, rows in self._pools:
            zero_rows(pool.state, dones[rows])


@torch.no_grad()
def _play_round(
    env: VecEnv, actors: Actors, seed: int, envs_per_block: int, device: torch.device, advance: Advance
) -> tuple[Tensor, Tensor | None]:
    """Steps until every env has ended its first episode; advances by the env's longest episode in all.

    Returns:
        (num_envs, num_agents) float64 returns of the first episodes, and the env's own scores of them or None; on the
        host.
    """
    spec, space = env.spec, env.spec.observation_space
    seats = torch.arange(spec.num_agents, device=device)
    obs = torch.zeros((spec.num_envs * spec.num_agents, *space.shape), dtype=getattr(torch, space.dtype), device=device)
    returns = torch.zeros(spec.num_envs, spec.num_agents, dtype=torch.float64, device=device)
    scores: Tensor | None = None
    is_running = torch.ones(spec.num_envs, 1, dtype=torch.bool, device=device)  # in its first episode
    env.reset(seed)
    actors.restart()
    for start in range(0, spec.max_episode_steps, CHECK_EVERY):
        num_steps = min(CHECK_EVERY, spec.max_episode_steps - start)
        beat()
        uniforms = _uniforms(seed, start, num_steps, spec, envs_per_block, device)
        for t in range(num_steps):
            env.observe(seats, obs)
            result = env.step(actors.act(obs, uniforms[t]).view(spec.num_envs, spec.num_agents))
            returns += result.rewards * is_running
            if result.scores is not None:
                scores = torch.where(is_running, result.scores, 0.0 if scores is None else scores)
            is_running &= ~result.episode_ends.unsqueeze(1)
            actors.end_step(result.dones.flatten())
        advance(num_steps)
        if not bool(is_running.any()):
            advance(spec.max_episode_steps - start - num_steps)
            break
    assert not bool(is_running.any()), "an episode was longer than the env's max_episode_steps"
    return returns.cpu(), None if scores is None else scores.cpu()


def _uniforms(
    seed: int, first_step: int, num_steps: int, spec: EnvSpec, envs_per_block: int, device: torch.device
) -> Tensor:
    """(num_steps, num_envs * num_agents) uniform numbers: a hash of seed, step, env number and seat."""
    steps = torch.arange(first_step, first_step + num_steps, device=device).view(-1, 1, 1)
    numbers = torch.arange(envs_per_block, device=device).view(1, -1, 1)
    seats = torch.arange(spec.num_agents, device=device)
    of_block = rng.uniform(seed, rng.ACTION_NPC, steps, numbers, seats)  # (num_steps, envs_per_block, num_agents)
    return of_block.repeat(1, spec.num_envs // envs_per_block, 1).flatten(1)


def _figures(returns: Tensor, scores: Tensor | None, is_first: Tensor) -> Tensor:
    """(num_envs, 4) float64: the first side's share of the win, whether it was a draw, both sides' mean returns.

    Args:
        returns: (num_envs, num_agents) float64.
        scores: the same shape, or None.
        is_first: (num_envs, num_agents) bool.
    """
    sides = torch.stack([is_first, ~is_first], dim=2).double()  # (num_envs, num_agents, 2)
    counts = sides.sum(dim=1)  # (num_envs, 2)

    def sums(values: Tensor) -> Tensor:
        return torch.einsum("ea,eas->es", values.double(), sides)

    verdict = sums(returns if scores is None else scores)
    shares = win_shares(verdict, counts[:, 0], counts[:, 1])
    return torch.cat([shares.unsqueeze(1), (shares == 0.5).double().unsqueeze(1), sums(returns) / counts], dim=1)
