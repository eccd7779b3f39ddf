"""Training from top to bottom: the whole way of the data on one page.

Config -> parts (NPCs pinned, verified, loaded; env, learner, seats) -> resume
-> [collect rollout -> update (advantages, PPO) -> metrics -> maybe evaluate, maybe save]* -> evaluate -> result.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from dual_policy_plugin.config import Config, TrainerConfig
from dual_policy_plugin.distributed import join_ranks, leave_ranks
from dual_policy_plugin.envs.build import num_processes
from dual_policy_plugin.envs.workers import num_cores
from dual_policy_plugin.evaluate import as_metrics, evaluate
from dual_policy_plugin.evaluation.matches import MatchResult
from dual_policy_plugin.files import read_lines
from dual_policy_plugin.memory import keep_freed_memory
from dual_policy_plugin.npc.lock import lock_facts
from dual_policy_plugin.parts import Parts, build_parts, choose_device
from dual_policy_plugin.policies.npcs import recorded_npcs
from dual_policy_plugin.report.iteration import Laps, Score, iteration_figures, iteration_timing
from dual_policy_plugin.report.run_log import RunLog
from dual_policy_plugin.rng import LOW_31_BITS, hash32
from dual_policy_plugin.rollout.collector import start_rollouts
from dual_policy_plugin.run_directory import RunDirectory
from dual_policy_plugin.run_state import (
    STATE_NAME,
    Counters,
    encode_state,
    keep_optimizer,
    read_counters,
    restore_state,
    share_counters,
    share_state,
)
from dual_policy_plugin.seating import Seating
from dual_policy_plugin.share_schedule import next_num_learner


def train(config: Config, *, resolved_yaml: str = "", make_host: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Trains a learner against the configured NPC and gives the result.

    Args:
        config: the run.
        resolved_yaml: the composed config as text, kept in the run directory; empty: made from `config`.
        make_host: a function that makes one copy of an env, instead of the config's env (see docs/own_env.md).

    Returns:
        What result.json holds: objective, steps, evaluations, the last checkpoint. Empty on ranks other than 0.

    Raises:
        DualPolicyError: anything that is wrong, before the first step; or a run that diverged.
    """
    device = choose_device(config.device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    trainer = config.trainer
    # torch's threads spin between two operations: on a worker's core they cost the env 3 to 10 times its step
    num_free = num_cores() - num_processes(config.env, trainer.num_workers, make_host)
    torch.set_num_threads(trainer.threads or max(1, num_free))
    keep_freed_memory()
    ranks = join_ranks(device.type)
    with ExitStack() as stack:
        stack.callback(leave_ranks)
        run = stack.enter_context(_open_run(config, resolved_yaml)) if ranks.is_first else None
        parts = build_parts(config, run.path if run else None, ranks, device, make_host, stack)
        if run is not None and parts.lock:
            run.record_lock(lock_facts(parts.lock))
        env, ppo = parts.env, parts.ppo
        first_env = ranks.rank * env.spec.num_envs

        saved = run.load_state(STATE_NAME) if run else None
        counters = share_counters(read_counters(saved, STATE_NAME) if saved else Counters(), ranks, device)
        seating = parts.seatings(counters.num_learner or parts.assignment.num_learner)
        env.reset(config.seed, stagger=True)
        if run is not None:
            _resume(config, run, parts, seating, counters, saved)
        share_state(seating.mixed, ppo, seating.metrics, ranks)
        if counters.iteration and not (run and hasattr(env, "state_dict")):
            # no state to go on from: new episodes, or a run that is often stopped would see its first ones only
            env.reset(_later_seed(config, counters), stagger=True)
        log = stack.enter_context(RunLog(run, config, parts.pinned)) if run else None
        score, figures = Score(trainer.best_metric), _last_figures(run) if run else {}
        start_rollouts(env, seating.mixed, seating.experience)
        laps, clock = Laps(device), time.perf_counter()
        while counters.agent_step < trainer.total_timesteps:
            laps.mark()
            first_step = counters.iteration * trainer.horizon
            numbers = seating.mixed.random_numbers(config.seed, first_step, trainer.horizon, first_env=first_env)
            seating.play(numbers)  # fills experience: rollout/collector.py, or its fused twin on a GPU
            laps.mark()
            experience = seating.experience
            learning_rate = _learning_rate(trainer, counters.agent_step)
            losses = ppo.update(experience, learning_rate)
            parts.learner.update_statistics(experience, ranks)
            laps.mark()

            figures, sums = iteration_figures(
                counters, learning_rate, losses, seating.metrics, experience, env.spec, ranks
            )
            finished = time.perf_counter()
            counters.elapsed_s += finished - clock  # with what evaluation and saving took after the last iteration
            clock = finished
            timing = iteration_timing(config, counters, experience, env.spec, ranks, laps)
            seating = _next_seating(config, parts, seating, counters, sums)
            if run is None or log is None:
                continue
            is_last = counters.agent_step >= trainer.total_timesteps
            if trainer.evaluate_interval and counters.iteration % trainer.evaluate_interval == 0 and not is_last:
                figures |= as_metrics(_evaluate(config, parts, device, make_host))
            score.add(figures)
            log.record(counters.iteration, figures, timing)  # first: no checkpoint stands without its metrics
            checkpoint = None
            if is_last or counters.iteration % trainer.checkpoint_interval == 0:
                checkpoint = _save(config.run, run, parts, seating, counters, figures, score.take())
            log.show(counters.iteration, figures, timing, checkpoint)

        if run is None or log is None:
            return {}
        if config.evals.episodes and parts.opponents:
            names = ", ".join(opponent.name for opponent in parts.opponents)
            log.message(f"evaluating: {config.evals.episodes} episodes against {names}")
        result = _result(config, run, parts, counters, figures, _evaluate(config, parts, device, make_host))
        log.result(result)
        return result


def _open_run(config: Config, resolved_yaml: str) -> RunDirectory:
    text = resolved_yaml or json.dumps(asdict(config), indent=2, default=str) + "\n"  # JSON is YAML
    return RunDirectory.open(
        config.train_dir / config.run, config_yaml=text, keep_checkpoints=config.trainer.keep_checkpoints
    )


def _resume(
    config: Config, run: RunDirectory, parts: Parts, seating: Seating, counters: Counters, saved: bytes | None
) -> None:
    """Puts the run where it was stopped; a new one saves epoch 0, so that its beginning can be played against too."""
    initial = config.trainer.initial_policy
    if saved is None:
        if initial and initial.keep_optimizer and parts.initial:
            keep_optimizer(parts.initial, parts.ppo)
        _save(config.run, run, parts, seating, counters, {}, None)
        return
    restore_state(saved, str(run.path / "state" / STATE_NAME), parts.env, seating.mixed, parts.ppo, seating.metrics)
    run.truncate_metrics(counters.iteration)


def _next_seating(config: Config, parts: Parts, seating: Seating, counters: Counters, sums: Tensor) -> Seating:
    """The seats of the next iteration. Where the schedule changes the share of learners, all envs start anew."""
    dual, env = config.trainer.dual_policy, parts.env
    if dual.pct_schedule is None:
        return seating
    counters.share_episodes += float(sums[:, 0].sum())
    counters.share_wins += float(sums[:, 1].sum())
    num_learner = next_num_learner(
        dual.pct_schedule,
        start_pct=dual.training_agents_pct,
        agent_step=counters.agent_step,
        total_timesteps=config.trainer.total_timesteps,
        num_agents=env.spec.num_agents,
        current=seating.assignment.num_learner,
        wins=counters.share_wins,
        episodes=counters.share_episodes,
    )
    if num_learner == seating.assignment.num_learner:
        return seating
    counters.num_learner, counters.share_wins, counters.share_episodes = num_learner, 0.0, 0.0
    env.reset(_later_seed(config, counters), stagger=True)
    following = parts.seatings(num_learner)
    following.start(env)
    return following


def _later_seed(config: Config, counters: Counters) -> int:
    """The seed of episodes that all envs begin together, later than at the run's beginning."""
    return int(hash32(config.seed, counters.iteration)) & LOW_31_BITS


def _last_figures(run: RunDirectory) -> dict[str, float]:
    """The newest line of metrics.jsonl; empty in a new run."""
    lines = read_lines(run.path / "metrics.jsonl")
    return {name: value for name, value in json.loads(lines[-1]).items() if name != "iteration"} if lines else {}


def _newest_return(run: RunDirectory) -> float | None:
    """The learner's mean return in the newest iteration in which an episode ended; None if none ever did."""
    for line in reversed(read_lines(run.path / "metrics.jsonl")):
        figures = json.loads(line)
        if "dual_policy/policy_a_reward" in figures:
            return float(figures["dual_policy/policy_a_reward"])
    return None


def _learning_rate(trainer: TrainerConfig, agent_step: int) -> float:
    left = 1.0 - agent_step / trainer.total_timesteps if trainer.anneal_lr else 1.0
    return trainer.learning_rate * max(left, 0.0)


def _evaluate(
    config: Config, parts: Parts, device: torch.device, make_host: Callable[..., Any] | None
) -> list[MatchResult]:
    return evaluate(parts.learner.policy, parts.opponents, parts.assignment, config, device=device, make_host=make_host)


def _save(
    name: str,
    run: RunDirectory,
    parts: Parts,
    seating: Seating,
    counters: Counters,
    figures: dict[str, float],
    score: float | None,
) -> str:
    """Saves the checkpoint, then the state that continues from it; gives the checkpoint's name.

    Killed between the two, the run continues from the older state and makes this checkpoint again.
    """
    metadata = {
        "run": name,
        "epoch": counters.iteration,
        "step": counters.agent_step,
        "metrics": figures,
        "npcs": recorded_npcs(parts.lock),
    }
    path = run.save_checkpoint(counters.iteration, parts.learner.encode(metadata), score=score)
    run.save_state(STATE_NAME, encode_state(counters, parts.env, seating.mixed, parts.ppo, seating.metrics))
    parts.hold.refresh()
    return path.name


def _npc_facts(parts: Parts) -> list[dict[str, str]]:
    return [{"name": npc.name, "uri": npc.uri, "sha256": npc.sha256} for npc in parts.pinned]


def _result(
    config: Config,
    run: RunDirectory,
    parts: Parts,
    counters: Counters,
    figures: dict[str, float],
    evals: list[MatchResult],
) -> dict[str, Any]:
    """What the run came to; `objective` is what a sweeper maximizes: the mean win rate, else the learner's return.

    Policies that are held out have no say in it, where there are others: a choice by them would be training on them.
    """
    seen = [result for result in evals if result.opponent not in parts.held_out]
    rates = [result.win_rate for result in seen or evals]
    newest = run.newest_checkpoint()
    objective = sum(rates) / len(rates) if rates else _newest_return(run)
    return {
        "run": config.run,
        "objective": objective,
        "agent_step": counters.agent_step,
        "env_agent_step": counters.env_agent_step,
        "iterations": counters.iteration,
        "elapsed_s": round(counters.elapsed_s, 3),
        "checkpoint": str(newest[1].relative_to(run.path)) if newest else None,
        "npcs": _npc_facts(parts),
        "evals": [result.as_dict() for result in evals],
        "metrics": figures,
    }
