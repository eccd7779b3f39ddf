"""Evaluation from top to bottom: opponents -> frozen policies -> both seatings -> win rates with intervals."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dual_policy_plugin.config import Config, DualPolicyConfig, PolicySource
from dual_policy_plugin.envs.build import make_env
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.evaluation.matches import MatchResult, play_match
from dual_policy_plugin.npc.resolver import PinnedPolicy, resolve_all, unique_names
from dual_policy_plugin.policies.build import compute_dtype
from dual_policy_plugin.policies.npcs import load_npc
from dual_policy_plugin.policies.pool import Npc
from dual_policy_plugin.rollout.assignment import Assignment, assign
from dual_policy_plugin.types import EnvSpec

SEED_OFFSET = 1_000_003  # evaluation never sees the episodes of training


def assign_seats(num_agents: int, dual: DualPolicyConfig) -> Assignment:
    """The seats of a run's config; all of them learn where no NPC is switched on.

    Raises:
        ConfigError: a share or a layout that does not fit the env.
    """
    return assign(num_agents, dual.training_agents_pct, dual.assignment) if dual.enabled else assign(num_agents, 1.0)


def opponent_sources(config: Config) -> list[PolicySource]:
    """What evals.opponents name; none where the run's own NPCs are the opponents."""
    return [PolicySource(uri=uri) for uri in config.evals.opponents]


def load_opponents(
    config: Config,
    pinned: list[PinnedPolicy],
    npcs: list[Npc],
    spec: EnvSpec,
    assignment: Assignment,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Npc]:
    """The policies that the learner is evaluated against: evals.opponents, or the run's own NPCs where none are named.

    Args:
        config: the run.
        pinned: the policies of `opponent_sources`, each with a name of its own.
        npcs: the run's own.
        spec: the env.
        assignment: the learner's seats.
        dtype: of matrix products.
        device: where they act.

    Raises:
        DualPolicyError: one of them cannot be loaded, or there is no seat for them.
    """
    uris = config.evals.opponents
    if not uris:
        return npcs
    if assignment.num_npc == 0:
        raise ConfigError(
            f"evals.opponents={uris} would find no seat: all agents learn; "
            "switch an NPC on (trainer.dual_policy), or use evals.opponents=[]"
        )
    return [
        load_npc(source, pin, spec, config.agent, dtype=dtype, device=device)
        for source, pin in zip(opponent_sources(config), pinned, strict=True)
    ]


def evaluate(
    policy: nn.Module,
    opponents: list[Npc],
    assignment: Assignment,
    config: Config,
    *,
    device: torch.device,
    make_host: Callable[..., Any] | None = None,
) -> list[MatchResult]:
    """Plays the policy against each opponent, in an env of its own, on fixed seeds.

    Args:
        policy: any Policy; packed here.
        opponents: frozen and packed.
        assignment: the policy's seats; an assignment that leaves none to an opponent gives an empty list.
        config: evals.episodes, seed and the env.
        device: where the policies are.
        make_host: as for `train`.
    """
    if config.evals.episodes == 0 or assignment.num_npc == 0 or not opponents:
        return []
    policy.pack()  # type: ignore[operator]
    num_envs = min(config.env.num_envs, -(-config.evals.episodes // 2))
    env_config = replace(config.env, num_envs=num_envs)
    with closing(
        make_env(env_config, device=device, num_workers=config.trainer.num_workers, make_host=make_host)
    ) as env:
        return [
            play_match(
                policy,
                opponent,
                env,
                assignment,
                episodes=config.evals.episodes,
                seed=config.seed + SEED_OFFSET,
                device=device,
            )
            for opponent in opponents
        ]


def as_metrics(results: list[MatchResult]) -> dict[str, float]:
    """The figures of an evaluation by their metric names."""
    metrics = {}
    for result in results:
        for name in ("win_rate", "low", "high", "episodes"):
            metrics[f"evals/{result.opponent}/{name}"] = float(getattr(result, name))
    return metrics


def evaluate_checkpoint(uri: str, config: Config, *, device: torch.device) -> list[MatchResult]:
    """Plays the policy at `uri`, on the learner's seats of a run's config, against the run's opponents.

    Raises:
        DualPolicyError: the policy or an opponent cannot be had.
    """
    dual = config.trainer.dual_policy
    dtype = compute_dtype(config.trainer.precision, device)
    with closing(make_env(replace(config.env, num_envs=1), device=device, num_workers=1)) as env:
        spec = env.spec
    sources = [PolicySource(uri=uri), *([dual.npc] if dual.npc else [])]
    policy, *npcs = (
        load_npc(source, pin, spec, config.agent, dtype=dtype, device=device)
        for source in sources
        for pin in resolve_all(source, seed=config.seed)
    )
    assignment = assign_seats(spec.num_agents, dual)
    found = [pin for source in opponent_sources(config) for pin in resolve_all(source, seed=config.seed)]
    names = unique_names([pin.name for pin in found])
    pinned = [replace(pin, name=name) for pin, name in zip(found, names, strict=True)]
    opponents = load_opponents(config, pinned, npcs, spec, assignment, dtype=dtype, device=device)
    return evaluate(policy.policy, opponents, assignment, config, device=device)
