"""Training from top to bottom: the whole way of the data on one page.

load_config -> resolve NPCs (pin, verify, lock) -> build env, learner, pool -> assign
-> [collect rollout -> advantages -> update -> metrics -> maybe checkpoint]* -> evaluate -> result.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, fields
from typing import Any

import torch

from dual_policy_plugin.config import Config, TrainerConfig
from dual_policy_plugin.distributed import Ranks, join_ranks, leave_ranks, require_same_digests, sum_over_ranks
from dual_policy_plugin.envs.build import make_env
from dual_policy_plugin.errors import ConfigError, DivergedError
from dual_policy_plugin.evaluate import as_metrics, evaluate, load_opponents
from dual_policy_plugin.evaluation.matches import MatchResult
from dual_policy_plugin.experience import Experience, allocate_experience, experience_bytes
from dual_policy_plugin.learning.ppo import PpoSettings, PpoUpdate
from dual_policy_plugin.memory import available_bytes, check_memory
from dual_policy_plugin.npc.resolver import PinnedPolicy, resolve
from dual_policy_plugin.policies.build import compute_dtype
from dual_policy_plugin.policies.learner import Learner, build_learner
from dual_policy_plugin.policies.npcs import load_npc, pin_npcs
from dual_policy_plugin.policies.pool import NpcPool
from dual_policy_plugin.report.loggers import WandbLogger
from dual_policy_plugin.report.progress import Progress
from dual_policy_plugin.report.run_log import RunLog
from dual_policy_plugin.rollout.assignment import Assignment, assign
from dual_policy_plugin.rollout.collector import collect_rollout, start_rollouts
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy
from dual_policy_plugin.run_directory import RunDirectory
from dual_policy_plugin.run_state import STATE_NAME, Counters, encode_state, restore_state
from dual_policy_plugin.types import EnvSpec

log = logging.getLogger(__name__)


def train(config: Config, *, resolved_yaml: str = "", make_host: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Trains a learner against the configured NPC and gives the result.

    Args:
        config: the run.
        resolved_yaml: the composed config as text, kept in the run directory.
        make_host: a function that makes one copy of an env, instead of the config's env (see docs/own_env.md).

    Returns:
        What result.json holds: objective, steps, evaluations, the last checkpoint. Empty on ranks other than 0.

    Raises:
        DualPolicyError: anything that is wrong, before the first step; or a run that diverged.
    """
    device = choose_device(config.device)
    torch.set_num_threads(config.trainer.threads or os.cpu_count() or 1)
    ranks = join_ranks(device.type)
    try:
        with ExitStack() as stack:
            run = None
            if ranks.is_first:
                run = stack.enter_context(
                    RunDirectory.open(
                        config.train_dir / config.run,
                        config_yaml=resolved_yaml,
                        keep_checkpoints=config.trainer.keep_checkpoints,
                    )
                )
            return _train(config, run, ranks, device, make_host, stack)
    finally:
        leave_ranks()


