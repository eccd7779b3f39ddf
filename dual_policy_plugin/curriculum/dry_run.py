"""What a curriculum sweep would do, as text: stages, digests, jobs, steps, and their time at the speed measured here.

Takes what the sweeper knows before stage 1. Starts no job; a probe writes into a temporary folder.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dual_policy_plugin.config import Config, PolicySource, WandbConfig
from dual_policy_plugin.curriculum import ladder
from dual_policy_plugin.curriculum.config import CurriculumConfig
from dual_policy_plugin.curriculum.request import SweepRequest, check_request, load_jobs
from dual_policy_plugin.npc.resolver import PinnedPolicy
from dual_policy_plugin.report.figures import format_duration, format_rate
from dual_policy_plugin.report.tables import format_table, printable

Train = Callable[[Config], dict[str, Any]]

_PROBE_S = 1.0  # of iterations, at least; a speed measured over less says little
_PROBE_ITERATIONS = (4, 16, 64, 256)  # as many as it takes
_PROBE_EPISODES = 64
_COLUMNS = ("stage", "NPC", "sha256", "jobs", "steps", "job time", "gate", "URI")


@dataclass(kw_only=True, slots=True, frozen=True)
class Speed:
    """What a run takes on this machine."""

    startup_s: float
    """From the start of a job to its first step."""
    step_s: float
    """Of one learner step."""
    episode_s: float
    """Of one episode of evaluation."""
    measured_s: float
    """How long the probe took."""


def measure_speed(
    config: Config, npc_uri: str, train: Train, *, clock: Callable[[], float] = time.perf_counter
) -> Speed:
    """How fast a job of stage 1 trains and is evaluated here: a probe of a few iterations in a temporary folder.

    The probe's run is started again and again, as a continued run is: for one iteration (what is compiled or read for
    the first time), for nothing, for more and more iterations, and for some episodes. Differences leave the start out.

    Args:
        config: of the job.
        npc_uri: whom it plays against, in place of what the config says.
        train: dual_policy_plugin.train.train.
        clock: seconds; only differences count.

    Raises:
        DualPolicyError: stage 1 could not start either.
    """
    began = clock()
    with tempfile.TemporaryDirectory(prefix="dual_policy_probe_") as folder, _silenced():

        def timed(steps: int, episodes: int) -> tuple[float, int]:
            start = clock()
            result = train(_probe(config, npc_uri, Path(folder), steps, episodes))
            return clock() - start, int(result["agent_step"])

        _, per_iteration = timed(1, 0)
        startup_s, steps = timed(1, 0)
        for num_iterations in _PROBE_ITERATIONS:
            steps += per_iteration * num_iterations
            train_s = max(timed(steps, 0)[0] - startup_s, 1e-6)
            if train_s >= _PROBE_S:
                break
        evaluate_s = max(timed(steps, _PROBE_EPISODES)[0] - startup_s, 1e-6)
    return Speed(
        startup_s=startup_s,
        step_s=train_s / (per_iteration * num_iterations),
        episode_s=evaluate_s / (_PROBE_EPISODES * _num_opponents(config)),
        measured_s=clock() - began,
    )


def describe_sweep(request: SweepRequest, train: Train) -> str:
    """What a sweep would do, for a dry run; no job is started and nothing is written.

    Args:
        request: the sweep.
        train: dual_policy_plugin.train.train, to measure how fast it is.

    Raises:
        DualPolicyError: anything that would stop the sweep before stage 1.
    """
    configs = check_request(request)
    rungs = ladder.pin_rungs(request.settings, configs)
    common = set(request.grid[0]).intersection(*request.grid)
    names = [" ".join(word for word in overrides if word not in common) for overrides in request.grid]
    return format_plan(
        rungs,
        list(zip(names, load_jobs(request), strict=True)),
        request.settings,
        measure_speed(configs[0], rungs[0].uri, train),
        folder=request.folder,
        launcher=request.launcher,
    )


def format_plan(
    rungs: Sequence[PinnedPolicy],
    jobs: Sequence[tuple[str, Config]],
    settings: CurriculumConfig,
    speed: Speed,
    *,
    folder: Path,
    launcher: str,
) -> str:
    """The stages as a table, and below it how the jobs run and the sums of time and cost.

    Args:
        rungs: the stages' NPCs; of `self` the first one only.
        jobs: the grid of every stage: what tells a job from the others, and its config.
        settings: of the sweep.
        speed: of the first job, on this machine.
        folder: the sweep's.
        launcher: name of the launcher that gets the jobs.
    """
    num_stages = settings.stages or len(rungs)
    job_s = [_job_s(config, speed) for _, config in jobs]
    gates_s = [settings.episodes * number * speed.episode_s for number in range(1, num_stages + 1)]
    lines = [f"{folder}: {_count(num_stages, 'stage')}; nothing was started, nothing written", ""]
    lines += [format_table(_COLUMNS, _stage_rows(rungs, jobs, sum(job_s), gates_s)), ""]
    lines += _job_lines([name for name, _ in jobs], job_s, settings, launcher)
    rating_s = 0.0
    if settings.order == "weakest_first":
        rating_s = num_stages * (num_stages - 1) / 2 * settings.rating_episodes * speed.episode_s
        lines.append(f"order: weakest first, measured before stage 1 in {format_duration(rating_s)}; here as given")
    once_s = num_stages * sum(job_s) + sum(gates_s)
    least_s, most_s = rating_s + once_s, rating_s + settings.max_attempts * once_s
    lines += [
        f"speed: measured here in {speed.measured_s:.0f} s: {format_rate(1 / speed.step_s)} of the learner, "
        f"{1 / speed.episode_s:.0f} episodes/s of evaluation, {speed.startup_s:.1f} s to start a job",
        f"time: {format_duration(least_s)} of jobs and gates if the first attempt at each stage passes, "
        f"{format_duration(most_s)} if all take {_count(settings.max_attempts, 'attempt')}",
        f"cost: {_cost(least_s, most_s, jobs[0][1].hourly_cost)}",
    ]
    return "\n".join(lines)


def _stage_rows(
    rungs: Sequence[PinnedPolicy], jobs: Sequence[tuple[str, Config]], jobs_s: float, gates_s: Sequence[float]
) -> list[list[str]]:
    """The cells of each stage; a stage of `self` has no NPC before it is reached."""
    stages = [(rung.name, rung.sha256[:12], rung.uri) for rung in rungs]
    stages += [("best so far", "made by then", "-")] * (len(gates_s) - len(rungs))
    steps = sum(config.trainer.total_timesteps for _, config in jobs)
    times = format_duration(jobs_s)
    return [
        [str(number), name, digest, str(len(jobs)), f"{steps:,}", times, format_duration(gate_s), uri]
        for number, ((name, digest, uri), gate_s) in enumerate(zip(stages, gates_s, strict=True), 1)
    ]


def _probe(config: Config, npc_uri: str, folder: Path, steps: int, episodes: int) -> Config:
    """The config of a short run in `folder` that publishes nothing and saves as little as a run can."""
    dual = config.trainer.dual_policy
    source = PolicySource(uri=npc_uri) if dual.npc is None else replace(dual.npc, uri=npc_uri)
    trainer = replace(
        config.trainer,
        total_timesteps=steps,
        checkpoint_interval=10**9,
        evaluate_interval=None,
        publish_uri=None,
        dual_policy=replace(dual, enabled=True, npc=source, lock=None),
    )
    evals = replace(config.evals, episodes=episodes)
    return replace(config, run="probe", train_dir=folder, trainer=trainer, evals=evals, wandb=WandbConfig())


@contextlib.contextmanager
def _silenced() -> Any:
    """No progress and no log lines below a warning: they would tell of a run that is none."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _job_s(config: Config, speed: Speed) -> float:
    episodes = config.evals.episodes * _num_opponents(config)
    return speed.startup_s + config.trainer.total_timesteps * speed.step_s + episodes * speed.episode_s


