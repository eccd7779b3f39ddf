"""The jobs of a sweep in SkyPilot's queue: launched once each, at most so many at a time, followed to their end.

Takes jobs with ready tasks from `sky_sweep`; gives for each what its result.json says, or the error that it ended with.
The record (`sky_record`) is published before and after every launch, and a job's name follows from what it does: a
sweep that was killed finds its jobs by the record or, killed between a launch and the record of it, by their names in
the queue.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dual_policy_plugin.errors import DualPolicyError, LaunchError, RunError
from dual_policy_plugin.launch import sky_sdk
from dual_policy_plugin.launch.sky_record import GONE, Entry, Record, digest_words, job_name
from dual_policy_plugin.launch.sky_settings import SkyLauncherConfig
from dual_policy_plugin.waiting import waiting

UNREACHABLE_S = 1800.0
"""How long the queue may stay out of reach before a sweep gives up; the jobs go on meanwhile."""
_END = sky_sdk.ENDED | {GONE}
_NUM_SHOWN = 8
log = logging.getLogger(__name__)

Outcome = dict[str, Any] | DualPolicyError | None
"""What a job came to: its result, its error, or None where it succeeded and left no result."""
Collect = Callable[["SkyJob", str | None], dict[str, Any] | None]
"""Fetches a job's result; None where it left none, or the one with this digest, which stood there before."""


@dataclass(kw_only=True, slots=True, frozen=True)
class SkyJob:
    """A job of a sweep, ready to be launched."""

    num: int
    run: str
    """Name of its run folder."""
    sync_uri: str
    """The storage that the folder comes back through."""
    words: tuple[str, ...]
    """What the user said of it; a job with other words is another job."""
    make_task: Callable[[], dict[str, Any]]
    """Gives SkyPilot's task, with the keys that it needs."""
    before: str | None = None
    """Digest of the result that stands in its storage already; None: there is none."""


