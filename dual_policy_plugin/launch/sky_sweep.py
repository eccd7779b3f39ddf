"""A sweep of `hydra/launcher=skypilot`, from its jobs' overrides to Hydra's JobReturns.

Overrides -> composed -> checked, pinned, made into tasks (`sky_prepare`) -> launched and followed (`sky_jobs`) ->
result.json fetched -> returns. Nothing is launched before all jobs of the batch have been checked.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from dual_policy_plugin import files
from dual_policy_plugin.errors import ConfigError, DualPolicyError, LaunchError
from dual_policy_plugin.hydra_app.interpolation import config_values
from dual_policy_plugin.launch import sky_sdk
from dual_policy_plugin.launch.sky_jobs import Outcome, SkyJob, run_jobs
from dual_policy_plugin.launch.sky_prepare import RESULT_NAME, SweepJob, job_config, prepare_jobs, result_digest
from dual_policy_plugin.launch.sky_record import read_record
from dual_policy_plugin.launch.sky_settings import KEY, load_settings
from dual_policy_plugin.run.lock import lock_run, unlock_run
from dual_policy_plugin.run.mirror import read_mirrored, read_result
from dual_policy_plugin.slurm.errors import remove_sweep

_RETURNED = ("config.yaml", "npc.lock.json", "metrics.jsonl", "timing.jsonl")
"""Files of a run directory that come back with its result and the checkpoint that this names, where they are there."""


def launch_sweep(
    config: DictConfig, context: HydraContext, overrides: Sequence[Sequence[str]], first: int
) -> list[JobReturn]:
    """Runs a batch of jobs on SkyPilot and gives their returns, in their order.

    Args:
        config: of the sweep.
        context: Hydra's.
        overrides: of each job.
        first: the number of the first.

    Raises:
        DualPolicyError: something is wrong that shows before the first launch, or nothing could be launched.
    """
    setup_globals()
    folder = Path(str(config.hydra.sweep.dir))
    try:
        node: Any = OmegaConf.to_container(config.hydra.launcher, resolve=True)
        settings = load_settings(node)
        _refuse_shown(config_values(config.hydra.launcher))
        sky_sdk.load_sky()
        jobs = {first + i: _compose(config, context, words, first + i) for i, words in enumerate(overrides)}
        prepared = prepare_jobs(list(jobs.values()), settings)
    except DualPolicyError:
        remove_sweep(folder)
        raise
    with _locked(folder):
        record = read_record(folder, settings.cluster)
        outcomes = run_jobs(prepared, record, settings, collect=lambda one, before: _fetch(one, jobs[one.num], before))
    ids = {num: entry.job for num, entry in record.entries.items()}
    return [_job_return(job, context, outcomes[num], ids.get(num)) for num, job in jobs.items()]


def _refuse_shown(node: Mapping[str, Any]) -> None:
    """Raises a ConfigError for a variable of this shell among `envs`, which SkyPilot shows where it hides `secrets`."""
    for name, value in (node.get("envs") or {}).items():
        if "${oc.env:" in str(value):
            raise ConfigError(
                f"{KEY}.envs.{name}={value} would be shown by SkyPilot; name the variable in {KEY}.secrets=[...], "
                "which hands it on hidden"
            )


def _compose(config: DictConfig, context: HydraContext, overrides: Sequence[str], num: int) -> SweepJob:
    composed = context.config_loader.load_sweep_config(config, list(overrides))
    with open_dict(composed):
        composed.hydra.job.id = f"job_id_for_{num}"
        composed.hydra.job.num = num
    with job_config(composed):
        folder = Path(str(composed.hydra.sweep.dir)) / str(composed.hydra.sweep.subdir)
    return SweepJob(num=num, overrides=tuple(overrides), config=composed, folder=folder)


def _fetch(one: SkyJob, job: SweepJob, before: str | None) -> dict[str, Any] | None:
    """Brings what a run left in the storage into the job's folder here, its result last; gives the result.

    None where there is no result, or the one whose digest is `before`.

    Raises:
        RunError: the result is no JSON object, or something cannot be written here.
        StorageError: the storage cannot be reached.
    """
    if before is not None and result_digest(one.sync_uri, one.run) == before:
        return None
    result = read_result(one.sync_uri, one.run)
    if result is None:
        return None
    names = list(_RETURNED) if job.is_ours else []
    checkpoint = str(result.get("checkpoint"))
    if job.is_ours and re.fullmatch(r"checkpoints/[\w-][\w.-]*", checkpoint):  # nothing outside of the job's folder
        names.append(checkpoint)
    for name in names:
        content = read_mirrored(one.sync_uri, one.run, name)
        if content is not None:
            _write(job.folder / name, content)
    _write(job.folder / RESULT_NAME, (files.encode_json(result, indent=2) + "\n").encode())
    return result


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.file_error(error, path.parent, "created") from error
    files.publish(path, data)


def _job_return(job: SweepJob, context: HydraContext, outcome: Outcome, job_id: int | None) -> JobReturn:
    """What Hydra's own launchers give, made by the same function: only that the job has run elsewhere by now."""
    OmegaConf.set_readonly(job.config.hydra, False)
    if job_id is not None:
        with open_dict(job.config):
            job.config.hydra.job.id = str(job_id)
    return run_job(
        task_function=lambda _: _objective(job, outcome),
        config=job.config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
        hydra_context=context,
    )


def _objective(job: SweepJob, outcome: Outcome) -> Any:
    """What a sweeper takes for the job's value."""
    if isinstance(outcome, DualPolicyError):
        raise outcome
    if job.is_ours:
        if outcome is None:
            raise LaunchError(f"job {job.num} succeeded and left no {RESULT_NAME} in its storage; see its log")
        objective = outcome.get("objective")
        return math.nan if objective is None else float(objective)
    return None if outcome is None else outcome.get("objective")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """No other process launches jobs of this sweep meanwhile."""
    own = folder / ".skypilot"
    try:
        own.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.file_error(error, own, "created") from error
    lock = lock_run(own, time.time())
    try:
        yield
    finally:
        unlock_run(lock)
