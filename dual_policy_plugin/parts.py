"""Everything that a training run is made of, built in order and checked before the first step.

Takes the Config; gives Parts. What is wrong with an NPC, a share, a space or the memory ends the run here.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dual_policy_plugin.config import Config, TrainerConfig
from dual_policy_plugin.distributed import Ranks
from dual_policy_plugin.envs.build import env_bytes, make_env, num_processes
from dual_policy_plugin.envs.workers import num_cores
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.evaluate import assign_seats
from dual_policy_plugin.experience import experience_bytes, scratch_bytes
from dual_policy_plugin.learning.ppo import LOSS_NAMES, PpoSettings, PpoUpdate
from dual_policy_plugin.memory import available_bytes, check_memory
from dual_policy_plugin.npc.holds import Hold
from dual_policy_plugin.npc.lock import LockEntry
from dual_policy_plugin.npc.resolver import PinnedPolicy, hold_pinned, unique_names
from dual_policy_plugin.policies.build import compute_dtype
from dual_policy_plugin.policies.learner import Learner, build_learner
from dual_policy_plugin.policies.nets import FastPolicy
from dual_policy_plugin.policies.npcs import Pins, Wish, load_npc, pin_policies
from dual_policy_plugin.policies.pool import Npc, NpcPool, empty_slots
from dual_policy_plugin.rollout.assignment import Assignment
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.roster import Entry, Roster
from dual_policy_plugin.seating import Seatings
from dual_policy_plugin.share_schedule import possible_counts
from dual_policy_plugin.types import EnvSpec, VecEnv

log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True, frozen=True)
class Parts:
    """The live objects of one run on one rank."""

    pinned: list[PinnedPolicy]
    """The NPCs of the config as they were pinned."""
    lock: tuple[LockEntry, ...]
    """Every policy that the run was given: NPCs, opponents, what the learner started from."""
    hold: Hold
    """Keeps them in the cache while the run lives."""
    initial: PinnedPolicy | None
    """What trainer.initial_policy named, as it was pinned."""
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
    trainer, dual, initial = config.trainer, config.trainer.dual_policy, config.trainer.initial_policy
    fused = trainer.fused and device.type == "cuda"
    if fused:
        _check_triton()
    dtype = compute_dtype(trainer.precision, device)

    # who plays: text -> pinned, verified bytes, the same on every rank
    wishes = _wishes(config)
    pins = pin_policies(wishes, run_path, given=dual.lock, seed=config.seed, ranks=ranks, device=device)
    check_held_out(pins.of_role("held_out", wishes), _first_npcs(config, wishes, pins))
    hold = stack.enter_context(hold_pinned([one for found in pins.policies for one in found]))
    pinned = pins.of_role("npc", wishes)

    # where they play, and on which seats
    env = _make_env(config, ranks, device, make_host, stack)
    spec = env.spec
    assignment = assign_seats(spec.num_agents, dual)

    def load_all(role: str) -> list[Npc]:
        return [
            load_npc(wish.source, pin, spec, config.agent, dtype=dtype, device=device)
            for wish, found in zip(wishes, pins.policies, strict=True)
            for pin in found
            if wish.role == role
        ]

    npcs = load_all("npc")
    opponents, held_out = _opponents(config, npcs, load_all("opponent"), load_all("held_out"), assignment)

    # who learns
    initial_pin = next(iter(pins.of_role("initial", wishes)), None)
    learner = build_learner(
        config.agent,
        spec,
        seed=config.seed,
        initial=initial_pin,
        initial_agent=initial.agent if initial else None,
        dtype=dtype,
        device=device,
    )
    num_free = dual.self_play.window + 1 if dual.self_play is not None else 0
    all_policies = [learner.policy, *(npc.policy for npc in npcs), *[learner.policy] * num_free]
    _check_fits(config, spec, assignment, all_policies, device)
    slots = npcs + empty_slots(learner.policy, num_free)  # copied before the update makes its parameters views
    roster = _begin_roster(config, wishes, pins) if slots else None

    # what an update and a rollout need, allocated once
    how_update = _use_kernels(env, learner.inner, device, fused=fused)
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
    pool = NpcPool(slots, num_envs=spec.num_envs, num_npc=assignment.num_npc, device=device) if slots else None
    seatings = Seatings(config, env, assignment, learner.policy, pool)
    seating = seatings(assignment.num_learner)
    _check_best_metric(config, seating.metrics, opponents)
    facts = {
        "num_envs": spec.num_envs,
        "policy_a_agents": assignment.num_learner,
        "npc_agents": assignment.num_npc,
        "policy_a_seats": list(assignment.learner_seats),
        "npc_seats": list(assignment.npc_seats),
        "device": str(device),
        "precision": str(dtype).removeprefix("torch."),
        **(
            {"rollout": seating.how, "update": how_update}
            if device.type == "cuda"
            else {"threads": torch.get_num_threads()}
        ),
        "npcs": {npc.name: f"{npc.uri} sha256:{npc.sha256[:12]}" for npc in pinned},
    }
    log.info("Dual-policy system initialized: %s", facts)
    return Parts(
        pinned=pinned,
        lock=pins.entries,
        hold=hold,
        initial=initial_pin,
        env=env,
        assignment=assignment,
        learner=learner,
        opponents=opponents,
        held_out=held_out,
        roster=roster,
        seatings=seatings,
        ppo=ppo,
    )


def _wishes(config: Config) -> list[Wish]:
    """Every policy that the config names, with what it is to the run."""
    wishes = [Wish(source=source, role=role) for role, source in config.policies]
    asked = [wish.requested for wish in wishes if wish.role == "npc"]
    if twice := next((one for one in asked if asked.count(one) > 1), None):
        raise ConfigError(
            f"trainer.dual_policy.pool names {twice} twice; name it once, with a weight if it is to count"
        )
    return wishes


def _begin_roster(config: Config, wishes: list[Wish], pins: Pins) -> Roster:
    """The roster of a new run."""
    dual = config.trainer.dual_policy
    npcs = [
        Entry(
            name=pin.name,
            sha256=pin.sha256,
            weight=1.0 if wish.source.weight is None else wish.source.weight,
            born=-place if wish.source.type == "latest" else 0,  # that selector gives the newest first
        )
        for wish, found in zip(wishes, pins.policies, strict=True)
        for place, pin in enumerate(found)
        if wish.role == "npc"
    ]
    return Roster.begin(npcs, dual.matchmaking, dual.self_play)


def _first_npcs(config: Config, wishes: list[Wish], pins: Pins) -> dict[str, str]:
    """sha256 -> name of the NPCs that a run begins with; where self-play has no other, the learner as it begins."""
    is_learner = config.trainer.dual_policy.self_play is not None and not pins.of_role("npc", wishes)
    return {pin.sha256: pin.name for pin in pins.of_role("initial" if is_learner else "npc", wishes)}


def check_held_out(held_out: Iterable[PinnedPolicy | LockEntry], npcs: Mapping[str, str]) -> None:
    """Raises a ConfigError where a held-out policy is an NPC of the run, by its bytes and not by its name.

    Args:
        held_out: the policies of evals.held_out.
        npcs: sha256 -> name.
    """
    for held in held_out:
        if held.sha256 in npcs:
            raise ConfigError(
                f"evals.held_out={held.requested} is the NPC {npcs[held.sha256]} of this run (sha256 "
                f"{held.sha256[:12]}); hold out a policy that the learner does not train against"
            )


def _make_env(
    config: Config, ranks: Ranks, device: torch.device, make_host: Callable[..., Any] | None, stack: ExitStack
) -> VecEnv:
    num_envs, num_workers = config.env.num_envs, config.trainer.num_workers
    check_memory({"env": env_bytes(config.env)}, available_bytes(device), str(device), num_envs=num_envs, horizon=0)
    first_env = ranks.rank * num_envs
    env = make_env(config.env, device=device, num_workers=num_workers, first_env=first_env, make_host=make_host)
    return stack.enter_context(closing(env))


def _opponents(
    config: Config, npcs: list[Npc], named: list[Npc], held_out: list[Npc], assignment: Assignment
) -> tuple[list[Npc], frozenset[str]]:
    """Whom the learner is evaluated against, each with a name of its own, and which of those names are held out.

    Raises:
        ConfigError: there is no seat for an opponent that was named.
    """
    for key, uris in (("opponents", config.evals.opponents), ("held_out", config.evals.held_out)):
        if uris and assignment.num_npc == 0:
            raise ConfigError(
                f"evals.{key}={uris} would find no seat: all agents learn; "
                f"switch an NPC on (trainer.dual_policy), or use evals.{key}=[]"
            )
    opponents = named or npcs
    interval = config.trainer.evaluate_interval
    if interval and config.evals.episodes and not opponents and not held_out:
        mend = (
            "name some in evals.opponents, for example [builtin://arena/medium]" if assignment.num_npc else "use null"
        )
        raise ConfigError(
            f"trainer.evaluate_interval={interval} has nobody to evaluate against, no NPC is named; {mend}"
        )
    names = unique_names([npc.name for npc in [*opponents, *held_out]])
    renamed = [replace(npc, name=name) for npc, name in zip([*opponents, *held_out], names, strict=True)]
    return renamed, frozenset(names[len(opponents) :])


def set_threads(config: Config, make_host: Callable[..., Any] | None = None) -> None:
    """As many CPU threads as `trainer.threads` says; without it as many cores as the env's workers leave free.

    torch's threads spin between two operations: on a worker's core they cost the env 3 to 10 times its step.
    """
    num_free = num_cores() - num_processes(config.env, config.trainer.num_workers, make_host)
    torch.set_num_threads(config.trainer.threads or max(1, num_free))


def choose_device(name: str, *, local_rank: int = 0) -> torch.device:
    """The device that `device=` names; auto takes CUDA where there is one. A GPU becomes the current one: kernels and
    graphs are launched there.

    Args:
        name: auto, cpu, cuda or cuda:N.
        local_rank: which process of this machine we are: auto and cuda give each its own GPU.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.device_count() > 0:
        # with its number, which set_device wants; a process that sees one GPU was given that one
        name = f"cuda:{local_rank if torch.cuda.device_count() > 1 else 0}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name} is not known; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise ConfigError(f"device={name} is not there, torch sees {there} CUDA devices; use auto or cpu")
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device.index)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device={name} does not work here ({reason}); use auto or cpu") from error
    return device


