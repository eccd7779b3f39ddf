"""What a run leaves in its directory and takes up again: checkpoints, the state beside them, the result.

Takes the live objects of a run; `train.py` calls it before, in and after its loop.
"""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch

from dual_policy_plugin.config import Config
from dual_policy_plugin.errors import RunError
from dual_policy_plugin.evaluation.matches import MatchResult
from dual_policy_plugin.files import lines_backwards
from dual_policy_plugin.heartbeat import is_watched
from dual_policy_plugin.npc.lock import check_held_out
from dual_policy_plugin.parts import Parts
from dual_policy_plugin.policies.npcs import recorded_npcs
from dual_policy_plugin.ranks.distributed import Ranks, gather_tensors, share_text
from dual_policy_plugin.run.directory import RunDirectory
from dual_policy_plugin.run.mirror import RunMirror
from dual_policy_plugin.run_state import (
    STATE_NAME,
    Counters,
    SavedState,
    encode_state,
    episode_tensors,
    keep_optimizer,
    learner_tensors,
    restore_episodes,
    restore_learner,
    share_learner,
)
from dual_policy_plugin.seating import Seating, later_seed
from dual_policy_plugin.snapshots import start_pool

_POOL = "pool"  # who pins the checkpoints of snapshots
log = logging.getLogger(__name__)
MAX_STARTS = 10
"""How often a launcher may begin a run after one and the same state."""
MIRROR_S = 60.0
"""How long a run that is refused waits for its mirror."""


def open_run(config: Config, resolved_yaml: str, stack: ExitStack) -> RunDirectory:
    """The run's directory, brought up to its mirror if it has one; both held until `stack` is closed.

    Args:
        config: the run.
        resolved_yaml: as for `train`.
        stack: closes what was opened.
    """
    text = resolved_yaml or json.dumps(asdict(config), indent=2, default=str) + "\n"  # JSON is YAML
    path, trainer, mirror = config.train_dir / config.run, config.trainer, None
    if trainer.sync_uri is not None:
        mirror = stack.enter_context(RunMirror.open(trainer.sync_uri, config.run, path, grace_s=trainer.grace_s))
    run = RunDirectory.open(path, config_yaml=text, keep_checkpoints=trainer.keep_checkpoints, mirror=mirror)
    return stack.enter_context(run)


def resume(
    config: Config, run: RunDirectory | None, parts: Parts, counters: Counters, saved: SavedState | None, ranks: Ranks
) -> Seating:
    """Puts the run where it was stopped; a new one saves epoch 0, so that its beginning can be played against too."""
    initial, where = config.trainer.initial_policy, "" if run is None else str(run.path / "state" / STATE_NAME)
    if run is not None and saved is None:
        if initial and initial.keep_optimizer and parts.players.initial:
            keep_optimizer(parts.players.initial, parts.ppo)
        save_checkpoint(config.run, run, parts, counters, {}, None)
    if parts.roster is not None and parts.seatings.pool is not None:
        start_pool(parts.roster, parts.seatings.pool, saved.roster if saved is not None else None, run, ranks)
        if run is not None and saved is not None:
            run.pin(_POOL, parts.roster.kept)
        held_out = [entry for entry in parts.players.lock if entry.role == "held_out"]
        check_held_out(held_out, {one.sha256: one.name for one in parts.roster.snapshots()})
    seating = parts.seatings(counters.num_learner or parts.assignment.num_learner)
    if share_text("new" if saved is None else "", ranks, _device(parts)):
        save_state(run, parts, seating, counters, ranks)
    if run is not None and saved is not None:
        restore_learner(saved, where, seating.mixed, parts.ppo)
        run.truncate_metrics(counters.iteration)
        if run.mirror is not None:
            run.mirror.advance()  # what an earlier process could not send
    share_learner(seating.mixed, parts.ppo, ranks)
    num_saved = restore_episodes(saved, where, parts.env, seating.mixed, seating.metrics, ranks)
    if counters.iteration and num_saved != ranks.world_size:
        # not the run's first episodes again: a run that is often stopped would see no others
        parts.env.reset(later_seed(config, counters), stagger=True)
        if num_saved and ranks.is_first:
            num = ranks.world_size
            who = "1 rank goes" if num == 1 else f"{num} ranks go"
            log.info("%s on where %d stopped: all envs begin new episodes", who, num_saved)
    return seating


def last_figures(run: RunDirectory, name: str = "metrics.jsonl") -> dict[str, float]:
    """The newest line of metrics.jsonl or timing.jsonl; empty in a new run."""
    for _, line in lines_backwards(run.path / name):
        return {key: value for key, value in json.loads(line).items() if key != "iteration"}
    return {}


