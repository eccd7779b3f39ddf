"""The edge to SkyPilot: the one module that imports `sky`, and only where a function needs it.

Takes tasks as plain configs (what stands in a task's YAML) and gives plain values: ids, the names of statuses, prices.
Whatever SkyPilot raises comes out as a LaunchError of one line with the mend.

A job is a managed job, which SkyPilot recovers on other machines, or with `cluster` one on a cluster of that name.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import yaml

from dual_policy_plugin.errors import LaunchError

FAILED = frozenset(
    {
        "FAILED",
        "FAILED_SETUP",
        "FAILED_PRECHECKS",
        "FAILED_NO_RESOURCE",
        "FAILED_CONTROLLER",
        "FAILED_DRIVER",
        "CANCELLED",
    }
)
ENDED = FAILED | {"SUCCEEDED"}
"""Statuses in which a job stays, managed or on a cluster."""

_MENDS: tuple[tuple[str, str], ...] = (
    ("ApiServerConnectionError", "`sky api start` starts a server here, `sky api login -e URL` takes another"),
    ("ApiServerAuthenticationError", "run the command that it names"),
    ("APIVersionMismatchError", "restart the server (`sky api stop`, `sky api start`), or install its version here"),
    ("APINotSupportedError", "bring the API server to SkyPilot's version here"),
    ("NoCloudAccessError", "`sky check` says which clouds can be used, and what each of them wants"),
    ("InvalidCloudCredentials", "`sky check` says what each cloud wants"),
    ("InvalidCloudConfigs", "`sky check` says what each cloud wants"),
    ("CloudUserIdentityError", "`sky check` says what each cloud wants"),
    ("ResourcesMismatchError", "ask for no more than the cluster has, or name another cluster"),
    ("ResourcesUnavailableError", "ask for other gpus or another infra; `sky show-gpus` lists what there is"),
    ("ProvisionPrechecksError", "`sky check` says what each cloud wants"),
    ("ClusterOwnerIdentityMismatchError", "name another cluster; this one belongs to another account of the cloud"),
    ("ClusterDoesNotExist", "`sky status` lists the clusters"),
    ("ClusterNotUpError", "`sky status -r` says how it is, `sky start` starts it"),
    ("ClusterSetUpError", "`sky logs --provision CLUSTER` has the reason"),
    ("CommandError", "`sky logs --provision CLUSTER` has the reason"),
    ("InvalidClusterNameError", "use letters, digits and dashes, a letter first"),
    ("StorageError", "see that the bucket exists and that these credentials may use it"),
    ("StorageSpecError", "see that the bucket exists and that these credentials may use it"),
    ("PermissionDeniedError", "ask whoever runs the API server"),
    ("UserRequestRejectedByPolicy", "ask whoever runs the API server"),
    ("InvalidSkyPilotConfigError", "mend the task's YAML"),
)
"""SkyPilot's exceptions by name, subclasses before their bases, and what to do about each."""

_PRICELESS = ("kubernetes", "ssh", "slurm")
"""Where machines have no price."""

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_MAX_REASON = 300