def run_jobs(
    jobs: Sequence[SkyJob],
    record: Record,
    settings: SkyLauncherConfig,
    *,
    collect: Collect,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[int, Outcome]:
    """Brings all jobs to an end and gives what each came to, by its number.

    A job that fails does not end the others. Where a launch is refused, no further one is tried, and those that run
    are followed to their end.

    Args:
        jobs: in the order of their launch.
        record: of the sweep.
        settings: of the launcher.
        collect: fetches a job's result.
        sleep: between two looks at the queue, seconds.

    Raises:
        LaunchError: the first launch is refused, and nothing runs.
        KeyboardInterrupt: the user ended it; what becomes of the jobs was asked and said.
    """
    outcomes: dict[int, Outcome] = {}
    active, queued = _take_up(jobs, record)
    refused: DualPolicyError | None = None
    with _leaving([job.num for job in jobs], record):
        while active or (queued and refused is None):
            while queued and refused is None and len(active) < settings.max_parallel:
                try:
                    active[queued[0].num] = _launch(queued[0], record, settings)
                except LaunchError as error:
                    if not active and not outcomes:
                        raise
                    log.warning("job %d: %s", queued[0].num, error)
                    refused = error
                else:
                    queued.pop(0)
            ended: dict[int, str] = {}
            with waiting(f"waiting for {len(active)} jobs"):
                while not ended:
                    ended = _ended(active, record, sleep, settings.poll_s)
            for num, outcome in _take_results(ended, active, record, collect):
                outcomes[num] = outcome
                active.pop(num)
    return outcomes | {job.num: refused for job in queued}


def _take_up(jobs: Sequence[SkyJob], record: Record) -> tuple[dict[int, SkyJob], list[SkyJob]]:
    """The jobs that an earlier start of this sweep launched (those that succeeded, too), and those yet to be launched.

    Raises:
        RunError: a job of this number, and of other words, has not ended.
    """
    unsure = {entry.name for entry in record.entries.values() if entry.job is None}
    found = sky_sdk.find_jobs(unsure, cluster=record.cluster) if unsure else {}
    for lost in record.entries.values():
        if lost.job is None and lost.name in found:
            lost.job = found[lost.name]
        elif lost.job is None:
            lost.status = GONE  # it was never launched
    if unsure:
        record.publish()
    active: dict[int, SkyJob] = {}
    waiting: list[SkyJob] = []
    for job in jobs:
        entry: Entry | None = record.entries.get(job.num)
        is_same = entry is not None and entry.digest == digest_words(job.run, job.words)
        if entry is None or (entry.status is not None and not (is_same and entry.status == "SUCCEEDED")):
            waiting.append(job)
        elif is_same:
            log.info("job %d was launched before: %s, id %s", job.num, entry.name, entry.job)
            active[job.num] = job
        else:
            raise RunError(
                f"job {job.num} of this sweep was launched with other words and has not ended as far as "
                f"{record.path.name} knows; use another run=, or the old words, or cancel it with "
                f"`{_cancel_command([entry], record)}` and remove it from {record.path}"
            )
    return active, waiting


def _launch(job: SkyJob, record: Record, settings: SkyLauncherConfig) -> SkyJob:
    """Launches a job, the record published before and after."""
    before = record.entries.get(job.num)
    digest = digest_words(job.run, job.words)
    is_unborn = before is not None and before.status == GONE and before.job is None and before.digest == digest
    attempt = 1 if before is None else before.attempt + (not is_unborn)
    entry = Entry(name=job_name(job.run, digest, attempt), digest=digest, attempt=attempt, before=job.before)
    task = {**job.make_task(), "name": entry.name}
    record.entries[job.num] = entry
    record.publish()
    try:
        if record.cluster is None:
            entry.job = sky_sdk.start_job(task, entry.name)
        else:
            entry.job = sky_sdk.start_cluster(
                task, record.cluster, down=settings.down, idle_minutes=settings.idle_minutes
            )
    except LaunchError:
        record.publish()  # without an id: the next start looks for the name, in case the queue has it all the same
        raise
    record.publish()
    log.info("job %d is launched: %s, id %d", job.num, entry.name, entry.job)
    return job


def _ended(
    active: Mapping[int, SkyJob], record: Record, sleep: Callable[[float], None], poll_s: float
) -> dict[int, str]:
    """Statuses of the jobs that have ended; comes back when one has, at the latest after `poll_s`."""
    known = {num: record.entries[num] for num in active}
    ended = {num: entry.status for num, entry in known.items() if entry.status is not None}
    jobs = _unended(known.values())
    if ended or not jobs:
        return ended
    waited, statuses = 0.0, None
    while statuses is None:
        try:
            statuses = sky_sdk.job_statuses(jobs, cluster=record.cluster)
        except LaunchError as error:
            if waited >= UNREACHABLE_S:
                raise LaunchError(f"{error}; the jobs go on, and the same command finds them again") from error
            log.warning("%s; asking again in %g s", error, poll_s)
            sleep(poll_s)
            waited += poll_s
    now = {num: statuses.get(entry.name, GONE) for num, entry in known.items() if entry.name in jobs}
    ended = {num: status for num, status in now.items() if status in _END}
    if not ended:
        sleep(poll_s)
    return ended


def _unended(entries: Iterable[Entry]) -> dict[str, int]:
    """Name -> id of the jobs that have not ended, as far as the record knows."""
    return {entry.name: entry.job for entry in entries if entry.status is None and entry.job is not None}


def _take_results(
    ended: Mapping[int, str],
    active: Mapping[int, SkyJob],
    record: Record,
    collect: Collect,
) -> Iterator[tuple[int, Outcome]]:
    """What the jobs that ended came to; the record says so afterwards."""
    failed = [record.entries[num].job for num, status in ended.items() if status in sky_sdk.FAILED]
    reasons: dict[int, str] = {}
    if failed:
        reasons = sky_sdk.failure_reasons([job for job in failed if job is not None], cluster=record.cluster)
    for num, status in ended.items():
        entry = record.entries[num]
        outcome: Outcome = None
        if status in ("SUCCEEDED", GONE):
            outcome = collect(active[num], entry.before if status == GONE else None)
        if status == GONE and outcome is not None:
            status = "SUCCEEDED"  # before the queue forgot it
        if status != "SUCCEEDED":
            outcome = LaunchError(_failure(num, status, entry, record, reasons.get(entry.job or -1, "")))
            log.warning("%s", outcome)
        entry.status = status
        record.publish()
        if status == "SUCCEEDED":
            log.info("job %d is done: %s", num, entry.name)
        yield num, outcome


def _failure(num: int, status: str, entry: Entry, record: Record, reason: str) -> str:
    """The line of a job that failed."""
    if status == GONE:
        return (
            f"job {num} ({entry.name}, id {entry.job}) is not in the queue any more, and how it ended is not known; "
            "the same command launches it again"
        )
    logs = f"sky jobs logs {entry.job}" if record.cluster is None else f"sky logs {record.cluster} {entry.job}"
    why = f" ({reason})" if reason else ""
    return f"job {num} ({entry.name}, id {entry.job}) ended as {status}{why}; `{logs}` has its log"


@contextmanager
def _leaving(nums: Sequence[int], record: Record) -> Iterator[None]:
    """On Ctrl-C asks whether the jobs are to be left or cancelled; without a terminal they are left."""
    try:
        yield
    except KeyboardInterrupt:
        entries = [record.entries[num] for num in nums if num in record.entries]
        entries = [entry for entry in entries if entry.status is None]
        known = [entry for entry in entries if entry.job is not None]
        if known and _asks_to_cancel(known):
            jobs = _unended(known)
            there = sky_sdk.job_statuses(jobs, cluster=record.cluster)
            sky_sdk.cancel_jobs([jobs[name] for name in there], cluster=record.cluster)
            for entry in known:
                entry.status = "CANCELLED"
            record.publish()
            _say(f"cancelled {_names(known)}; the same command launches them again, and their runs go on")
        elif entries:
            _say(
                f"left running: {_names(entries)}; the same command finds them again, "
                f"`{_cancel_command(entries, record)}` cancels them"
            )
        raise


def _asks_to_cancel(entries: Sequence[Entry]) -> bool:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        sys.stderr.write(f"\n{_names(entries)}: leave running or cancel? [L/c] ")
        sys.stderr.flush()
        return sys.stdin.readline().strip().lower() in ("c", "cancel")
    except KeyboardInterrupt:
        return False


def _cancel_command(entries: Sequence[Entry], record: Record) -> str:
    ids = " ".join(str(entry.job) for entry in entries if entry.job is not None) or "ID"
    return f"sky jobs cancel {ids}" if record.cluster is None else f"sky cancel {record.cluster} {ids}"


def _names(entries: Sequence[Entry]) -> str:
    """The jobs for a message."""
    shown = [f"{entry.name} (id {entry.job})" for entry in entries[:_NUM_SHOWN]]
    return ", ".join(shown) + (f" and {len(entries) - _NUM_SHOWN} more" if len(entries) > _NUM_SHOWN else "")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
