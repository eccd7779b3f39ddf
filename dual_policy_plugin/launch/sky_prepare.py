"""A job of a sweep, from its composed config to a task that can be launched; launches nothing.

A run of `dual-policy train` is checked here and its policies pinned, as `dual-policy launch` does it, and goes to the
node as its overrides with `run=<run>/<num>`. A job of another Hydra app goes there as its overrides with
`hydra.run.dir` in the storage, behind whatever its template runs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from dual_policy_plugin.errors import ConfigError, DualPolicyError, LaunchError, RunError
from dual_policy_plugin.hydra_app.composition import refuse_masked_choices
from dual_policy_plugin.hydra_app.interpolation import hide_variables, keep_requested
from dual_policy_plugin.hydra_app.loading import load_config
from dual_policy_plugin.hydra_app.overrides import CONFIG_DIR, text_override
from dual_policy_plugin.launch import preflight, sky_sdk
from dual_policy_plugin.launch.checkout import Checkout, read_checkout
from dual_policy_plugin.launch.sky_jobs import SkyJob
from dual_policy_plugin.launch.sky_launch import (
    Cost,
    check_folder,
    estimate_cost,
    fill_secrets,
    plan_launch,
    with_price,
)
from dual_policy_plugin.launch.sky_settings import KEY, SkyLauncherConfig
from dual_policy_plugin.launch.sky_task import TaskOptions, build_task, read_template
from dual_policy_plugin.mirror.transfer import RESULT_NAME as RESULT_NAME
from dual_policy_plugin.run.mirror import read_mirrored

MOUNT = "/dual-policy-runs"
"""Where a node has the bucket that another app's jobs write to."""
_LOCAL_KEYS = ("run", "train_dir", "trainer.sync_uri", preflight.LOCK_KEY)
"""Overrides that are about this machine; a node gets its own."""
_FLAGS = {
    "--skip-git-check": f"{KEY}.skip_git_check=true",
    "--git-ref": f"{KEY}.git_ref",
    "--gpus": f"{KEY}.gpus",
    "--infra": f"{KEY}.infra",
    "--secret": f"{KEY}.secrets",
}
"""What messages of `dual-policy launch` name, and what it is for a sweep."""
_STORAGE = {"trainer.sync_uri": f"{KEY}.sync_uri"}
"""The same for a storage that the launcher was given."""


@dataclass(kw_only=True, slots=True, frozen=True)
class SweepJob:
    """A job of a batch as Hydra has it."""

    num: int
    overrides: tuple[str, ...]
    config: DictConfig
    """With its `hydra` node."""
    folder: Path
    """Where Hydra puts it here."""

    @property
    def is_ours(self) -> bool:
        """Whether it is a run of `dual-policy train`."""
        return all(name in self.config for name in ("trainer", "agent", "env", "run"))


def prepare_jobs(jobs: Sequence[SweepJob], settings: SkyLauncherConfig) -> list[SkyJob]:
    """The jobs as they will be launched.

    Raises:
        DualPolicyError: one of them cannot run: its config, a policy, a key, the code or the machines asked for.
    """
    with _renamed(_FLAGS):
        sky_sdk.check_infra(settings.infra)
        checkout = read_checkout(Path.cwd(), git_ref=settings.git_ref, skip_check=settings.skip_git_check)
    prepared: list[SkyJob] = []
    costs: list[Cost] = []  # the machines of all jobs are the same, and asking for their price takes a while
    for job in jobs:
        try:
            with job_config(job.config), _renamed(_FLAGS):
                one = (
                    _prepare_ours(job, settings, checkout, costs)
                    if job.is_ours
                    else _prepare_other(job, settings, checkout)
                )
        except DualPolicyError as error:
            hide_variables(error, job.config)
            raise type(error)(f"job {job.num}: {error}") from error
        prepared.append(one)
    return prepared


@contextmanager
def job_config(config: DictConfig) -> Iterator[None]:
    """Lets HydraConfig be the job's."""
    instance = HydraConfig.instance()
    before = instance.cfg
    instance.set_config(config)
    try:
        yield
    finally:
        instance.cfg = before


def _prepare_ours(job: SweepJob, settings: SkyLauncherConfig, checkout: Checkout, costs: list[Cost]) -> SkyJob:
    check_folder(checkout)
    refuse_masked_choices()
    config = load_config(keep_requested(_task_config(job.config)))
    run, sync_uri = f"{config.run}/{job.num}", _sync_uri(settings.sync_uri or config.trainer.sync_uri)
    with _renamed(_STORAGE if settings.sync_uri else {}):
        config = replace(config, run=run, trainer=replace(config.trainer, sync_uri=sync_uri))
        preflight.check_env(config)
        preflight.check_logins(config, ())
        entries = preflight.pin_config(config, begun=preflight.read_begun(config))
        preflight.check_logins(config, entries)
        before = result_digest(sync_uri, run)
    given = [word for word in job.overrides if word.partition("=")[0].lstrip("+") not in _LOCAL_KEYS]
    given += _search_path(job.config, checkout)
    words = (*given, text_override("run", run), text_override("trainer.sync_uri", sync_uri))
    flight = preflight.Preflight(config=config, words=words, entries=entries)
    launch = plan_launch(settings.template, flight, checkout, _options(settings, checkout), settings.secrets or ())
    envs = dict(launch.task.get("envs") or {}) | _envs(settings)
    launch = replace(launch, task={**launch.task, "envs": envs})
    if not costs:
        costs.append(estimate_cost([launch]))
    make_task = partial(fill_secrets, with_price(launch, costs[0], 1))
    sky_sdk.check_task(make_task())
    return SkyJob(num=job.num, run=run, sync_uri=sync_uri, words=tuple(given), make_task=make_task, before=before)


