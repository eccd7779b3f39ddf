"""A curriculum sweep from top to bottom.

Request -> checked -> rungs pinned (and rated) -> [jobs of an attempt -> best of the stage -> gate -> decision]* -> the
final policy. The state is published after every change, and nothing that it holds is done again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace

from dual_policy_plugin.config import Config
from dual_policy_plugin.curriculum import gates, ladder
from dual_policy_plugin.curriculum.batches import launch_batch, split_batches, take_result
from dual_policy_plugin.curriculum.config import KEY
from dual_policy_plugin.curriculum.decisions import AFTER_GATE, best_of_visit, decide, next_place, reopen, starts_from
from dual_policy_plugin.curriculum.request import (
    SweepRequest,
    check_request,
    check_same,
    check_unused,
    job_overrides,
    request_record,
)
from dual_policy_plugin.curriculum.state import (
    ChosenPolicy,
    Gate,
    Job,
    SweepState,
    read_state,
)
from dual_policy_plugin.curriculum.sweep_files import SweepFiles
from dual_policy_plugin.devices import set_threads
from dual_policy_plugin.errors import CurriculumStopped, RunError
from dual_policy_plugin.files import file_error, read_json, remove_temporary_files
from dual_policy_plugin.hydra_app.loading import load_config
from dual_policy_plugin.npc.lock import LockEntry
from dual_policy_plugin.npc.resolver import PinnedPolicy, hold_pinned
from dual_policy_plugin.report.page.write import write_own_report
from dual_policy_plugin.run.lock import check_unlocked, lock_run, unlock_run

log = logging.getLogger(__name__)


def run_sweep(request: SweepRequest) -> SweepState:
    """Walks through the stages and gives the final state; the same request continues a sweep that was stopped.

    Raises:
        CurriculumStopped: a gate stayed shut, and on_fail says to end.
        DualPolicyError: anything that is wrong, before stage 1; or all jobs of an attempt failed.
    """
    configs = check_request(request)
    config, pinned = configs[0], None
    others: list[LockEntry] = []
    with ExitStack() as stack:
        files = stack.enter_context(SweepFiles.open(request, config))
        if read_state(request.folder) is None:
            check_unused(request.folder)
            pinned, others = ladder.pin_rungs(request.settings, configs), ladder.pin_others(configs)
        try:
            request.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise file_error(error, request.folder, "created") from error
        stack.callback(unlock_run, lock_run(request.folder, time.time()))
        remove_temporary_files(request.folder)
        state = _open_state(request, files, config, pinned, others)
        stack.enter_context(hold_pinned(ladder.locked_rungs(request.folder, state.rungs)))
        while state.status == "running":
            _run_attempt(request, files, state)
            _pass_gate(request, files, state, config.seed)
        files.finish(state)
    if config.report:
        log.info(write_own_report(request.folder, ladder=asdict(state)))
    _report_end(request, state)
    return state


def count_stages(request: SweepRequest, num_rungs: int) -> int:
    """How many stages there are; with `self` the rungs come one by one."""
    return request.settings.stages or num_rungs


def _open_state(
    request: SweepRequest,
    files: SweepFiles,
    config: Config,
    pinned: Sequence[PinnedPolicy] | None,
    others: Sequence[LockEntry],
) -> SweepState:
    """The state to go on from, a new one with all rungs, rated where the order wants it."""
    state = read_state(request.folder)
    if state is not None:
        check_same(request, state, str(request.folder))
        ladder.locked_rungs(request.folder, state.rungs)
        _take_over(request, files, state)
        log.info("%s continues: stage %d, attempt %d", request.folder, state.stage, state.attempt)
    elif pinned is None:
        raise RunError(f"{request.folder} lost its state while it was opened; start again")
    else:
        ladder.begin_lock(request.folder, pinned, others)
        state = SweepState(request=request_record(request), rungs=[ladder.as_rung(one) for one in pinned])
        files.write(state)
    is_rated = len(state.rungs) < 2 or all(rung.rating is not None for rung in state.rungs)
    if request.settings.order == "weakest_first" and not is_rated:
        log.info("rating %d NPCs: %d episodes a pair", len(state.rungs), request.settings.rating_episodes)
        set_threads(config)
        state.rungs = ladder.rate_rungs(
            state.rungs,
            ladder.locked_rungs(request.folder, state.rungs),
            config,
            episodes=request.settings.rating_episodes,
            seed=gates.rating_seed(config.seed),
            device=gates.gate_device(config),
        )
        files.write(state)
        log.info("weakest first: %s", ", ".join(f"{rung.name} {rung.rating:+.0f}" for rung in state.rungs))
    return state


def _take_over(request: SweepRequest, files: SweepFiles, state: SweepState) -> None:
    """Brings settings that may be others by now into the state; a sweep that they would not have stopped goes on.

    Raises:
        RunError: by these settings the sweep would not have come to where it is.
    """
    sweeper = {**state.request["sweeper"], **{name: request.node[name] for name in AFTER_GATE}}
    if sweeper == state.request["sweeper"]:
        return
    gate = reopen(state, request.settings)
    if gate is not None:
        _go_on(request, state, gate)
    state.request["sweeper"] = sweeper
    files.write(state)


def _run_attempt(request: SweepRequest, files: SweepFiles, state: SweepState) -> None:
    """Brings every job of the attempt to an end; jobs that have one are not launched.

    Raises:
        DualPolicyError: none of them finished.
    """
    jobs = _plan_jobs(request, files, state)
    _collect(request, files, state, jobs)
    if not any(job.status == "finished" for job in jobs):
        for job in jobs:
            job.status = "planned"  # all failed: what was wrong is mended by now, or they fail again
    trouble: Exception | None = None
    planned = [job for job in jobs if job.status == "planned"]
    if not request.is_patient:
        for job in planned:
            check_unlocked(request.folder / str(job.num))  # a launcher's jobs may outlive a sweeper that was killed
    for batch in split_batches(planned, request.settings.max_batch_size):
        error = launch_batch(request, batch)
        _collect(request, files, state, batch, error)
        trouble = trouble or error
    if not any(job.status == "finished" for job in jobs):
        raise trouble or RunError(f"no job of {request.folder} left a result, and none says why; see its logs")


def _plan_jobs(request: SweepRequest, files: SweepFiles, state: SweepState) -> list[Job]:
    """The jobs of the attempt, which the state knows before the first of them starts."""
    stage, attempt = state.stage, state.attempt
    planned = [job for job in state.of_stage(stage) if job.attempt == attempt]
    if planned:
        return planned
    if len(state.rungs) < stage:  # `self`: the NPC is the policy that the sweep has come to
        assert state.policy is not None, "a stage of `self` begins when another has ended with a policy"
        best = ladder.pin_made(request.folder, state.policy.path, state.policy.sha256)
        ladder.extend_lock(request.folder, best, "npc")
        state.rungs.append(replace(ladder.as_rung(best), name=f"stage_{stage - 1}", requested="self"))
    rung = state.rungs[stage - 1]
    start, initial = starts_from(state, request.settings), None
    if start is not None:
        path = start.path if isinstance(start, ChosenPolicy) else str(start.checkpoint)
        carried = ladder.pin_made(request.folder, path, str(start.sha256))
        ladder.extend_lock(request.folder, carried, "initial")
        initial = carried.uri
    jobs = [
        Job(
            num=len(state.jobs) + i,
            stage=stage,
            attempt=attempt,
            overrides=job_overrides(request, overrides, rung=rung, attempt=attempt, initial=initial),
        )
        for i, overrides in enumerate(request.grid)
    ]
    state.jobs += jobs
    files.write(state)
    log.info(
        "stage %d of %d, attempt %d, against %s: %d job%s from number %d on",
        stage, count_stages(request, len(state.rungs)), attempt, rung.name, len(jobs), "s" * (len(jobs) > 1),
        jobs[0].num,
    )  # fmt: skip
    return jobs


def _collect(
    request: SweepRequest,
    files: SweepFiles,
    state: SweepState,
    jobs: Sequence[Job],
    trouble: Exception | None = None,
) -> None:
    """Takes what the jobs left in their folders into the state; with `trouble` those without a result have failed."""
    changed = False
    for job in jobs:
        if job.status != "planned":
            continue
        result = read_json(request.folder / str(job.num) / "result.json")
        if result is None and trouble is None:
            continue
        if result is None:
            check_unlocked(request.folder / str(job.num))  # it failed since another process is at it
            job.status, changed = "failed", True
            continue
        changed = True
        take_result(request.folder, job, result)
        log.info("job %d finished: objective %s after %d learner steps", job.num, _shown(job), job.agent_step)
    if changed:
        files.write(state)


def _pass_gate(request: SweepRequest, files: SweepFiles, state: SweepState, seed: int) -> None:
    """Evaluates the stage's best policy and writes down what follows, in one publication."""
    settings, stage = request.settings, state.stage
    best = best_of_visit(state)
    assert best is not None, "an attempt ends with a finished job, or ends the sweep"
    rungs = ladder.locked_rungs(request.folder, state.rungs[:stage])
    policy = ladder.pin_made(request.folder, str(best.checkpoint), str(best.sha256))
    log.info("gate of stage %d: job %d against %s", stage, best.num, rungs[-1].name)
    config = load_config(request.compose(best.overrides))
    verdict, forgotten = gates.play_gate(policy, rungs, config, settings, stage=stage, attempt=state.attempt, seed=seed)
    decision, why = decide(verdict, forgotten, state, settings)
    state.gates.append(
        Gate(
            stage=stage,
            attempt=state.attempt,
            job=best.num,
            opponent=rungs[-1].name,
            rule=verdict.rule,
            promote_at=settings.promote_at,
            win_rate=verdict.win_rate,
            low=verdict.low,
            high=verdict.high,
            episodes=verdict.episodes,
            passed=bool(verdict.passed),
            forgotten=forgotten,
            decision=decision,
            why=why,
        )
    )
    _go_on(request, state, state.gates[-1])
    files.write(state)