def _train(
    config: Config,
    run: RunDirectory | None,
    ranks: Ranks,
    device: torch.device,
    make_host: Callable[..., Any] | None,
    stack: ExitStack,
) -> dict[str, Any]:
    trainer, dual = config.trainer, config.trainer.dual_policy
    dtype = compute_dtype(trainer.precision, device)

    # who plays: text -> pinned, verified bytes -> frozen policies
    sources = [dual.npc] if dual.npc is not None else []
    pinned = pin_npcs(sources, run.path if run else None)
    require_same_digests([npc.sha256 for npc in pinned], ranks, device)
    initial = resolve(trainer.initial_policy.uri) if trainer.initial_policy else None

    # where they play, and on which seats
    num_envs = config.env.num_envs
    env = stack.enter_context(
        closing(
            make_env(
                config.env,
                device=device,
                num_workers=trainer.num_workers,
                first_env=ranks.rank * num_envs,
                make_host=make_host,
            )
        )
    )
    spec = env.spec
    assignment = assign(spec.num_agents, dual.training_agents_pct if dual.enabled else 1.0, dual.assignment)
    npcs = [
        load_npc(s, p, spec, config.agent, dtype=dtype, device=device) for s, p in zip(sources, pinned, strict=True)
    ]
    opponents = load_opponents(config, npcs, spec, dtype=dtype, device=device)
    learner = build_learner(
        config.agent,
        spec,
        seed=config.seed,
        initial=initial,
        initial_agent=trainer.initial_policy.agent if trainer.initial_policy else None,
        dtype=dtype,
        device=device,
    )
    num_rows = num_envs * assignment.num_learner
    _check_fits(config, spec, num_rows, learner, device)

    # what a rollout needs, allocated once
    pool = NpcPool(npcs, num_envs=num_envs, num_npc=assignment.num_npc, device=device) if npcs else None
    mixed = MixedPolicy(learner.policy, pool, assignment, spec, device)
    metrics = EpisodeMetrics(spec, assignment, pool, device, count_first=False, count_later=True)
    experience = allocate_experience(
        spec, horizon=trainer.horizon, num_rows=num_rows, state_size=mixed.learner_state.shape[1], device=device
    )
    settings = PpoSettings(**{field.name: getattr(trainer, field.name) for field in fields(PpoSettings)})
    ppo = PpoUpdate(
        learner.policy,
        settings,
        betas=(trainer.adam_beta1, trainer.adam_beta2),
        eps=trainer.adam_eps,
        ranks=ranks,
    )
    _log_initialized(assignment, pinned, num_envs)

    # where the run stands: at its beginning, or where it was stopped
    env.reset(config.seed, stagger=True)
    counters = Counters()
    saved = run.load_state(STATE_NAME) if run else None
    if run and saved is not None:
        counters = restore_state(saved, str(run.path / "state" / STATE_NAME), env, mixed, ppo, metrics)
        run.truncate_metrics(counters.iteration)
    elif run:
        _save(run, learner, ppo, env, mixed, metrics, counters, pinned, {}, score=None)
    start_rollouts(env, mixed, experience)

    run_log = _open_log(config, run, pinned, stack) if run else None
    figures: dict[str, float] = {}
    scores = _Score(trainer.best_metric)
    while counters.agent_step < trainer.total_timesteps:
        started = time.perf_counter()
        numbers = mixed.random_numbers(
            config.seed, counters.iteration * trainer.horizon, trainer.horizon, first_env=ranks.rank * num_envs
        )
        collect_rollout(env, mixed, experience, metrics, numbers)
        collected = time.perf_counter()
        learning_rate = _learning_rate(trainer, counters.agent_step)
        losses = ppo.update(experience, learning_rate)

        _count_steps(counters, experience, spec, ranks)
        figures = _figures(counters, learning_rate, losses, metrics.take(ranks))
        finished = time.perf_counter()
        timing = _timing(config, counters, experience, spec, ranks, started, collected, finished)
        is_last = counters.agent_step >= trainer.total_timesteps
        if trainer.evaluate_interval and counters.iteration % trainer.evaluate_interval == 0 and run and not is_last:
            results = evaluate(learner.policy, opponents, assignment, config, device=device, make_host=make_host)
            figures |= as_metrics(results)
        scores.add(figures)
        checkpoint = None
        if run and (is_last or counters.iteration % trainer.checkpoint_interval == 0):
            checkpoint = _save(run, learner, ppo, env, mixed, metrics, counters, pinned, figures, score=scores.take())
        if run_log:
            run_log.iteration(counters.iteration, figures, timing, checkpoint)

    if run is None or run_log is None:
        return {}
    run_log.progress.message(f"evaluating over {config.evals.episodes} episodes an opponent")
    results = evaluate(learner.policy, opponents, assignment, config, device=device, make_host=make_host)
    result = _result(config, run, counters, pinned, figures, results)
    run_log.result(result)
    return result


