"""How an attempt's jobs reach a launcher, what its errors become, and what the jobs leave in their folders."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from dual_policy_plugin.curriculum.request import SweepRequest
from dual_policy_plugin.curriculum.state import Job
from dual_policy_plugin.errors import DualPolicyError, RunError
from dual_policy_plugin.npc.sources.local import file_digest
from dual_policy_plugin.slurm.errors import explain
from dual_policy_plugin.waiting import waiting

log = logging.getLogger(__name__)


def split_batches(jobs: Sequence[Job], max_batch_size: int | None) -> Iterator[list[Job]]:
    """Jobs with consecutive numbers, as a launcher numbers them, no more than `max_batch_size` at once."""
    batch: list[Job] = []
    for job in jobs:
        if batch and (job.num != batch[-1].num + 1 or len(batch) == max_batch_size):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def launch_batch(request: SweepRequest, batch: Sequence[Job]) -> Exception | None:
    """Runs jobs through the launcher; gives the first error of a job, which leaves the others' results as they are.

    Raises:
        RunError: the launcher did not bring all of them to an end.
    """
    numbers = f"job {batch[0].num}" if len(batch) == 1 else f"jobs {batch[0].num} to {batch[-1].num}"
    # the basic launcher runs them in this process, where each has a view of its own
    elsewhere = nullcontext() if request.launcher == "basic" else waiting(f"waiting for {numbers}")
    try:
        with elsewhere:
            returns = request.launch([job.overrides for job in batch], batch[0].num)
    except (DualPolicyError, HydraException, OmegaConfBaseException):
        raise  # of what the user wrote; the command line has a line for it
    except Exception as error:
        if line := explain(error):
            raise line from error
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RunError(
            f"the launcher {request.launcher} lost jobs of {request.folder}: {reason}; "
            "the same command continues with those that have no result"
        ) from error
    trouble: Exception | None = None
    for job, one in zip(batch, returns, strict=True):
        try:
            _ = one.return_value
        except Exception as error:
            log.warning("job %d failed: %s", job.num, error)
            trouble = trouble or error
    return trouble


def take_result(folder: Path, job: Job, result: Any) -> None:
    """Writes down what a job's result.json says, and the digest of the policy that it names.

    Raises:
        RunError: it is not as a run writes it, or the policy is gone.
    """
    try:
        job.checkpoint = f"{job.num}/{result['checkpoint']}"
        job.objective, job.agent_step = result["objective"], result["agent_step"]
        job.elapsed_s = result["elapsed_s"]
    except (KeyError, TypeError) as error:
        raise RunError(
            f"{folder / str(job.num)}/result.json is not as a run writes it ({error}); remove it, and the same command "
            "runs the job again"
        ) from error
    try:
        job.sha256 = file_digest(folder / job.checkpoint)
    except OSError as error:
        raise RunError(
            f"{folder / job.checkpoint}, which job {job.num} ended with, cannot be read: "
            f"{error.strerror or type(error).__name__}; bring it back, or use another run= name"
        ) from error
    job.status = "finished"
