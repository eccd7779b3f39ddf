"""Evaluation from top to bottom: policies -> frozen and bound to the env -> all pairs, both seatings -> win rates.

In a run, of a pinned policy against some (a gate), and of all against all (cross-play): the same games.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dual_policy_plugin.config import Config, DualPolicyConfig, PolicySource
from dual_policy_plugin.devices import check_triton
from dual_policy_plugin.envs.build import make_env
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.evaluation.cross_play import CrossPlay, split_sides, summarise
from dual_policy_plugin.evaluation.matches import (
    MakeEnv,
    MatchResult,
    eval_metrics,
    match_result,
    play_pairings,
    seatings_of,
)
from dual_policy_plugin.npc.resolver import PinnedPolicy
from dual_policy_plugin.policies.build import compute_dtype
from dual_policy_plugin.policies.npcs import load_npc
from dual_policy_plugin.policies.pool import Npc
from dual_policy_plugin.rollout.assignment import Assignment, assign
from dual_policy_plugin.types import EnvSpec, VecEnv

SEED_OFFSET = 1_000_003  # evaluation never sees the episodes of training


def assign_seats(num_agents: int, dual: DualPolicyConfig) -> Assignment:
    """The seats of a run's config; all of them learn where no NPC is switched on.

    Raises:
        ConfigError: a share or a layout that does not fit the env.
    """
    return assign(num_agents, dual.training_agents_pct, dual.assignment) if dual.enabled else assign(num_agents, 1.0)


def evaluate(
    policy: nn.Module,
    opponents: list[Npc],
    assignment: Assignment,
    config: Config,
    spec: EnvSpec,
    *,
    device: torch.device,
    make_host: Callable[..., Any] | None = None,
) -> list[MatchResult]:
    """Plays the policy against each opponent, all of them at once in an env of their own, on fixed seeds.

    Args:
        policy: any Policy; packed here.
        opponents: frozen and packed.
        assignment: the policy's seats; an assignment that leaves none to an opponent gives an empty list.
        config: evals.episodes, seed and the env.
        spec: of the env.
        device: where the policies are.
        make_host: as for `train`.
    """
    if config.evals.episodes == 0 or assignment.num_npc == 0 or not opponents:
        return []
    policy.pack()  # type: ignore[operator]
    return _play_against(
        [Npc(name="learner", policy=policy), *opponents],
        seatings_of(assignment, spec),
        config,
        episodes=config.evals.episodes,
        seed=config.seed + SEED_OFFSET,
        device=device,
        make_host=make_host,
    )


def evaluate_pinned(
    policy: PinnedPolicy,
    opponents: Sequence[PinnedPolicy],
    config: Config,
    *,
    episodes: int,
    seed: int,
    device: torch.device,
    watch: Callable[[VecEnv], VecEnv] | None = None,
    is_greedy: bool = False,
) -> list[MatchResult]:
    """Plays a pinned policy, on the learner's seats of the config, against each opponent.

    Args:
        policy: on half of the seats unless trainer.dual_policy says otherwise.
        opponents: one result each, in their order.
        config: the env, and how policies are loaded.
        episodes: per opponent at least, half of them with the seats swapped where the env's seats allow it.
        seed: of the episodes and of all draws; equal seeds are equal games.
        device: where they act.
        watch: what to play on in place of the envs that were made: an env around them that notes what happens.
        is_greedy: the opponents take their most likely action instead of drawing one.

    Raises:
        DualPolicyError: a policy cannot be had, or does not fit the env; or the seats cannot be split so.
    """
    spec, dual = read_spec(config), config.trainer.dual_policy
    split = assign(spec.num_agents, dual.training_agents_pct, dual.assignment)
    if split.num_npc == 0:
        raise ConfigError(
            f"trainer.dual_policy.training_agents_pct={dual.training_agents_pct} leaves no seat to an opponent; "
            "use a share below 1, for example 0.5"
        )
    first, *npcs = load_pinned([policy, *opponents], spec, config, device)
    seatings = seatings_of(split, spec)
    players = [first, *(replace(npc, is_greedy=is_greedy) for npc in npcs)]
    return _play_against(players, seatings, config, episodes=episodes, seed=seed, device=device, watch=watch)


def cross_play(
    pinned: Sequence[PinnedPolicy], config: Config, *, episodes: int, seed: int, device: torch.device
) -> CrossPlay:
    """Plays every pair of policies, and each policy against itself, half of the seats each.

    Where both halves are equal, each pair plays from both seatings. Where they are not (the env's seats have roles, or
    are odd in number), each ordered pair plays: the first with the seats of the first role.

    Args:
        pinned: two or more, each with a name of its own.
        config: the env, trainer.dual_policy.assignment, and how policies are loaded.
        episodes: per pair at least.
        seed: of the episodes and of all draws.
        device: where they act.

    Raises:
        DualPolicyError: a policy cannot be had, or does not fit the env; or one agent cannot be split.
    """
    spec = read_spec(config)
    split, roles = split_sides(spec, config.trainer.dual_policy.assignment)
    numbers = range(len(pinned))
    pairings = [(i, j) for i in numbers for j in numbers if roles or i <= j]
    records = play_pairings(
        load_pinned(pinned, spec, config, device),
        pairings,
        _env_maker(config, device),
        seatings_of(split, spec),
        episodes=episodes,
        seed=seed,
        max_envs=config.env.num_envs,
        device=device,
    )
    return summarise(records, pinned, env=spec.name, roles=roles)


def read_spec(config: Config, make_host: Callable[..., Any] | None = None) -> EnvSpec:
    """The facts of the config's env, of one copy of it."""
    make = _env_maker(config, torch.device("cpu"), make_host)
    with closing(make([0])) as env:
        return env.spec


