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
from dual_policy_plugin.distributed import Ranks
from dual_policy_plugin.envs.build import env_bytes, make_env
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.evaluate import assign_seats, load_opponents, opponent_sources
from dual_policy_plugin.experience import Experience, allocate_experience, experience_bytes, scratch_bytes
from dual_policy_plugin.learning.ppo import LOSS_NAMES, PpoSettings, PpoUpdate
from dual_policy_plugin.memory import available_bytes, check_memory
from dual_policy_plugin.npc.holds import Hold
from dual_policy_plugin.npc.lock import LockEntry
from dual_policy_plugin.npc.resolver import PinnedPolicy, hold_pinned
from dual_policy_plugin.policies.build import compute_dtype
from dual_policy_plugin.policies.learner import Learner, build_learner
from dual_policy_plugin.policies.nets import FastPolicy
from dual_policy_plugin.policies.npcs import Wish, load_npc, pin_policies
from dual_policy_plugin.policies.pool import Npc, NpcPool
from dual_policy_plugin.rollout.assignment import Assignment
from dual_policy_plugin.rollout.captured import Play, choose_play
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy
from dual_policy_plugin.types import EnvSpec, VecEnv

log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True, frozen=True)
class Parts:
    """The live objects of one run on one rank."""

    pinned: list[PinnedPolicy]
    """The NPCs as they were pinned."""
    lock: tuple[LockEntry, ...]
    """Every policy that the run was given: NPCs, opponents, what the learner started from."""
    hold: Hold
    """Keeps them in the cache while the run lives."""
    initial: PinnedPolicy | None
    """What trainer.initial_policy named, as it was pinned."""
    env: VecEnv
    assignment: Assignment
    learner: Learner
    opponents: list[Npc]
    """Whom the learner is evaluated against."""
    mixed: MixedPolicy
    metrics: EpisodeMetrics
    experience: Experience
    ppo: PpoUpdate
    play: Play
    """Plays one rollout into `experience`."""


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
        _check_triton()
    dtype = compute_dtype(trainer.precision, device)

    # who plays: text -> pinned, verified bytes, the same on every rank
    initial = trainer.initial_policy
    wishes = [Wish(source=dual.npc, role="npc")] if dual.npc is not None else []
    wishes += [Wish(source=initial, role="initial")] if initial is not None else []
    wishes += [Wish(source=source, role="opponent") for source in opponent_sources(config)]
    pins = pin_policies(wishes, run_path, given=dual.lock, seed=config.seed, ranks=ranks, device=device)
    hold = stack.enter_context(hold_pinned([one for found in pins.policies for one in found]))
    pinned = pins.of_role("npc", wishes)

    # where they play, and on which seats
    check_memory(
        {"env": env_bytes(config.env)}, available_bytes(device), str(device), num_envs=config.env.num_envs, horizon=0
    )
    num_envs, first_env = config.env.num_envs, ranks.rank * config.env.num_envs
    env = stack.enter_context(
        closing(
            make_env(
                config.env, device=device, num_workers=trainer.num_workers, first_env=first_env, make_host=make_host
            )
        )
    )
    spec = env.spec
    assignment = assign_seats(spec.num_agents, dual)
    npcs = [load_npc(dual.npc, pin, spec, config.agent, dtype=dtype, device=device) for pin in pinned if dual.npc]
    opponent_pins = pins.of_role("opponent", wishes)
    opponents = load_opponents(config, opponent_pins, npcs, spec, assignment, dtype=dtype, device=device)

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
    num_rows = num_envs * assignment.num_learner
    _check_fits(config, spec, num_rows, [learner.policy, *(npc.policy for npc in npcs)], device)

    # what a rollout and an update need, allocated once
    how_update = _use_kernels(env, learner.inner, device, fused=fused)
    pool = NpcPool(npcs, num_envs=num_envs, num_npc=assignment.num_npc, device=device) if npcs else None
    mixed = MixedPolicy(learner.policy, pool, assignment, spec, device)
    settings = PpoSettings(**{field.name: getattr(trainer, field.name) for field in fields(PpoSettings)})
    ppo = PpoUpdate(
        learner.policy,
        settings,
        betas=(trainer.adam_beta1, trainer.adam_beta2),
        eps=trainer.adam_eps,
        ranks=ranks,
        use_kernels=fused,
        capture=fused,
    )
    stack.callback(ppo.release)
    metrics = EpisodeMetrics(spec, assignment, pool, device, count_first=False, count_later=True)
    _check_best_metric(config, metrics, opponents)
    experience = allocate_experience(
        spec, horizon=trainer.horizon, num_rows=num_rows, state_size=mixed.learner_state.shape[1], device=device
    )
    play, how = choose_play(env, mixed, experience, metrics, fused=trainer.fused)
    facts = {
        "num_envs": num_envs,
        "policy_a_agents": assignment.num_learner,
        "npc_agents": assignment.num_npc,
        "policy_a_seats": list(assignment.learner_seats),
        "npc_seats": list(assignment.npc_seats),
        "device": str(device),
        "precision": str(dtype).removeprefix("torch."),
        **({"rollout": how, "update": how_update} if device.type == "cuda" else {"threads": torch.get_num_threads()}),
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
        mixed=mixed,
        metrics=metrics,
        experience=experience,
        ppo=ppo,
        play=play,
    )


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


def _check_fits(config: Config, spec: EnvSpec, num_rows: int, policies: list[nn.Module], device: torch.device) -> None:
    """Compares an estimate of what the run will allocate with what is free; `policies` begins with the learner."""
    horizon, minibatches = config.trainer.horizon, config.trainer.num_minibatches
    if num_rows < minibatches:
        raise ConfigError(f"trainer.num_minibatches={minibatches} is more than the {num_rows} learner rows; use fewer")
    state_size, *npc_state_sizes = (int(policy.state_size) for policy in policies)  # type: ignore[arg-type]
    num_parameters = sum(parameter.numel() for policy in policies for parameter in policy.parameters())
    needs = {
        "experience": experience_bytes(spec, horizon=horizon, num_rows=num_rows, state_size=state_size),
        "scratch": scratch_bytes(
            spec,
            num_learner=num_rows // spec.num_envs,
            num_npcs=len(npc_state_sizes),
            state_size=state_size,
            npc_state_size=max(npc_state_sizes, default=0),
        ),
        # what a minibatch keeps for its backward pass: about 16 float32 per hidden unit and step
        "update": horizon * -(-num_rows // minibatches) * max(state_size, 256) * 16 * 4,
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
