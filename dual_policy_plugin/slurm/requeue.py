"""A job of Slurm's that lost a rank, a storage or a machine asks to be begun again; used by sweeps and launches."""

from __future__ import annotations

import logging
import os
import subprocess
import time

MAX_STARTS = 20
"""A job that was begun so often and had soon lost something again is not queued again: somebody should look at it.

Slurm counts every start, also those after a timeout or a preemption, of which a long run has many.
"""
SOON_S = 600.0
_UNTERMINATED = ("sh", "-c", 'trap "" TERM; exec "$@"', "sh")
"""Before a command: a step that lost a task is being ended, and the SIGTERM for all of its processes comes just now."""
_log = logging.getLogger(__name__)


def requeue_job() -> bool:
    """Queues this job again, by whichever of its processes is first; False where this is no job, or Slurm does not.

    A job that was begun too often is left as it is, too.
    """
    job_id, starts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if job_id is None:
        return False
    begun = os.environ.get("SLURM_JOB_START_TIME", "")  # seconds since 1970
    if starts >= MAX_STARTS and (not begun.isdecimal() or time.time() - int(begun) < SOON_S):
        _log.error("the job was begun %d times and ends here; the same command goes on", starts + 1)
        return False
    try:
        done = subprocess.run(
            [*_UNTERMINATED, "scontrol", "requeue", job_id], timeout=60, capture_output=True, text=True
        )
        refusal = (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        refusal = str(error)
    if refusal and "pending" not in refusal:  # another process of the job was first
        _log.error("job %s is not queued again, the same command goes on; scontrol: %s", job_id, refusal)
        return False
    _log.warning("job %s is queued again", job_id)
    return True