def choose_device(name: str) -> torch.device:
    """The device that `device=` names; auto takes CUDA where there is one.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name} is not possible here; use auto, cpu or cuda") from error
    return device


class _Score:
    """The mean of the metric that chooses `best`, over the iterations since it was last taken."""

    def __init__(self, name: str) -> None:
        self.name, self.total, self.weight = name, 0.0, 0.0

    def add(self, figures: dict[str, float]) -> None:
        """Adds an iteration in which the metric exists, weighed by its episodes."""
        if self.name in figures:
            weight = figures.get("dual_policy/episodes", 1.0)
            self.total, self.weight = self.total + weight * figures[self.name], self.weight + weight

    def take(self) -> float | None:
        """The mean, None where the metric did not occur."""
        score = self.total / self.weight if self.weight else None
        self.total = self.weight = 0.0
        return score


def _check_fits(config: Config, spec: EnvSpec, num_rows: int, learner: Learner, device: torch.device) -> None:
    """Compares an estimate of the run's memory with what is free, before anything big is allocated (D9)."""
    state_size: int = learner.policy.state_size  # type: ignore[assignment]
    hidden = max(state_size, 256)
    horizon, minibatches = config.trainer.horizon, config.trainer.num_minibatches
    if num_rows < minibatches:
        raise ConfigError(f"trainer.num_minibatches={minibatches} is more than the {num_rows} learner rows; use fewer")
    num_parameters = sum(parameter.numel() for parameter in learner.policy.parameters())
    needs = {
        "experience": experience_bytes(spec, horizon=horizon, num_rows=num_rows, state_size=state_size),
        # activations that a minibatch keeps for its backward pass: about 16 numbers per hidden unit and step
        "update": horizon * -(-num_rows // minibatches) * hidden * 16 * 4,
        "policies": num_parameters * 4 * 6,
    }
    check_memory(
        needs,
        available_bytes(device),
        str(device),
        num_envs=config.env.num_envs,
        horizon=horizon,
        per_step=("experience", "update"),
    )


def _log_initialized(assignment: Assignment, pinned: list[PinnedPolicy], num_envs: int) -> None:
    facts = {
        "num_envs": num_envs,
        "policy_a_agents": assignment.num_learner,
        "npc_agents": assignment.num_npc,
        "policy_a_seats": list(assignment.learner_seats),
        "npcs": {npc.name: f"{npc.uri} sha256:{npc.sha256[:12]}" for npc in pinned},
    }
    log.info("Dual-policy system initialized: %s", facts)


def _open_log(config: Config, run: RunDirectory, pinned: list[PinnedPolicy], stack: ExitStack) -> RunLog:
    progress = Progress(
        config.run,
        config.trainer.total_timesteps,
        npc=pinned[0].requested if pinned else None,
        digest=pinned[0].sha256 if pinned else None,
    )
    wandb = WandbLogger.open(config.wandb, run, name=config.run, run_config=asdict(config))
    stack.callback(wandb.finish)
    return RunLog(run=run, progress=stack.enter_context(progress), wandb=wandb)


def _learning_rate(trainer: TrainerConfig, agent_step: int) -> float:
    left = 1.0 - agent_step / trainer.total_timesteps if trainer.anneal_lr else 1.0
    return trainer.learning_rate * max(left, 0.0)


def _count_steps(counters: Counters, experience: Experience, spec: EnvSpec, ranks: Ranks) -> None:
    """Steps count what learns: learner steps with weight 1, over all ranks."""
    weights = experience.weights
    steps = torch.tensor(float(experience.actions.numel())) if weights is None else weights.sum().cpu()
    counters.iteration += 1
    counters.agent_step += int(sum_over_ranks(steps.double().to(experience.actions.device), ranks))
    counters.env_agent_step += experience.horizon * spec.num_envs * spec.num_agents * ranks.world_size


def _figures(
    counters: Counters, learning_rate: float, losses: dict[str, torch.Tensor], episodes: dict[str, float]
) -> dict[str, float]:
    """One iteration's metrics, in one transfer from the device.

    Raises:
        DivergedError: a loss or the gradient is not finite.
    """
    values = torch.stack(list(losses.values())).tolist()
    figures = {f"losses/{name}": value for name, value in zip(losses, values, strict=True)}
    broken = [name for name, value in figures.items() if not math.isfinite(value)]
    if broken:
        raise DivergedError(
            f"iteration {counters.iteration}: {', '.join(broken)} is not finite; the last checkpoint is healthy: "
            "continue from it as trainer.initial_policy with a lower trainer.learning_rate"
        )
    charts = {
        "charts/agent_step": float(counters.agent_step),
        "charts/env_agent_step": float(counters.env_agent_step),
        "charts/epoch": float(counters.iteration),
        "charts/learning_rate": learning_rate,
    }
    return {**charts, **figures, **episodes}


def _timing(
    config: Config,
    counters: Counters,
    experience: Experience,
    spec: EnvSpec,
    ranks: Ranks,
    started: float,
    collected: float,
    finished: float,
) -> dict[str, float]:
    """Rates and costs of one iteration; they depend on the clock."""
    took = finished - started
    counters.elapsed_s += took
    steps = experience.horizon * ranks.world_size / took
    timing = {
        "charts/learner_SPS": steps * experience.num_rows,
        "charts/env_agent_SPS": steps * spec.num_envs * spec.num_agents,
        "timing/rollout_s": collected - started,
        "timing/update_s": finished - collected,
    }
    if config.hourly_cost is not None:
        timing["cost/hourly_total"] = config.hourly_cost * ranks.world_size
        timing["cost/accrued_total"] = timing["cost/hourly_total"] * counters.elapsed_s / 3600
    return timing


def _save(
    run: RunDirectory,
    learner: Learner,
    ppo: PpoUpdate,
    env: Any,
    mixed: MixedPolicy,
    metrics: EpisodeMetrics,
    counters: Counters,
    pinned: list[PinnedPolicy],
    figures: dict[str, float],
    *,
    score: float | None,
) -> str:
    """Saves the checkpoint and then the state that continues from it; gives the checkpoint's name."""
    metadata = {
        "run": run.path.name,
        "epoch": counters.iteration,
        "step": counters.agent_step,
        "metrics": figures,
        "npcs": [{"name": npc.name, "uri": npc.uri, "sha256": npc.sha256} for npc in pinned],
    }
    path = run.save_checkpoint(counters.iteration, learner.encode(metadata), score=score)
    run.save_state(STATE_NAME, encode_state(counters, env, mixed, ppo, metrics))
    return path.name


def _result(
    config: Config,
    run: RunDirectory,
    counters: Counters,
    pinned: list[PinnedPolicy],
    figures: dict[str, float],
    evals: list[MatchResult],
) -> dict[str, Any]:
    """What the run came to; `objective` is what a sweeper maximizes."""
    rates = [result.win_rate for result in evals]
    objective = sum(rates) / len(rates) if rates else figures.get("dual_policy/policy_a_reward")
    newest = run.newest_checkpoint()
    return {
        "run": config.run,
        "objective": objective,
        "agent_step": counters.agent_step,
        "env_agent_step": counters.env_agent_step,
        "iterations": counters.iteration,
        "elapsed_s": round(counters.elapsed_s, 3),
        "checkpoint": str(newest[1].relative_to(run.path)) if newest else None,
        "npcs": [{"name": npc.name, "uri": npc.uri, "sha256": npc.sha256} for npc in pinned],
        "evals": [result.as_dict() for result in evals],
        "metrics": figures,
    }