def load_sky() -> Any:
    """SkyPilot's package.

    Raises:
        LaunchError: it is not installed; `import sky` may still find a folder of that name and succeed.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it names its plugins when it is imported
    try:
        # its log stays on the stream that is standard output now, and that one is ours
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")  # of what its modules import: nobody here can mend it
            import sky
    except ImportError:
        sky = None
    if not hasattr(sky, "Task"):
        raise LaunchError(
            "SkyPilot is not installed here; `pip install --no-deps -r requirements-sky.txt` in a checkout, "
            "or `pip install skypilot`"
        )
    return sky


def check_task(config: Mapping[str, Any]) -> None:
    """Raises a LaunchError where SkyPilot would refuse a task; asks no server and needs no credentials."""
    _read_task(config)


def check_infra(infra: str | None) -> None:
    """Raises a LaunchError for a place that SkyPilot cannot read; whether the account has it is not asked."""
    if infra is None:
        return
    sky = load_sky()
    try:
        with _launch_errors(""):
            sky.Resources.from_yaml_config({"infra": infra})
    except LaunchError as error:
        raise LaunchError(
            f"--infra={infra} is not possible; use CLOUD, CLOUD/REGION or CLOUD/REGION/ZONE, for example aws or "
            "gcp/us-central1; `sky check` lists the clouds"
        ) from error


def start_job(config: Mapping[str, Any], name: str) -> int:
    """The id of a new managed job; comes back when the job is in the queue."""
    sky = load_sky()
    with _launch_errors(f"job {name} could not be launched"):
        ids, _ = _wait(sky, sky.jobs.launch(_launchable(config), name=name))
    if not ids:
        raise LaunchError(f"job {name} was launched, and SkyPilot gave no id; `sky jobs queue` lists it")
    return int(ids[0])


def start_cluster(config: Mapping[str, Any], cluster: str, *, down: bool, idle_minutes: int | None) -> int:
    """The id of a new job on a cluster, which is made where there is none; comes back when the job is in its queue.

    Args:
        config: of the task; its `name` is the job's.
        cluster: name of the cluster.
        down: the cluster ends, rather than stops, when it has been idle.
        idle_minutes: for how long; None: what the task says.
    """
    sky = load_sky()
    with _launch_errors(f"cluster {cluster} took no job"):
        request = sky.launch(
            _launchable(config), cluster_name=cluster, down=down, idle_minutes_to_autostop=idle_minutes
        )
        job, _ = _wait(sky, request)
    if job is None:
        raise LaunchError(f"cluster {cluster} took the job and gave no id; `sky queue {cluster}` lists it")
    return int(job)


def job_statuses(jobs: Mapping[str, int], *, cluster: str | None = None) -> dict[str, str]:
    """What the queue says of jobs: name -> status (PENDING, RUNNING, SUCCEEDED, ...).

    A queue that is made anew counts from 1 again, so a job is known by its name and its id together.

    Args:
        jobs: name -> id; those that the queue does not know are not in the answer.
        cluster: whose queue; None: the managed jobs'.
    """
    if not jobs:
        return {}
    sky = load_sky()
    with _launch_errors("the jobs' statuses cannot be had"):
        if cluster is not None:
            records = _cluster_queue(sky, cluster)
        else:
            records = _queue(sky, refresh=True, job_ids=sorted(jobs.values()))
    return {
        str(one["job_name"]): one["status"].value
        for one in records
        if one["status"] is not None and jobs.get(str(one["job_name"])) == int(one["job_id"])
    }


def find_jobs(names: Collection[str], *, cluster: str | None = None) -> dict[str, int]:
    """The ids of jobs by their names, the newest of each name; names that nothing has are not there."""
    sky = load_sky()
    with _launch_errors("the jobs cannot be listed"):
        _await_launches(sky, names)
        if cluster is not None:
            records = _cluster_queue(sky, cluster)
        else:
            try:
                records = _queue(sky, refresh=False)
            except sky.exceptions.ClusterNotUpError as error:
                if error.cluster_status is None:
                    return {}  # no controller of jobs, so there has never been one
                records = _queue(sky, refresh=True)
    found = sorted((int(one["job_id"]), str(one["job_name"])) for one in records)
    return {name: job for job, name in found if name in names}


def failure_reasons(ids: Collection[int], *, cluster: str | None = None) -> dict[int, str]:
    """Why managed jobs failed, with their exit codes; jobs of which SkyPilot says nothing are not there."""
    if not ids or cluster is not None:
        return {}
    sky = load_sky()
    with _launch_errors("the jobs cannot be listed"):
        records = _queue(sky, refresh=False, job_ids=sorted(ids), fields=("failure_reason",))
    reasons = {int(one["job_id"]): str(one["failure_reason"] or "") for one in records}
    return {job: " ".join(text.partition(" To see")[0].split()).rstrip(". ") for job, text in reasons.items() if text}


def cancel_jobs(ids: Collection[int], *, cluster: str | None = None) -> None:
    """Cancels jobs; those that have ended stay as they are."""
    if not ids:
        return
    sky = load_sky()
    with _launch_errors("the jobs could not be cancelled"):
        if cluster is not None:
            sky.get(sky.cancel(cluster, job_ids=sorted(ids)))
        else:
            sky.get(sky.jobs.cancel(job_ids=sorted(ids)))


def hourly_cost(config: Mapping[str, Any]) -> float | None:
    """Dollars per hour of a task's nodes: the cheapest fitting offer of the clouds that the account has.

    None where SkyPilot does not know: no API server is running (none is started for it), no GPU is asked for, no cloud
    is enabled, or the catalog has no price.
    """
    sky = load_sky()
    task = _read_task(config)
    try:
        sky.api_info()
    except Exception:  # whatever keeps the server from answering, there is nobody to ask
        return None
    with _launch_errors("the price cannot be had"):
        prices = list(_prices(sky, task))
    return min(prices) * int(task.num_nodes) if prices else None


def _prices(sky: Any, task: Any) -> Iterator[float]:
    """Dollars per hour of every offer that fits one of a task's resources."""
    from sky.client import sdk  # `sky.list_accelerators` is another: this machine's catalog, not the server's

    wanted: dict[tuple[str, str | None, float, bool], list[str]] = {}
    for one in task.resources:
        for name, count in (one.accelerators or {}).items():
            wanted.setdefault((str(one.cloud or "").lower(), one.region, count, one.use_spot), []).append(name)
    enabled = (
        [name for name in map(str.lower, sky.get(sdk.enabled_clouds())) if name not in _PRICELESS] if wanted else []
    )
    for (cloud, region, count, is_spot), names in wanted.items():
        clouds = [name for name in enabled if cloud in ("", name)]
        if not clouds:
            continue
        kinds = "|".join(re.escape(name) for name in sorted(names))
        request = sdk.list_accelerators(
            name_filter=f"^(?:{kinds})$", region_filter=region, quantity_filter=count, clouds=clouds
        )
        for offer in (one for offers in sky.get(request).values() for one in offers):
            price = offer.spot_price if is_spot else offer.price
            if price is not None and price > 0:  # no price is NaN there
                yield float(price)


