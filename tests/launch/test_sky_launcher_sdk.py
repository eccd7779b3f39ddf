"""The edge to SkyPilot: tasks it refuses, what its exceptions become, prices."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dual_policy_plugin.errors import LaunchError
from dual_policy_plugin.launch import sky_sdk
from tests.launch.launching import git, make_checkout
from tests.launch.sky_stand_in import Cloud

try:
    sky = sky_sdk.load_sky()
except LaunchError:
    pytest.skip("SkyPilot is not installed: pip install --no-deps -r requirements-sky.txt", allow_module_level=True)

TASK: dict[str, Any] = {"name": "t", "run": "true"}


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    one = Cloud(tmp_path / "cloud")
    one.install(monkeypatch.setattr)
    yield one
    one.end()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"rum": "x"}, "SkyPilot refuses the task: Invalid task YAML: Instead of 'rum', did you mean 'run'?; mend the"),
        ({"resources": {"cpus": "many"}}, 'SkyPilot refuses the task: The "cpus" field should be either a number'),
        ({"resources": {"infra": "mars"}}, "SkyPilot refuses the task: "),
        ({"secrets": {"KEY": None}}, "the secret KEY has no value; set the variable KEY"),
    ],
)
def test_a_task_that_skypilot_would_refuse_is_refused_here(more: dict[str, Any], said: str) -> None:
    sky_sdk.check_task(TASK)
    with pytest.raises(LaunchError) as caught:
        sky_sdk.check_task(TASK | more)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def exceptions() -> list[tuple[Exception, str]]:
    known = sky.exceptions
    return [
        (known.ApiServerConnectionError("http://x"), "Could not connect to SkyPilot API server .*; `sky api start` st"),
        (known.ApiServerAuthenticationError("http://x"), "Please run: sky api login -e http://x; run the command"),
        (known.NoCloudAccessError("No cloud."), "No cloud; `sky check` says which clouds"),
        (known.InvalidCloudCredentials("Bad key."), "Bad key; `sky check`"),
        (known.ResourcesUnavailableError("No H100."), "No H100; ask for other gpus"),
        (known.KubeAPIUnreachableError("No k8s."), "No k8s; ask for other gpus"),
        (known.ResourcesMismatchError("Too big."), "Too big; ask for no more than the cluster has"),
        (known.ClusterNotUpError("Stopped."), "Stopped; `sky status -r`"),
        (known.ClusterDoesNotExist("No c."), "No c; `sky status`"),
        (known.StorageBucketCreateError("No bucket."), "No bucket; see that the bucket exists"),
        (known.RequestCancelled("Cancelled."), "Cancelled$"),
        (ConnectionError("no route\nto host"), "no route to host$"),
        (RuntimeError("\x1b[31mred\x1b[0m " + "x" * 400), r"red x+\.\.\.$"),
    ]


def test_what_skypilot_raises_is_one_line_with_the_mend(cloud: Cloud) -> None:
    for error, said in exceptions():
        cloud.errors["jobs.launch"] = lambda _, error=error: error  # type: ignore[misc]
        with pytest.raises(LaunchError, match=rf"^job n could not be launched: .*{said}") as caught:
            sky_sdk.start_job(TASK, "n")
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2


def test_what_the_server_raises_is_no_defect_of_ours_whatever_it_is(cloud: Cloud) -> None:
    error = ImportError("Failed to import dependencies for Kubernetes. Try running: pip install x")
    error.stacktrace = "of the server"  # type: ignore[attr-defined]  # as SkyPilot's client marks it
    cloud.errors["jobs.launch"] = lambda _: error
    with pytest.raises(LaunchError, match="n could not be launched: Failed to import dependencies for Kubernetes"):
        sky_sdk.start_job(TASK, "n")


def test_prices_are_asked_of_the_server_through_requests() -> None:
    """`sky.list_accelerators` is the catalog of this machine: it is no request, and reads files from the network."""
    from sky.client import sdk

    for name in ("list_accelerators", "enabled_clouds"):
        assert "RequestId" in str(inspect.signature(getattr(sdk, name)).return_annotation)


def test_standard_output_is_ours_alone() -> None:
    program = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "from dual_policy_plugin.launch.sky_sdk import load_sky; load_sky()\n"
        "logging.getLogger('sky.any').warning('a word of its own')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "a word of its own" in done.stderr
    assert "INFO" not in done.stderr


def test_a_defect_keeps_its_traceback(cloud: Cloud) -> None:
    cloud.errors["jobs.launch"] = lambda _: KeyError("ours")
    with pytest.raises(KeyError):
        sky_sdk.start_job(TASK, "n")


def test_every_mend_is_for_an_exception_that_there_is() -> None:
    assert [name for name, _ in sky_sdk._MENDS if not hasattr(sky.exceptions, name)] == []


def test_the_statuses_are_skypilots() -> None:
    managed = {status.value: status.is_terminal() for status in sky.jobs.ManagedJobStatus}
    on_cluster = {status.value: status.is_terminal() for status in sky.JobStatus}
    for statuses in (managed, on_cluster):
        assert {name for name, ended in statuses.items() if ended} == sky_sdk.ENDED & set(statuses)
    assert set(managed) | set(on_cluster) >= sky_sdk.ENDED


def test_the_nodes_are_told_which_repository_they_fetch(
    cloud: Cloud, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What `sky launch` does for a task with a workdir in git, and the SDK leaves to whoever calls it."""
    code = make_checkout(tmp_path / "code")
    head, url = git(code, "rev-parse", "HEAD"), "https://127.0.0.1:9/a/b.git"
    behind = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{git(code, 'remote', 'get-url', 'origin')}.insteadOf"}
    task = TASK | {"workdir": {"url": url, "ref": head}}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (behind | {"GIT_CONFIG_VALUE_0": "https://canary@127.0.0.1:9/a/b.git"}).items():
            patch.setenv(name, value)
        patch.setenv("GIT_TOKEN", "canary")
        ids = [sky_sdk.start_job(task, "n"), sky_sdk.start_cluster(task, "c", down=True, idle_minutes=1)]
    for job in ids:
        asked = json.loads((cloud.folder / "jobs" / str(job) / "task.json").read_text())
        assert (asked["envs"], asked["secrets"]) == ({"GIT_URL": url, "GIT_COMMIT_HASH": head}, {"GIT_TOKEN": "canary"})
    assert "canary" not in "".join(capfd.readouterr())
    with pytest.raises(
        LaunchError, match=r"^job n could not be launched: Unsupported git URL format: /srv/a.git"
    ) as said:
        sky_sdk.start_job(TASK | {"workdir": {"url": "/srv/a.git", "ref": head}}, "n")
    assert "\n" not in str(said.value)
    assert len(cloud.jobs()) == 2


