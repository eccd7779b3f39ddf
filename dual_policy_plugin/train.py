"""Training from top to bottom: the whole way of the data on one page.

Config -> parts (NPCs pinned, verified, loaded; env, learner, seats) -> resume
-> [collect rollout -> update (advantages, PPO) -> metrics -> maybe evaluate, maybe save -> NPCs and seats of the next
iteration -> maybe save and stop]* -> evaluate -> result.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from dual_policy_plugin.config import Config, TrainerConfig
from dual_policy_plugin.continuation import (
    check_progress,
    last_figures,
    open_run,
    resume,
    run_result,
    save_checkpoint,
    save_state,
    settle,
)
from dual_policy_plugin.devices import choose_device, set_threads
from dual_policy_plugin.evaluate import as_metrics, evaluate
from dual_policy_plugin.evaluation.matches import MatchResult
from dual_policy_plugin.heartbeat import beat
from dual_policy_plugin.memory import keep_freed_memory
from dual_policy_plugin.npc.lock import lock_facts
from dual_policy_plugin.parts import Parts, build_parts
from dual_policy_plugin.ranks.distributed import join_ranks, open_group, tell_error
from dual_policy_plugin.ranks.variables import find_ranks
from dual_policy_plugin.report.iteration import (
    Laps,
    RunClock,
    add_to_score,
    iteration_figures,
    iteration_rates,
    take_score,
)
from dual_policy_plugin.report.run_log import RunLog
from dual_policy_plugin.rollout.collector import start_rollouts
from dual_policy_plugin.run_state import (
    STATE_NAME,
    Counters,
    decode_state,
    share_counters,
)
from dual_policy_plugin.seating import next_seating
from dual_policy_plugin.snapshots import change_npcs, count_games
from dual_policy_plugin.stop_signals import StopSignals


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
    ranks = find_ranks()
    trainer = config.trainer
    set_threads(config, make_host)
    keep_freed_memory()
    clock = RunClock(config.hourly_cost, ranks)
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals(trainer.grace_s))
        stack.enter_context(join_ranks(ranks))
        device = choose_device(config.device, local_rank=ranks.local_rank)
        open_group(ranks, device.type)
        run = open_run(config, resolved_yaml, stack) if ranks.is_first else None
        parts = build_parts(config, run.path if run else None, ranks, device, make_host, stack)
        if run is not None and parts.players.lock:
            run.record_lock(lock_facts(parts.players.lock))
        env, ppo = parts.env, parts.ppo
        first_env = ranks.rank * env.spec.num_envs

        data = run.load_state(STATE_NAME) if run else None
        saved = decode_state(data, f"{run.path}/state/{STATE_NAME}") if run and data else None
        counters = share_counters(saved.counters if saved else Counters(), ranks, device)
        starts = clock.go_on(last_figures(run, "timing.jsonl") if run else {}, counters.iteration)
        if run is not None:
            check_progress(run, counters.iteration, starts, clock.read())
        env.reset(config.seed, stagger=True)
        seating = resume(config, run, parts, counters, saved, ranks)
        log = stack.enter_context(RunLog(run, config, parts.players.npcs)) if run else None
        figures = last_figures(run) if run else {}
        start_rollouts(env, seating.mixed, seating.experience)
        laps, saved_at = Laps(device), time.monotonic()
        stack.push(tell_error)  # called first of all, where the run fails
        signals.listen()
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
            timing = iteration_rates(experience, env.spec, ranks, laps) | clock.read()
            beat(timing["timing/elapsed_s"] if ranks.is_first else None)
            is_last = counters.agent_step >= trainer.total_timesteps
            is_snapshot = count_games(parts.roster, seating.mixed.pool, sums, counters.iteration)
            has_checkpoint = is_last or is_snapshot or counters.iteration % trainer.checkpoint_interval == 0
            checkpoint = None
            if run is not None and log is not None:
                if trainer.evaluate_interval and counters.iteration % trainer.evaluate_interval == 0 and not is_last:
                    figures |= as_metrics(_evaluate(config, parts, device, make_host))
                add_to_score(counters, figures, trainer.best_metric)
                log.record(counters.iteration, figures, timing)  # first: no checkpoint stands without its metrics
                if has_checkpoint:
                    checkpoint = save_checkpoint(config.run, run, parts, counters, figures, take_score(counters))
            snapshot = counters.iteration if is_snapshot else None
            change_npcs(parts.roster, parts.seatings.pool, run, snapshot, ranks)
            seating = next_seating(config, env, parts.seatings, seating, counters, sums)
            is_due = checkpoint is not None or time.monotonic() - saved_at >= trainer.state_interval_s
            asked, is_due = signals.asked(ranks, device, is_due=is_due and ranks.is_first)
            if asked or is_due:
                save_state(run, parts, seating, counters, ranks, is_between=not has_checkpoint)
                saved_at = time.monotonic()
            if log is not None:
                log.show(counters.iteration, figures, timing, checkpoint)
            if asked:
                settle(run, signals.left_s())
                signals.answer(asked, counters.iteration, ranks, device)
        signals.release()

        if run is None or log is None:
            return {}
        if config.evals.episodes and parts.opponents:
            names = ", ".join(opponent.name for opponent in parts.opponents)
            log.message(f"evaluating: {config.evals.episodes} episodes against {names}")
        evals = _evaluate(config, parts, device, make_host)
        totals = clock.read()
        run.append_timing({"iteration": counters.iteration, **totals, "timing/starts": 0})
        result = run_result(config, run, parts, counters, figures, evals, totals["timing/elapsed_s"])
        log.result(result)
        return result


def _learning_rate(trainer: TrainerConfig, agent_step: int) -> float:
    left = 1.0 - agent_step / trainer.total_timesteps if trainer.anneal_lr else 1.0
    return trainer.learning_rate * max(left, 0.0)


def _evaluate(
    config: Config, parts: Parts, device: torch.device, make_host: Callable[..., Any] | None
) -> list[MatchResult]:
    return evaluate(
        parts.learner.policy,
        parts.opponents,
        parts.assignment,
        config,
        parts.env.spec,
        device=device,
        make_host=make_host,
    )