def _await_launches(sky: Any, names: Collection[str]) -> None:
    """Waits for launches of these names that are still under way: the server goes on where who asked was killed."""
    for request in sky.api_status():
        if any(name in request.request_body for name in names):
            with contextlib.suppress(Exception):  # a launch that fails leaves no job, which is what is to be found out
                sky.get(request.request_id)


def _queue(sky: Any, *, refresh: bool, job_ids: Sequence[int] | None = None, fields: Sequence[str] = ()) -> list[Any]:
    """Records of managed jobs.

    Args:
        sky: the package.
        refresh: start the controller of the jobs again where it stopped, idle.
        job_ids: of which jobs; None: of all.
        fields: of the records, besides id, name and status.
    """
    request = sky.jobs.queue_v2(
        refresh=refresh,
        skip_finished=False,
        job_ids=None if job_ids is None else list(job_ids),
        fields=["job_id", "job_name", "status", *fields],
    )
    records = sky.get(request)
    return list(records[0] if isinstance(records, tuple) else records)  # an older server answers with the list alone


def _cluster_queue(sky: Any, cluster: str) -> list[Any]:
    """Records of all jobs of a cluster; none where it has ended, and its queue with it."""
    try:
        return list(sky.get(sky.queue(cluster, skip_finished=False, all_users=True)))
    except sky.exceptions.ClusterDoesNotExist:
        return []


def _read_task(config: Mapping[str, Any]) -> Any:
    sky = load_sky()
    for name, value in (config.get("secrets") or {}).items():
        if value is None:  # SkyPilot would leave it out without a word
            raise LaunchError(f"the secret {name} has no value; set the variable {name}")
    with _launch_errors("SkyPilot refuses the task"):
        return sky.Task.from_yaml_config({**copy.deepcopy(dict(config)), "_user_specified_yaml": _shown_yaml(config)})


def _launchable(config: Mapping[str, Any]) -> Any:
    """The task, which also says where its nodes fetch a workdir in git: `sky launch` adds that, the SDK does not."""
    return _read_task(config).update_envs_and_secrets_from_workdir()


def _shown_yaml(config: Mapping[str, Any]) -> str:
    """The task without its keys: SkyPilot keeps a text beside the task, and would make its own with the keys in it."""
    secrets = dict.fromkeys(config.get("secrets") or {}, "<redacted>")
    return str(yaml.safe_dump({**config, "secrets": secrets} if secrets else dict(config), sort_keys=False))


def _wait(sky: Any, request: Any) -> Any:
    """The answer to a request, its log on stderr."""
    return sky.stream_and_get(request, output_stream=sys.stderr)


@contextlib.contextmanager
def _launch_errors(what: str) -> Iterator[None]:
    """Turns what SkyPilot raises inside into a LaunchError of one line."""
    try:
        yield
    except LaunchError:
        raise
    except Exception as error:
        bases = {cls.__name__: cls.__module__ for cls in type(error).__mro__}
        is_known = (
            isinstance(error, RuntimeError | ValueError | OSError)
            or any(module.partition(".")[0] in ("sky", "click", "requests") for module in bases.values())
            or hasattr(error, "stacktrace")  # raised by the server, whatever it is
        )
        if not is_known:
            raise
        mend = next((mend for name, mend in _MENDS if name in bases and bases[name].startswith("sky.")), "")
        raise LaunchError(f"{what}: {_reason(error)}" + (f"; {mend}" if mend else "")) from error


def _reason(error: Exception) -> str:
    """What SkyPilot says, in one line without colours."""
    message = getattr(error, "message", None)  # click's errors have no text of their own
    lines = _ANSI.sub("", str(error) or str(message or "")).split("\n")
    text = " ".join(" ".join(lines).split()).rstrip(".:; ") or type(error).__name__
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}..."
