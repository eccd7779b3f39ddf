"""Everything that a training run is made of, built in order and checked before the first step.

Takes the Config; gives Parts. What is wrong with an NPC, a share, a space or the memory ends the run here.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dual_policy_plugin.config import Config, TrainerConfig
from dual_policy_plugin.devices import check_triton, use_kernels
from dual_policy_plugin.envs.build import env_bytes, make_env
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.evaluate import assign_seats
from dual_policy_plugin.experience import experience_bytes, scratch_bytes
from dual_policy_plugin.learning.ppo import LOSS_NAMES, PpoSettings, PpoUpdate
from dual_policy_plugin.memory import available_bytes, check_memory
from dual_policy_plugin.players import Players, choose_opponents, pin_players
from dual_policy_plugin.policies.build import compute_dtype
from dual_policy_plugin.policies.learner import Learner, build_learner
from dual_policy_plugin.policies.pool import Npc, NpcPool, empty_slots
from dual_policy_plugin.ranks.distributed import Ranks
from dual_policy_plugin.rollout.assignment import Assignment
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.roster import Roster
from dual_policy_plugin.seating import Seating, Seatings
from dual_policy_plugin.share_schedule import possible_counts
from dual_policy_plugin.types import EnvSpec, VecEnv

log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True, frozen=True)
class Parts:
    """The live objects of one run on one rank."""

    players: Players
    """Every policy that the run was given, as it was pinned."""
    env: VecEnv
    assignment: Assignment
    """The seats that the run begins with, and that it is evaluated on."""
    learner: Learner
    opponents: list[Npc]
    """Whom the learner is evaluated against."""
    held_out: frozenset[str]
    """The names of those opponents that are no NPCs of this run for certain."""
    roster: Roster | None
    """Who is in the pool, and what the learner won against them; None without NPCs."""
    seatings: Seatings
    """Seats, experience and rollouts for each number of learners; the pool."""
    ppo: PpoUpdate


def build_parts(
    config: Config,
    run_path: Path | None,
    ranks: Ranks,
    device: torch.device,
    make_host: Callable[..., Any] | None,
    stack: ExitStack,
) -> Parts:
    """Builds a run: who plays, where and on which seats, who learns, and what a rollout needs.

    Args:
        config: the run.
        run_path: its directory, for the NPC lock; None on ranks that do not own it.
        ranks: who we are.
        device: where everything lives.
        make_host: a user's own env, as for `train`.
        stack: closes the env, and gives the recorded update back.

    Raises:
        DualPolicyError: whatever would go wrong later.
    """
    trainer, dual = config.trainer, config.trainer.dual_policy
    fused = trainer.fused and device.type == "cuda"
    if fused:
        check_triton()
    dtype = compute_dtype(trainer.precision, device)

    # who plays, where, and on which seats
    players = pin_players(config, run_path, ranks, device, stack)
    env = _make_env(config, ranks, device, make_host, stack)
    spec = env.spec
    assignment = assign_seats(spec.num_agents, dual)
    npcs, named, held = (
        players.load(role, config, spec, dtype=dtype, device=device) for role in ("npc", "opponent", "held_out")
    )
    opponents, held_out = choose_opponents(config, npcs, named, held, assignment)

    # who learns
    learner = build_learner(
        config.agent,
        spec,
        seed=config.seed,
        initial=players.initial,
        initial_agent=trainer.initial_policy.agent if trainer.initial_policy else None,
        dtype=dtype,
        device=device,
    )
    num_free = dual.self_play.window + 1 if dual.self_play is not None else 0
    all_policies = [learner.policy, *(npc.policy for npc in npcs), *[learner.policy] * num_free]
    _check_fits(config, spec, assignment, all_policies, device)
    slots = npcs + empty_slots(learner.policy, num_free)  # copied before the update makes its parameters views
    roster = Roster.begin(players.entries(), dual.matchmaking, dual.self_play) if slots else None

    # what an update and a rollout need, allocated once
    how_update = use_kernels(env, learner.inner, device, fused=fused)
    ppo = PpoUpdate(
        learner.policy,
        PpoSettings(**{field.name: getattr(trainer, field.name) for field in fields(PpoSettings)}),
        betas=(trainer.adam_beta1, trainer.adam_beta2),
        eps=trainer.adam_eps,
        ranks=ranks,
        use_kernels=fused,
        capture=fused,
    )
    stack.callback(ppo.release)
    pool = None
    if slots:
        num_envs = spec.num_envs
        pool = NpcPool(
            slots,
            num_envs=num_envs,
            num_npc=assignment.num_npc,
            device=device,
            first_env=ranks.rank * num_envs,
            all_envs=ranks.world_size * num_envs,
        )
    seatings = Seatings(config, env, assignment, learner.policy, pool)
    seating = seatings(assignment.num_learner)
    _check_best_metric(config, seating.metrics, opponents)
    update = {"update": how_update} if device.type == "cuda" else {}
    log.info("Dual-policy system initialized: %s", _facts(players, seating, spec, dtype, device) | update)
    return Parts(
        players=players,
        env=env,
        assignment=assignment,
        learner=learner,
        opponents=opponents,
        held_out=held_out,
        roster=roster,
        seatings=seatings,
        ppo=ppo,
    )


def _facts(
    players: Players, seating: Seating, spec: EnvSpec, dtype: torch.dtype, device: torch.device
) -> dict[str, object]:
    """What the first log line says of a run."""
    assignment = seating.assignment
    how = {"rollout": seating.how} if device.type == "cuda" else {"threads": torch.get_num_threads()}
    return {
        "num_envs": spec.num_envs,
        "policy_a_agents": assignment.num_learner,
        "npc_agents": assignment.num_npc,
        "policy_a_seats": list(assignment.learner_seats),
        "npc_seats": list(assignment.npc_seats),
        "npcs": {npc.name: f"{npc.uri} sha256:{npc.sha256[:12]}" for npc in players.npcs},
        "device": str(device),
        "precision": str(dtype).removeprefix("torch."),
        **how,
    }


def _make_env(
    config: Config, ranks: Ranks, device: torch.device, make_host: Callable[..., Any] | None, stack: ExitStack
) -> VecEnv:
    num_envs, num_workers = config.env.num_envs, config.trainer.num_workers
    check_memory({"env": env_bytes(config.env)}, available_bytes(device), str(device), num_envs=num_envs, horizon=0)
    first_env = ranks.rank * num_envs
    env = make_env(config.env, device=device, num_workers=num_workers, first_env=first_env, make_host=make_host)
    return stack.enter_context(closing(env))


def _check_best_metric(config: Config, metrics: EpisodeMetrics, opponents: list[Npc]) -> None:
    """A metric that never occurs would never make a checkpoint `best`, and nobody would know why."""
    name = config.trainer.best_metric
    default = next(field.default for field in fields(TrainerConfig) if field.name == "best_metric")
    known = [*metrics.names(), *(f"losses/{loss}" for loss in (*LOSS_NAMES, "explained_variance", "weight_norm"))]
    evals = [f"evals/{opponent.name}/{figure}" for opponent in opponents for figure in ("win_rate", "low", "high")]
    if name in evals and not (config.trainer.evaluate_interval and config.evals.episodes):
        raise ConfigError(
            f"trainer.best_metric={name} occurs at the run's end only; set trainer.evaluate_interval, for example to "
            f"{config.trainer.checkpoint_interval}, and evals.episodes above 0"
        )
    known += evals
    if name not in known and name != default:  # without an NPC there is no win rate, and that is well known
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ConfigError(f"trainer.best_metric={name} is no metric of this run; did you mean {near}?")


def _check_fits(
    config: Config, spec: EnvSpec, assignment: Assignment, policies: list[nn.Module], device: torch.device
) -> None:
    """Compares an estimate of what the run will allocate with what is free; `policies` begins with the learner."""
    trainer = config.trainer
    horizon, minibatches, dual = trainer.horizon, trainer.num_minibatches, trainer.dual_policy
    counts = [assignment.num_learner]
    if dual.pct_schedule is not None:
        counts = possible_counts(dual.pct_schedule, dual.training_agents_pct, spec.num_agents)
    fewest, most = spec.num_envs * min(counts), spec.num_envs * max(counts)
    if fewest < minibatches:
        raise ConfigError(f"trainer.num_minibatches={minibatches} is more than the {fewest} learner rows; use fewer")
    state_size, *npc_state_sizes = (int(policy.state_size) for policy in policies)  # type: ignore[arg-type]
    num_parameters = sum(parameter.numel() for policy in policies for parameter in policy.parameters())
    sizes = [
        (
            experience_bytes(spec, horizon=horizon, num_rows=spec.num_envs * count, state_size=state_size),
            scratch_bytes(
                spec,
                num_learner=count,
                num_npcs=len(npc_state_sizes),
                state_size=state_size,
                npc_state_size=max(npc_state_sizes, default=0),
            ),
        )
        for count in counts
    ]
    needs = {
        "experience": sum(experience for experience, _ in sizes),
        "scratch": sum(scratch for _, scratch in sizes),
        # what a minibatch keeps for its backward pass: about 16 float32 per hidden unit and step
        "update": horizon * -(-most // minibatches) * max(state_size, 256) * 16 * 4,
        "policies": num_parameters * 4 * 6,  # parameters, gradients, two moments, packed copies
    }
    check_memory(
        needs,
        available_bytes(device),
        str(device),
        num_envs=config.env.num_envs,
        horizon=horizon,
        per_step=("experience", "update"),
    )