def _prepare_other(job: SweepJob, settings: SkyLauncherConfig, checkout: Checkout) -> SkyJob:
    if not settings.template.endswith((".yaml", ".yml")):
        raise ConfigError(
            f"{KEY}.template={settings.template} is a task of `dual-policy train`, and this app is another; name a "
            'YAML file whose `run` has a words=( ... ) block and starts your app with "${words[@]}"'
        )
    sync_uri = _sync_uri(settings.sync_uri)
    run = str(job.folder).lstrip("./")
    with _renamed(_STORAGE):
        before = result_digest(sync_uri, run)
    is_bucket = sync_uri.startswith("s3://")
    where = f"{MOUNT if is_bucket else sync_uri}/{run}"
    given = [*_app_flags(job.config), *job.overrides, *_search_path(job.config, checkout)]
    task = build_task(
        read_template(settings.template),
        name="job",
        run=run,
        words=[*given, text_override("hydra.run.dir", where)],
        options=_options(settings, checkout),
        envs=_envs(settings),
    )
    if is_bucket:
        mount = {"source": sync_uri.rstrip("/"), "mode": "MOUNT_CACHED"}
        task["file_mounts"] = task.get("file_mounts", {}) | {MOUNT: mount}
    known = {name: os.environ[name] for name in task.get("secrets") or {} if os.environ.get(name)}
    for name in settings.secrets or ():
        if not os.environ.get(name):
            raise LaunchError(f"{KEY}.secrets names {name}, which is not set here; set it, or leave it out")
        known[name] = os.environ[name]

    def with_secrets() -> dict[str, Any]:
        return {**task, "secrets": dict(task.get("secrets") or {}) | known}

    sky_sdk.check_task(with_secrets())
    return SkyJob(num=job.num, run=run, sync_uri=sync_uri, words=tuple(given), make_task=with_secrets, before=before)


def result_digest(sync_uri: str, run: str) -> str | None:
    """Names the content of the result.json that stands in the storage; None where there is none.

    Raises:
        RunError: the storage refuses, or cannot be reached.
    """
    data = read_mirrored(sync_uri, run, RESULT_NAME)
    return None if data is None else hashlib.sha256(data).hexdigest()


def _sync_uri(text: str | None) -> str:
    """The storage, a folder by its absolute path."""
    if text is None:
        raise ConfigError(
            f"{KEY}.sync_uri is not set, and no run would come back from its node; use s3://bucket/prefix/, or a "
            "folder that the nodes share"
        )
    return text if text.startswith("s3://") else str(Path(text.removeprefix("file://")).expanduser().absolute())


def _app_flags(config: DictConfig) -> list[str]:
    """Which config another app starts from; where it stands on the disk is the app's own business."""
    name = config.hydra.job.config_name
    flags = ["--config-name", str(name)] if name else []
    for source in config.hydra.runtime.config_sources:
        if source.provider == "main" and source.schema == "pkg":
            flags += ["--config-path", f"pkg://{source.path}"]
    return flags


def _search_path(config: DictConfig, checkout: Checkout) -> list[str]:
    """The override that lets a node find the config folders that were added here; they travel with the checkout.

    Raises:
        LaunchError: one lies outside of it.
    """
    top, folders = checkout.folder.resolve(), []
    for source in config.hydra.runtime.config_sources:
        path = Path(source.path).resolve()
        if source.schema != "file" or source.provider == "main" or path == CONFIG_DIR:
            continue
        if not path.is_relative_to(top):
            raise LaunchError(
                f"the configs in {source.path} would not reach the node; move that folder into {top}, or the files "
                "into its configs/"
            )
        folders.append(f'"file://{path.relative_to(top)}"')
    return [f"hydra.searchpath=[{','.join(folders)}]"] if folders else []


def _options(settings: SkyLauncherConfig, checkout: Checkout) -> TaskOptions:
    return TaskOptions(
        gpus=settings.gpus,
        nodes=settings.nodes,
        spot=settings.spot,
        cpus=settings.cpus,
        max_runtime_hours=settings.max_runtime_hours,
        heartbeat_timeout_s=settings.heartbeat_timeout_seconds,
        git_ref=checkout.git_ref,
        git_url=checkout.git_url,
        workdir=checkout.folder,
        infra=settings.infra,
    )


def _envs(settings: SkyLauncherConfig) -> dict[str, str]:
    return {str(name): str(value) for name, value in (settings.envs or {}).items()}


def _task_config(config: DictConfig) -> DictConfig:
    task: DictConfig = config.copy()
    with open_dict(task):
        del task["hydra"]
    return task


@contextmanager
def _renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Messages name the settings of a sweep in place of what the same thing is called elsewhere."""
    try:
        yield
    except (LaunchError, RunError) as error:
        text = str(error)
        for name, own in names.items():
            text = text.replace(name, own)
        raise type(error)(text) from error