def _num_opponents(config: Config) -> int:
    """Whom a run is evaluated against: the named ones, else the stage's NPC, and those held out."""
    return max(1, len(config.evals.opponents)) + len(config.evals.held_out)


def _job_lines(names: Sequence[str], job_s: Sequence[float], settings: CurriculumConfig, launcher: str) -> list[str]:
    """How many jobs a stage has and how many of them may run at once, then each of them where there are several."""
    if len(names) == 1:
        return [f"jobs: one for each attempt at a stage, through the launcher {launcher}"]
    at_once = 1 if launcher == "basic" else min(len(names), settings.max_batch_size or len(names))
    how = "one after the other" if at_once == 1 else f"up to {at_once} at once"
    lines = [f"jobs: {len(names)} for each attempt at a stage, {how} through the launcher {launcher}"]
    return lines + [f"  {printable(name)}: {format_duration(one)}" for name, one in zip(names, job_s, strict=True)]


def _cost(least_s: float, most_s: float, hourly_cost: float | None) -> str:
    if hourly_cost is None:
        return "unknown: set METTA_HOURLY_COST to dollars per hour"
    low, high = (seconds / 3600 * hourly_cost for seconds in (least_s, most_s))
    return f"${low:.2f} to ${high:.2f} at ${hourly_cost:g} an hour"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