def test_jobs_are_found_by_name_the_newest_of_each(cloud: Cloud) -> None:
    assert sky_sdk.find_jobs(["a"]) == {}, "there has never been a job"
    assert sky_sdk.find_jobs(["a"], cluster="c") == {}, "nor the cluster"
    ids = [sky_sdk.start_job(TASK, name) for name in ("a", "b", "a")]
    assert ids == [1, 2, 3]
    assert sky_sdk.find_jobs(["a", "z"]) == {"a": 3}
    cloud.wait_for(lambda: {cloud.status(job) for job in ids} == {"SUCCEEDED"})
    assert sky_sdk.job_statuses({"a": 1, "b": 2, "c": 99}) == {"a": "SUCCEEDED", "b": "SUCCEEDED"}
    assert sky_sdk.job_statuses({"b": 1, "a": 3}) == {"a": "SUCCEEDED"}, "an id of another job"
    assert sky_sdk.job_statuses({}) == {}
    job = sky_sdk.start_cluster(TASK, "c", down=False, idle_minutes=None)
    cloud.wait_for(lambda: cloud.status(job) == "SUCCEEDED")
    assert sky_sdk.job_statuses({"t": job}, cluster="c") == {"t": "SUCCEEDED"}
    for jobs in ({"t": job + 1}, {"u": job}):
        assert sky_sdk.job_statuses(jobs, cluster="c") == {}
    assert sky_sdk.job_statuses({"t": job}, cluster="d") == {}


@pytest.mark.parametrize("infra", ["mars", "", "awss", "aws-us", "aws/us-east-1/us-east-1a/x"])
def test_a_place_that_there_is_not_is_one_short_line(infra: str) -> None:
    with pytest.raises(LaunchError) as caught:
        sky_sdk.check_infra(infra)
    assert str(caught.value) == (
        f"--infra={infra} is not possible; use CLOUD, CLOUD/REGION or CLOUD/REGION/ZONE, for example aws or "
        "gcp/us-central1; `sky check` lists the clouds"
    )


@pytest.mark.parametrize("infra", [None, "aws", "AWS", "gcp/us-central1", "aws/*/us-east-1a", "k8s/my/context", "*"])
def test_a_place_that_skypilot_reads_is_let_through(infra: str | None) -> None:
    sky_sdk.check_infra(infra)


def test_a_controller_that_stopped_idle_is_started_to_look_for_jobs(cloud: Cloud) -> None:
    sky_sdk.start_job(TASK, "a")
    stopped = sky.exceptions.ClusterNotUpError("stopped", cluster_status=sky.ClusterStatus.STOPPED)
    cloud.errors["jobs.queue_v2"] = lambda number: stopped if number == 1 else None
    assert sky_sdk.find_jobs(["a"]) == {"a": 1}
    assert [call["refresh"] for call in cloud.calls("jobs.queue_v2")] == [False, True]


def test_the_price_of_an_hour_is_the_cheapest_fitting_offer_for_all_nodes(cloud: Cloud) -> None:
    task = TASK | {"num_nodes": 3, "resources": {"accelerators": {"H100": 2, "A100": 2}}}
    offers = [(4.0, 1.5), (2.5, 2.0), (math.nan, 0.0)]
    cloud.prices = {"X": [SimpleNamespace(price=price, spot_price=spot) for price, spot in offers]}
    assert sky_sdk.hourly_cost(task) == 7.5
    task["resources"] |= {"use_spot": True}
    assert sky_sdk.hourly_cost(task) == 4.5
    asked = [
        (call["name_filter"], call["quantity_filter"], call["clouds"]) for call in cloud.calls("list_accelerators")
    ]
    assert asked == [("^(?:A100|H100)$", 2, ["aws"])] * 2, "one request, and no cloud that the account has not"
    cloud.enabled = ["kubernetes"]
    assert sky_sdk.hourly_cost(task) is None
    cloud.enabled = ["gcp"]
    assert sky_sdk.hourly_cost(task | {"resources": {"accelerators": "H100:2", "infra": "aws"}}) is None
    assert sky_sdk.hourly_cost(TASK) is None, "no price of a machine without GPU"
    cloud.is_up = False
    assert sky_sdk.hourly_cost(task) is None, "no server is started to ask for a price"
