"""A stand-in for SkyPilot's servers and clouds, at the edge of its SDK: it records what it is asked for, and runs it.

`Cloud(folder).install(set_attribute)` replaces the functions of `sky` that talk to a server; Task, Resources, records,
statuses and exceptions are SkyPilot's own. Its whole state is in the folder, and every job has a process of its own, so
the jobs go on where the process that launched them is killed. A node is a fresh folder on this machine: the task's
files are put where they belong, and its `run` runs there with the variables that SkyPilot sets.

    python sky_stand_in.py FOLDER WORDS...      dual-policy with this cloud
    python sky_stand_in.py --job JOB_FOLDER     one job, from its first node to its end
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LATE = "late"
POLL_S = 0.02


class Cloud:
    """Managed jobs and clusters; the clusters are jobs' queues without machines of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "jobs").mkdir(parents=True, exist_ok=True)
        self.errors: dict[str, Callable[[int], BaseException | None]] = {}
        """By function: what its n-th call raises."""
        self.prices: dict[str, list[Any]] = {}
        self.enabled = ["aws", "kubernetes"]
        """Clouds of the account."""
        self.is_up = True
        """Whether the API server answers without being started."""
        self._num_calls: dict[str, int] = {}
        self._answers: dict[str, Callable[[], Any]] = {}

    def install(self, set_attribute: Callable[[Any, str, Any], None]) -> None:
        """Puts the stand-in in place of the SDK's functions."""
        import sky.client.sdk
        import sky.jobs

        import sky

        for module, names in (
            (sky, ("launch", "get", "stream_and_get", "queue", "cancel", "api_status", "api_info")),
            (sky.client.sdk, ("list_accelerators", "enabled_clouds")),
            (sky.jobs, ("launch", "queue_v2", "cancel")),
        ):
            for name in names:
                prefix = "jobs_" if module is sky.jobs else ""
                set_attribute(module, name, getattr(self, f"{prefix}{name}"))

    # What a test asks.

    def calls(self, name: str | None = None) -> list[dict[str, Any]]:
        """What was asked for, in order, with the arguments; a task as its config."""
        path = self.folder / "calls.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if name in (None, line["call"])]

    def jobs(self) -> list[Path]:
        return sorted((path for path in (self.folder / "jobs").iterdir()), key=lambda path: int(path.name))

    def names(self) -> list[str]:
        return [json.loads((path / "job.json").read_text())["name"] for path in self.jobs()]

    def status(self, job: int) -> str:
        return read_status(self.folder / "jobs" / str(job))

    def history(self, job: int) -> list[str]:
        return [one["status"] for one in self._events(job)]

    def most_at_once(self) -> int:
        """How many jobs ran at the same time, at the most."""
        changes: list[tuple[float, int]] = []
        for path in self.jobs():
            times = {one["status"]: one["time"] for one in self._events(int(path.name))}
            changes += [(times["RUNNING"], 1), (max(times.values()), -1)]
        most = now = 0
        for _, change in sorted(changes):
            now += change
            most = max(most, now)
        return most

    def preempt(self, job: int) -> None:
        (self.folder / "jobs" / str(job) / "preempt").touch()

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        until = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < until, f"{self.names()}: {[self.status(int(p.name)) for p in self.jobs()]}"
            time.sleep(POLL_S)

    def fault(self, call: str, number: int, when: str) -> None:
        """Kills whoever makes the n-th call of a function, `before` or `after` it took effect; `late`: it takes effect
        half a second after the kill."""
        (self.folder / "fault.json").write_text(json.dumps({"call": call, "number": number, "when": when}))

    def end(self) -> None:
        """Ends all that is left of the jobs."""
        for path in self.jobs():
            with contextlib.suppress(OSError, ValueError):
                os.killpg(int((path / "pid").read_text()), signal.SIGKILL)
        kill_nodes(self.folder)

    # SkyPilot's functions.

    def jobs_launch(self, task: Any, name: str | None = None, **more: Any) -> str:
        return self._request("jobs.launch", lambda: ([self._start(task, name, None)], None), task=task, name=name)

    def launch(self, task: Any, cluster_name: str | None = None, **more: Any) -> str:
        return self._request(
            "launch",
            lambda: (self._start(task, None, cluster_name), None),
            task=task,
            cluster_name=cluster_name,
            **more,
        )

    def jobs_queue_v2(self, refresh: bool, **more: Any) -> str:
        from sky.jobs import ManagedJobStatus
        from sky.schemas.api.responses import ManagedJobRecord

        from sky import exceptions

        def answer() -> Any:
            if not self.jobs():
                raise exceptions.ClusterNotUpError("No managed jobs are found.", cluster_status=None)
            records = [
                ManagedJobRecord(
                    job_id=one["id"],
                    job_name=one["name"],
                    status=ManagedJobStatus(one["status"]),
                    failure_reason=one["failure_reason"],
                )
                for one in self._listed(None)
                if more.get("job_ids") is None or one["id"] in more["job_ids"]
            ]
            return records, len(records), {}, len(records)

        return self._request("jobs.queue_v2", answer, refresh=refresh, **more)

    def queue(self, cluster_name: str, **more: Any) -> str:
        from sky import JobStatus, exceptions

        def answer() -> Any:
            listed = self._listed(cluster_name)
            if not listed:
                raise exceptions.ClusterDoesNotExist(f"Cluster {cluster_name!r} does not exist.")
            return [
                {"job_id": one["id"], "job_name": one["name"], "status": JobStatus(one["status"])} for one in listed
            ]

        return self._request("queue", answer, cluster_name=cluster_name)

    def jobs_cancel(self, **more: Any) -> str:
        return self._request("jobs.cancel", lambda: self._cancel(more["job_ids"]), **more)

    def cancel(self, cluster_name: str, **more: Any) -> str:
        return self._request("cancel", lambda: self._cancel(more["job_ids"]), cluster_name=cluster_name, **more)

    def list_accelerators(self, **more: Any) -> str:
        return self._request("list_accelerators", lambda: self.prices, **more)

    def enabled_clouds(self) -> str:
        return self._request("enabled_clouds", lambda: self.enabled)

    def api_info(self) -> dict[str, str]:
        if not self.is_up:
            raise ConnectionError("nobody listens")
        return {"status": "healthy"}

    def api_status(self) -> list[Any]:
        """The requests under way: those that are to take effect late."""
        from sky.server.requests.payloads import RequestPayload

        found = []
        for path in self.jobs():
            if not (path / "status").exists():
                values = dict.fromkeys(RequestPayload.model_fields) | {"request_body": (path / "job.json").read_text()}
                found.append(RequestPayload.model_construct(**values | {"request_id": f"late-{path.name}"}))
        return found

    def get(self, request: str) -> Any:
        if request.startswith("late-"):
            self.wait_for((self.folder / "jobs" / request.removeprefix("late-") / "status").exists)
            return None
        return self._answers.pop(request)()

    def stream_and_get(self, request: str, **more: Any) -> Any:
        return self.get(request)

    # How they work.

    def _request(self, call: str, answer: Callable[[], Any], **arguments: Any) -> str:
        number = self._num_calls[call] = self._num_calls.get(call, 0) + 1
        config = {key: value.to_yaml_config() if key == "task" else value for key, value in arguments.items()}
        with (self.folder / "calls.jsonl").open("a") as file:
            file.write(json.dumps({"call": call, **config}, default=str) + "\n")
        self._kill(call, number, "before")
        error = self.errors.get(call, lambda _: None)(number)
        request = f"{call}-{number}"
        if error is not None:
            self._answers[request] = lambda: _raise(error)
        elif "launch" in call:  # the server begins at once, whoever waits for the answer
            made = answer()
            self._answers[request] = lambda: made
        else:
            self._answers[request] = answer
        self._kill(call, number, "after")
        return request

    def _kill(self, call: str, number: int, when: str) -> None:
        path = self.folder / "fault.json"
        fault = json.loads(path.read_text()) if path.exists() else {}
        at = "after" if fault.get("when") == LATE else fault.get("when")
        if (fault.get("call"), fault.get("number"), at) == (call, number, when):
            path.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    def _start(self, task: Any, name: str | None, cluster: str | None) -> int:
        """A new job with a process of its own."""
        job = len(self.jobs()) + 1
        folder = self.folder / "jobs" / str(job)
        folder.mkdir()
        fault = self.folder / "fault.json"
        is_late = fault.exists() and json.loads(fault.read_text())["when"] == LATE
        config = task.to_yaml_config()
        config |= {"envs": dict(task.envs), "secrets": {key: _plain(value) for key, value in task.secrets.items()}}
        config["file_mounts"] = dict(task.file_mounts or {})
        about = {"id": job, "name": name or task.name, "cluster": cluster, "delay_s": 0.5 if is_late else 0.0}
        (folder / "job.json").write_text(json.dumps(about))
        (folder / "task.json").write_text(json.dumps(config))
        if not is_late:
            write_status(folder, "PENDING")
        with (folder / "controller.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-S", "-E", str(Path(__file__).resolve()), "--job", str(folder)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        (folder / "pid").write_text(str(process.pid))
        process.returncode = 0  # nobody waits for it: it outlives us
        return job

    def _listed(self, cluster: str | None) -> list[dict[str, Any]]:
        found = []
        for path in self.jobs():
            about = json.loads((path / "job.json").read_text())
            if about["cluster"] == cluster and (path / "status").exists():
                reason = path / "failure_reason"
                found.append(
                    about
                    | {"status": read_status(path), "failure_reason": reason.read_text() if reason.exists() else None}
                )
        return found

    def _cancel(self, jobs: list[int]) -> None:
        for job in jobs:
            (self.folder / "jobs" / str(job) / "cancel").touch()

    def _events(self, job: int) -> list[dict[str, Any]]:
        path = self.folder / "jobs" / str(job) / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]