def _go_on(request: SweepRequest, state: SweepState, gate: Gate) -> None:
    """Brings the state to where the newest gate's decision leads."""
    if gate.decision in ("promote", "advance"):
        best = state.jobs[gate.job]
        state.policy = ChosenPolicy(path=str(best.checkpoint), sha256=str(best.sha256), job=best.num, stage=gate.stage)
    place = next_place(gate.decision, state, count_stages(request, len(state.rungs)))
    state.stage, state.attempt, state.demotions = place.stage, place.attempt, place.demotions
    state.status = place.status
    log.info("stage %d: %s: %s", gate.stage, gate.decision, gate.why)


def _report_end(request: SweepRequest, state: SweepState) -> None:
    """The final policy in one line; where the sweep was stopped, the error that says why."""
    policy = f"policy {request.folder / state.policy.path}" if state.policy else "no policy passed stage 1"
    if state.status == "stopped":
        last = state.gates[-1]
        name = "max_demotions" if state.demotions else "max_attempts"  # the other would change a decision before it
        way = "" if state.demotions and last.stage == 1 else f"; a larger {KEY}.{name} goes on from here"
        raise CurriculumStopped(f"{request.folder} stopped at stage {last.stage}: {last.why}; {policy}{way}")
    log.info("%s is finished: %s", request.folder, policy)


def _shown(job: Job) -> str:
    return "none" if job.objective is None else f"{job.objective:.3f}"
