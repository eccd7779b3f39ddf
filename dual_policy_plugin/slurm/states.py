"""The states of jobs, for submitit, which by itself asks `sacct` alone and waits for ever where Slurm keeps no books.

`watched_jobs` puts a watcher of ours in the place of submitit's while a sweep is launched and waited for.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

from dual_policy_plugin.errors import LaunchError
from dual_policy_plugin.slurm.errors import remove_submission
from dual_policy_plugin.waiting import waiting

FINAL = {
    "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "REVOKED",
    "ENDED",
}  # fmt: skip
"""No job leaves them by itself. ENDED is ours: Slurm has forgotten the job, and how it ended."""
IMPOSSIBLE = {
    "PartitionTimeLimit": "hydra.launcher.timeout_min is more than its partition allows",
    "PartitionNodeLimit": "hydra.launcher.nodes is more than its partition has or allows",
    "BadConstraints": "no node is as the job asks",
}
"""Reasons for which a job that was just sent would wait for ever."""
_MAX_DELAY_S = 15
_TIMEOUT_S = 30
_SOON_S = 60.0
_log = logging.getLogger(__name__)


class SlurmStates(SlurmInfoWatcher):
    """Asks `squeue`, which always knows a job that waits or runs, and `sacct` for those that it has forgotten."""

    def __init__(self) -> None:
        super().__init__(delay_s=_MAX_DELAY_S)
        self._reasons: dict[str, str] = {}
        self._shown: contextlib.ExitStack | None = None  # while there are jobs to wait for

    def update(self) -> None:
        """Notes the states of all jobs that have not ended, and logs those that changed."""
        jobs = self._registered - self._finished
        if not jobs:
            self.end_wait()
            return
        if self._shown is None:
            self._shown = contextlib.ExitStack()
            self._shown.enter_context(waiting(f"waiting for {len(jobs)} Slurm job{'s' * (len(jobs) > 1)}"))
        self._num_calls += 1
        listed = _ask_squeue(jobs)
        self._last_status_check = time.time()
        if listed is None:
            return
        for job in sorted(jobs - listed.keys() & self._info_dict.keys()):
            listed[job] = (_ask_sacct(job), "")
        for job, (state, reason) in sorted(listed.items()):
            if job in jobs:
                self._note(job, state, reason)
        if self._registered == self._finished:
            self.end_wait()

    def end_wait(self) -> None:
        """Shows no more that jobs are waited for."""
        if self._shown is not None:
            self._shown.close()
            self._shown = None

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """Whether the job has come to an end that it does not leave by itself."""
        return self.get_state(job_id, mode=mode) in FINAL

    def waiting_for(self) -> list[str]:
        """The jobs that had not ended when last asked."""
        return sorted(self._registered - self._finished)

    def _note(self, job: str, state: str, reason: str) -> None:
        before = self._info_dict.get(job, {}).get("State")
        self._info_dict[job] = {"JobID": job, "State": state}
        if state in FINAL:
            self._finished.add(job)
        if state == "PENDING" and reason in IMPOSSIBLE and time.time() - self._start_time < _SOON_S:
            _cancel(job.partition("_")[0])
            raise LaunchError(
                f"Slurm could never start job {job}, which is cancelled: {IMPOSSIBLE[reason]} ({reason}); "
                "`sinfo -o '%P %l %D %c %m %G'` shows what there is"
            )
        waits = f" ({reason})" if state == "PENDING" and reason not in ("None", "Priority", "Resources") else ""
        if state != before or (waits and self._reasons.get(job) != reason):
            _log.info("Slurm job %s: %s%s", job, state, waits)
        self._reasons[job] = reason


def _ask_squeue(jobs: Collection[str]) -> dict[str, tuple[str, str]] | None:
    """State and reason of each job that Slurm's controller knows; None where it does not answer."""
    numbers = ",".join(sorted({job.partition("_")[0] for job in jobs}))
    done = _run("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", f"--jobs={numbers}")
    if done is None or (done.returncode and "Invalid job id" not in done.stderr):
        return None
    rows = (line.split("|", 2) for line in done.stdout.splitlines())
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}


def _cancel(number: str) -> None:
    """Cancels a job that has never run, with its array, and removes what was written to send it."""
    script = _run("squeue", "--noheader", "--format=%o", f"--jobs={number}")
    _run("scancel", number)
    if script is not None and script.stdout.strip():
        remove_submission(Path(script.stdout.splitlines()[0].strip()), number)


def _ask_sacct(job: str) -> str:
    done = _run("sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={job}")
    words = done.stdout.split() if done is not None else []
    return words[0] if words else "ENDED"  # "CANCELLED by 1000"


def _run(*words: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None


@contextlib.contextmanager
def watched_jobs() -> Iterator[None]:
    """Has submitit's Slurm jobs watched by `SlurmStates`; says which go on where the user stops waiting for them."""
    before, states = SlurmJob.watcher, SlurmStates()
    SlurmJob.watcher = states
    try:
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(LaunchError):
            states.update()
        if jobs := states.waiting_for():
            numbers = " ".join(sorted({job.partition("_")[0] for job in jobs}))
            _log.warning("the Slurm jobs %s go on; `scancel %s` ends them", ", ".join(jobs), numbers)
        raise
    finally:
        states.end_wait()
        SlurmJob.watcher = before