def load_pinned(pinned: Sequence[PinnedPolicy], spec: EnvSpec, config: Config, device: torch.device) -> list[Npc]:
    """The policies, frozen and bound to the env."""
    dtype = compute_dtype(config.trainer.precision, device)
    return [load_npc(PolicySource(uri=one.uri), one, spec, config.agent, dtype=dtype, device=device) for one in pinned]


def _env_maker(config: Config, device: torch.device, make_host: Callable[..., Any] | None = None) -> MakeEnv:
    has_kernels = config.trainer.fused and device.type == "cuda"
    if has_kernels:
        check_triton()

    def make(numbers: Sequence[int]) -> VecEnv:
        env = make_env(
            replace(config.env, num_envs=len(numbers)),
            device=device,
            num_workers=config.trainer.num_workers,
            env_numbers=numbers,
            make_host=make_host,
        )
        if has_kernels and hasattr(env, "use_kernels"):
            env.use_kernels = True  # the same games, bit for bit
        return env

    return make


def _play_against(
    policies: list[Npc],
    seatings: Sequence[Assignment],
    config: Config,
    *,
    episodes: int,
    seed: int,
    device: torch.device,
    make_host: Callable[..., Any] | None = None,
    watch: Callable[[VecEnv], VecEnv] | None = None,
) -> list[MatchResult]:
    """The results of the first policy against each of the others."""
    opponents = policies[1:]
    make = _env_maker(config, device, make_host)
    records = play_pairings(
        policies,
        [(0, 1 + k) for k in range(len(opponents))],
        make if watch is None else lambda numbers: watch(make(numbers)),
        seatings,
        episodes=episodes,
        seed=seed,
        max_envs=config.env.num_envs,
        device=device,
    )
    return [match_result(record, opponent.name) for record, opponent in zip(records, opponents, strict=True)]


def as_metrics(results: list[MatchResult]) -> dict[str, float]:
    """The figures of an evaluation by their metric names."""
    return eval_metrics([result.as_dict() for result in results])
