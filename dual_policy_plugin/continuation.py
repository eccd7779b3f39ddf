"""What a run leaves in its directory and takes up again: checkpoints, the state beside them, the result.

Takes the live objects of a run; `train.py` calls it before, in and after its loop.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from dual_policy_plugin.config import Config
from dual_policy_plugin.distributed import Ranks
from dual_policy_plugin.evaluation.matches import MatchResult
from dual_policy_plugin.files import read_lines
from dual_policy_plugin.parts import Parts
from dual_policy_plugin.players import check_held_out
from dual_policy_plugin.policies.npcs import recorded_npcs
from dual_policy_plugin.run_directory import RunDirectory
from dual_policy_plugin.run_state import (
    STATE_NAME,
    Counters,
    SavedState,
    encode_state,
    keep_optimizer,
    restore_state,
)
from dual_policy_plugin.seating import Seating
from dual_policy_plugin.snapshots import keep_snapshots, start_pool


def open_run(config: Config, resolved_yaml: str) -> RunDirectory:
    """The run's directory, held until it is closed; `resolved_yaml` as for `train`."""
    text = resolved_yaml or json.dumps(asdict(config), indent=2, default=str) + "\n"  # JSON is YAML
    return RunDirectory.open(
        config.train_dir / config.run, config_yaml=text, keep_checkpoints=config.trainer.keep_checkpoints
    )


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
        if run is not None and run.checkpoint_path(counters.iteration).exists():  # else as `save_state` between two
            keep_snapshots(parts.roster, run)
        held_out = [entry for entry in parts.players.lock if entry.role == "held_out"]
        check_held_out(held_out, {one.sha256: one.name for one in parts.roster.snapshots()})
    seating = parts.seatings(counters.num_learner or parts.assignment.num_learner)
    if run is not None and saved is None:
        save_state(run, parts, seating, counters)
    elif run is not None and saved is not None:
        restore_state(saved, where, parts.env, seating.mixed, parts.ppo, seating.metrics)
        run.truncate_metrics(counters.iteration)
    return seating


def last_figures(run: RunDirectory, name: str = "metrics.jsonl") -> dict[str, float]:
    """The newest line of metrics.jsonl or timing.jsonl; empty in a new run."""
    lines = read_lines(run.path / name)
    return {key: value for key, value in json.loads(lines[-1]).items() if key != "iteration"} if lines else {}


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
    run: RunDirectory, parts: Parts, seating: Seating, counters: Counters, *, is_between: bool = False
) -> None:
    """Saves what a continued run needs.

    With `is_between` there is no checkpoint of this iteration, and the run is to end as if nothing had been saved here:
    what the last checkpoint pinned stays so. That is enough, since snapshots are taken with a checkpoint only.
    """
    roster = parts.roster
    state = encode_state(
        counters, parts.env, seating.mixed, parts.ppo, seating.metrics, None if roster is None else roster.as_dict()
    )
    run.sync_lines()
    run.save_state(STATE_NAME, state)
    if roster is not None and not is_between:
        keep_snapshots(roster, run)
    parts.players.hold.refresh()


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


def _newest_return(run: RunDirectory) -> float | None:
    """The learner's mean return in the newest iteration in which an episode ended; None if none ever did."""
    for line in reversed(read_lines(run.path / "metrics.jsonl")):
        figures = json.loads(line)
        if "dual_policy/policy_a_reward" in figures:
            return float(figures["dual_policy/policy_a_reward"])
    return None