def check_progress(run: RunDirectory, iteration: int, starts: int, totals: dict[str, float]) -> None:
    """Ends a run that a launcher begins again and again, and that never comes further.

    Every start leaves a line in timing.jsonl, so that one which ends before its first iteration counts too.

    Args:
        run: its directory.
        iteration: after which it is begun.
        starts: how often it has been.
        totals: of the clock.

    Raises:
        RunError: too often; the next start counts from one again.
    """
    if not is_watched():
        return
    is_stuck = starts > MAX_STARTS
    run.append_timing({"iteration": iteration, **totals, "timing/starts": 0 if is_stuck else starts})
    if not is_stuck:
        return
    if run.mirror is not None:
        run.mirror.advance()
        run.mirror.settle(MIRROR_S)
    raise RunError(
        f"{run.path} has been begun {starts - 1} times after iteration {iteration} and saved no later state; the logs "
        "of those starts say why; mend that (or lower trainer.state_interval_s) and launch it again"
    )


def save_checkpoint(
    name: str,
    run: RunDirectory,
    parts: Parts,
    counters: Counters,
    figures: dict[str, float],
    score: float | None,
) -> str:
    """Saves the checkpoint and gives its name; the state that continues from it is to follow.

    Killed between the two, the run continues from the older state and makes this checkpoint again.
    """
    metadata: dict[str, Any] = {
        "run": name,
        "epoch": counters.iteration,
        "step": counters.agent_step,
        "metrics": figures,
        "npcs": recorded_npcs(parts.players.lock),
    }
    if parts.roster is not None and parts.roster.self_play is not None:
        metadata["snapshots"] = parts.roster.opponents()
    return run.save_checkpoint(counters.iteration, parts.learner.encode(metadata), score=score).name


def save_state(
    run: RunDirectory | None,
    parts: Parts,
    seating: Seating,
    counters: Counters,
    ranks: Ranks,
    *,
    is_between: bool = False,
) -> None:
    """Saves what a continued run needs; all ranks must call it together, and rank 0 writes the file.

    With `is_between` there is no checkpoint of this iteration, and the run is to end as if nothing had been saved here:
    the snapshots that were kept at the last checkpoint stay so. That is enough, since one is taken with a checkpoint
    only.
    """
    roster = parts.roster
    if roster is not None and not is_between:
        roster.keep()
    of_rank = episode_tensors(parts.env, seating.mixed, seating.metrics)
    episodes = gather_tensors(of_rank, ranks, _device(parts))
    if run is None:
        return
    learner = learner_tensors(seating.mixed, parts.ppo)
    state = encode_state(counters, learner, episodes, None if roster is None else roster.as_dict())
    run.sync_lines()
    run.save_state(STATE_NAME, state)
    if roster is not None:
        run.pin(_POOL, roster.kept)
    if run.mirror is not None:
        run.mirror.advance()
    parts.players.hold.refresh()


def settle(run: RunDirectory | None, left_s: float) -> None:
    """Waits, at most so many seconds, until the state that a stop saved is wherever it is to go."""
    if run is not None and run.mirror is not None:
        run.mirror.settle(left_s)


def run_result(
    config: Config,
    run: RunDirectory,
    parts: Parts,
    counters: Counters,
    figures: dict[str, float],
    evals: list[MatchResult],
    elapsed_s: float,
) -> dict[str, Any]:
    """What the run came to; `objective` is what a sweeper maximizes: the mean win rate, else the learner's return.

    Policies that are held out have no say in it: a choice by them would be training on them.
    """
    rates = [result.win_rate for result in evals if result.opponent not in parts.held_out]
    newest = run.newest_checkpoint()
    objective = sum(rates) / len(rates) if rates else _newest_return(run)
    return {
        "run": config.run,
        "objective": objective,
        "agent_step": counters.agent_step,
        "env_agent_step": counters.env_agent_step,
        "iterations": counters.iteration,
        "elapsed_s": round(elapsed_s, 3),
        "checkpoint": str(newest[1].relative_to(run.path)) if newest else None,
        "npcs": [{"name": npc.name, "uri": npc.uri, "sha256": npc.sha256} for npc in parts.players.npcs],
        "evals": [result.as_dict() for result in evals],
        "metrics": figures,
    }


def _device(parts: Parts) -> torch.device:
    return parts.ppo.parameters.flat.device


def _newest_return(run: RunDirectory) -> float | None:
    """The learner's mean return in the newest iteration in which an episode ended; None if none ever did."""
    for _, line in lines_backwards(run.path / "metrics.jsonl"):
        figures = json.loads(line)
        if "dual_policy/policy_a_reward" in figures:
            return float(figures["dual_policy/policy_a_reward"])
    return None