def read_status(folder: Path) -> str:
    return (folder / "status").read_text()


def write_status(folder: Path, status: str) -> None:
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"status": status, "time": time.time()}) + "\n")
    (folder / "status.new").write_text(status)
    os.replace(folder / "status.new", folder / "status")


def run_job(folder: Path) -> None:
    """What the controller of a managed job does: a node, another where that is lost or the exit code says so."""
    about = json.loads((folder / "job.json").read_text())
    task = json.loads((folder / "task.json").read_text())
    time.sleep(about["delay_s"])
    if not (folder / "status").exists():
        write_status(folder, "PENDING")
    resources = task.get("resources") or {}
    recovery = resources.get("job_recovery") if isinstance(resources, dict) else None
    codes = (recovery or {}).get("recover_on_exit_codes") or []
    node = 0
    while True:
        code = _run_on_node(folder, about, task, node)
        if code == "cancelled":
            write_status(folder, "CANCELLED")
            return
        if code == 0:
            write_status(folder, "SUCCEEDED")
            return
        if about["cluster"] is None and (code == "preempted" or code in codes):
            node += 1
            write_status(folder, "RECOVERING")
            continue
        (folder / "failure_reason").write_text(
            f"Job exited with exit code {code} (user program failure). To see the details, run: sky jobs logs "
            f"--controller {about['id']}"
        )
        write_status(folder, "FAILED")
        return


