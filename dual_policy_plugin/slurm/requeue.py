"""A job of Slurm's that lost a rank, a storage or a machine asks to be begun again; used by sweeps and launches."""

from __future__ import annotations

import logging
import os
import subprocess

MAX_STARTS = 20
"""How often a job is queued again after exit code 75, before somebody should look at it."""
_log = logging.getLogger(__name__)


def requeue_job() -> bool:
    """Queues this job again, by whichever of its processes is first; False where this is no job, or began too often."""
    job_id, starts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if job_id is None:
        return False
    if starts >= MAX_STARTS:
        _log.error("the job was begun %d times and ends here; the same command goes on", starts + 1)
        return False
    subprocess.run(["scontrol", "requeue", job_id], timeout=60, check=False, capture_output=True)
    _log.warning("job %s is queued again", job_id)
    return True
