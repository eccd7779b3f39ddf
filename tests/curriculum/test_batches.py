"""How jobs reach a launcher, and what its errors become."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException

from dual_policy_plugin.curriculum.batches import launch_batch, split_batches
from dual_policy_plugin.curriculum.state import Job
from dual_policy_plugin.errors import ConfigError, DivergedError, RunError


def jobs(*numbers: int) -> list[Job]:
    return [Job(num=number, stage=1, attempt=1, overrides=[f"seed={number}"]) for number in numbers]


@pytest.mark.parametrize(
    ("numbers", "size", "batches"),
    [
        ((), None, []),
        ((4, 5, 6), None, [[4, 5, 6]]),
        ((4, 5, 6, 7, 8), 2, [[4, 5], [6, 7], [8]]),
        ((4, 6, 7, 9), None, [[4], [6, 7], [9]]),  # 5 and 8 have finished: a launcher numbers without gaps
        ((4, 6, 7, 8), 2, [[4], [6, 7], [8]]),
    ],
)
def test_a_batch_has_consecutive_numbers(numbers: tuple[int, ...], size: int | None, batches: list[list[int]]) -> None:
    assert [[job.num for job in batch] for batch in split_batches(jobs(*numbers), size)] == batches


def launch(outcome: Any) -> tuple[Any, list[Any]]:
    """(what `launch_batch` gives, what the launcher was called with) where the launcher raises or gives `outcome`."""
    calls: list[Any] = []

    def launcher(batch: Any, first: int) -> Any:
        calls.append((batch, first))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    request: Any = SimpleNamespace(launch=launcher, launcher="submitit_slurm", folder=Path("train_dir/s"))
    return launch_batch(request, jobs(4, 5)), calls


def returned(value: Any) -> JobReturn:
    is_error = isinstance(value, Exception)
    job = JobReturn(status=JobStatus.FAILED if is_error else JobStatus.COMPLETED)
    job.return_value = value
    return job


def test_the_first_error_of_a_job_is_told() -> None:
    first, second = DivergedError("first"), ConfigError("second")
    assert launch([returned(1.0), returned(2.0)]) == (None, [([["seed=4"], ["seed=5"]], 4)])
    assert launch([returned(1.0), returned(second)])[0] is second
    assert launch([returned(first), returned(second)])[0] is first


def test_a_launcher_that_loses_jobs_ends_the_sweep_with_one_line() -> None:
    with pytest.raises(RunError) as caught:
        launch(TimeoutError("job 17 was cancelled\nmuch more"))
    assert str(caught.value) == (
        "the launcher submitit_slurm lost jobs of train_dir/s: job 17 was cancelled; "
        "the same command continues with those that have no result"
    )


@pytest.mark.parametrize("error", [ConfigError("a mistake"), HydraException("a mistake")])
def test_a_mistake_of_the_user_is_told_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error), match="a mistake"):
        launch(error)