def _run_on_node(folder: Path, about: dict[str, Any], task: dict[str, Any], node: int) -> int | str:
    home = folder / f"node{node}"
    work = home / "sky_workdir"
    work.mkdir(parents=True)
    for source in Path(task["workdir"]).iterdir() if isinstance(task.get("workdir"), str) else ():
        if source.name not in ("train_dir", ".git"):
            (work / source.name).symlink_to(source)
    for place, source in task["file_mounts"].items():
        target = Path(place.replace("~", str(home), 1))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    (folder / "run.sh").write_text(task["run"])
    num_gpus = 0
    variables = {
        "HOME": str(home),
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "USER": "sky",
        "SKYPILOT_TASK_ID": f"sky-managed-2026-01-01_{about['name']}_{about['id']}-0",
        "SKYPILOT_NODE_RANK": "0",
        "SKYPILOT_NUM_NODES": "1",
        "SKYPILOT_NODE_IPS": "127.0.0.1",
        "SKYPILOT_NUM_GPUS_PER_NODE": str(num_gpus),
    }
    with (folder / "run.log").open("ab") as log:
        process = subprocess.Popen(
            ["bash", str(folder / "run.sh")],
            cwd=work, env=variables | task["envs"] | task["secrets"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    write_status(folder, "RUNNING")
    while process.poll() is None:
        for name, word in (("cancel", "cancelled"), ("preempt", "preempted")):
            if (folder / name).exists():
                (folder / name).unlink()
                kill_nodes(home)
                process.wait()
                return word
        time.sleep(POLL_S)
    return process.returncode


def kill_nodes(folder: Path) -> None:
    """Kills every process whose home is a node in `folder`, in whatever session it is: the machine is gone."""
    home = f"HOME={folder}/".encode()
    found = True
    while found:
        found = False
        for path in Path("/proc").glob("[0-9]*"):
            try:
                variables = (path / "environ").read_bytes().split(b"\0")
                if any(f"{one.decode(errors='replace')}/".encode().startswith(home) for one in variables):
                    os.kill(int(path.name), signal.SIGKILL)
                    found = True
            except OSError:
                continue  # another's, or gone by now
        time.sleep(POLL_S)


def _plain(value: Any) -> str:
    """A secret's text, which SkyPilot wraps so that it is not shown."""
    reveal = getattr(value, "get_secret_value", None)
    return str(reveal() if reveal else value)


def _raise(error: BaseException) -> Any:
    raise error


def main() -> int:
    if sys.argv[1] == "--job":
        try:
            run_job(Path(sys.argv[2]))
        except BaseException:
            write_status(Path(sys.argv[2]), "FAILED_CONTROLLER")  # a test fails, and does not wait for ever
            raise
        return 0
    Cloud(Path(sys.argv[1])).install(setattr)
    from dual_policy_plugin.cli import main as run

    return run(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