def _check_triton() -> None:
    """Without Triton a GPU would run, silently, at a fraction of its speed."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "trainer.fused=true needs the package triton, which is not installed; pip install triton, or use false"
        ) from error


def _use_kernels(env: VecEnv, learner: nn.Module, device: torch.device, *, fused: bool) -> str:
    """Switches on the kernels of env and learner, where they have some; gives what the log says of the update."""
    if not fused:
        return "plain torch"
    from dual_policy_plugin.kernels.lstm import supports

    if hasattr(env, "use_kernels"):
        env.use_kernels = True
    if not hasattr(learner, "use_kernels"):
        return "plain torch in one CUDA graph: this agent has no kernels"
    if isinstance(learner, FastPolicy) and not supports(learner.hidden_size, learner.compute_dtype, device):
        return f"plain torch in one CUDA graph: no LSTM kernel for agent.hidden_size={learner.hidden_size}"
    learner.use_kernels = True  # type: ignore[assignment]
    return "fused kernels in one CUDA graph"


def _check_best_metric(config: Config, metrics: EpisodeMetrics, opponents: list[Npc]) -> None:
    """A metric that never occurs would never make a checkpoint `best`, and nobody would know why."""
    name = config.trainer.best_metric
    default = next(field.default for field in fields(TrainerConfig) if field.name == "best_metric")
    known = [*metrics.names(), *(f"losses/{loss}" for loss in LOSS_NAMES), "losses/explained_variance"]
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
