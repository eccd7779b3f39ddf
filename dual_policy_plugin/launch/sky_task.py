"""SkyPilot tasks: from a template of `sky/` and the words of a command line to what SkyPilot launches.

Takes words and options that the launchers have checked; gives plain dicts, which `sky_sdk` hands to SkyPilot. Needs no
SkyPilot itself.
"""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dual_policy_plugin.errors import LaunchError

_PACKAGE = Path(__file__).resolve().parent.parent
# In a wheel the tasks travel inside the package; in a checkout they stand beside it.
TASK_DIR = _PACKAGE / "sky_tasks" if (_PACKAGE / "sky_tasks").is_dir() else _PACKAGE.parent / "sky"
WORDS_BLOCK = re.compile(r"^words=\(\n.*?^\)\n", re.MULTILINE | re.DOTALL)
"""What a template says for itself, and what a generated task has the words of its command line in place of."""

CANNOT_STOP = ("k8s", "kubernetes", "slurm", "ssh", "lambda", "runpod")
"""Where an idle cluster can only be given back, disk and all; so it is with spot machines anywhere."""


@dataclass(kw_only=True, slots=True, frozen=True)
class TaskOptions:
    """What a launch says of its machines; None leaves to the template what it says."""

    gpus: str | None = None
    """Per node: a count (the cheapest of the template's kinds), `KIND:COUNT`, `KIND`, or 0."""
    nodes: int = 1
    """How many."""
    spot: bool | None = None
    """Whether the machines may be taken away, at a lower price."""
    cpus: str | None = None
    """Per node: `8` or, for at least so many, `8+`."""
    max_runtime_hours: float | None = None
    """Over all restarts; 0: no limit."""
    heartbeat_timeout_s: int | None = None
    """Seconds without a sign of life after which the run is begun again; 0: never."""
    git_ref: str | None = None
    """Commit, branch or tag that the nodes fetch themselves; None: `workdir` is copied to them. Needs `git_url`."""
    git_url: str | None = None
    """Where they fetch it from."""
    workdir: Path | None = None
    """The checkout that is copied; None: the current folder."""
    infra: str | None = None
    """Where, as SkyPilot writes it: aws, gcp/us-central1, k8s/context, slurm/cluster."""


def read_template(name: str) -> dict[str, Any]:
    """The task `name` of `sky/`, for example `train`, or the one in a YAML file, `my/task.yaml`.

    Raises:
        LaunchError: there is none, or the file holds no task.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else TASK_DIR / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(path.stem for path in TASK_DIR.glob("*.yaml")))
        raise LaunchError(f"{name} is no SkyPilot task; there are {there or f'none in {TASK_DIR}'}, and YAML files")
    try:
        task = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise LaunchError(f"{path} is no valid YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(task, dict) or not isinstance(task.get("run"), str):
        raise LaunchError(f"{path} is no SkyPilot task with a `run`; see those of sky/")
    return task


def build_task(
    template: Mapping[str, Any],
    *,
    name: str,
    run: str,
    words: Sequence[str],
    options: TaskOptions,
    files: Mapping[str, Path] | None = None,
    envs: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A SkyPilot task that runs `dual-policy train` with `words`, each of which arrives as it is.

    Args:
        template: from `read_template`.
        name: of the task; letters, digits, `-`, `_` and `.`.
        run: the run's name, which the task's RUN says too.
        words: all that stands behind `dual-policy train`, `run=` included.
        options: of the machines.
        files: path on the node -> file or folder here.
        envs: further variables of the node; they replace the template's.

    Raises:
        LaunchError: an option that cannot work.
    """
    task = copy.deepcopy(dict(template))
    block = "words=(\n" + "".join(f"  {quote(word)}\n" for word in words) + ")\n"
    script, num_blocks = WORDS_BLOCK.subn(lambda _: block, task["run"])
    if num_blocks != 1:
        raise LaunchError(f"the SkyPilot task {task.get('name')} takes no words: its run has no words=( ... ) block")
    (said,) = WORDS_BLOCK.findall(template["run"])
    own = {key: value for key, value in task.get("envs", {}).items() if not re.search(rf"\$\{{?{key}\b", said)}
    task |= {"name": name, "num_nodes": options.nodes, "run": script, "workdir": _workdir(options)}
    task["resources"] = _resources(task.get("resources", {}), options)
    task["envs"] = own | {"RUN": run} | _limits(options) | dict(envs or {})
    if files:
        task["file_mounts"] = task.get("file_mounts", {}) | {node: str(here) for node, here in files.items()}
    return task


def quote(word: str) -> str:
    """The word for a shell, which takes it as it is.

    Raises:
        LaunchError: no process can be given such a word.
    """
    if "\0" in word:
        raise LaunchError(f"{word!r} has a NUL character, which no process can be given; leave it out")
    return shlex.quote(word)


def _workdir(options: TaskOptions) -> str | dict[str, str]:
    """A checkout to copy, or a repository that the nodes fetch."""
    if options.git_ref is None:
        return str(options.workdir or Path.cwd())
    if options.git_url is None:
        raise LaunchError(f"the nodes cannot fetch {options.git_ref}: the repository has no remote; add one")
    return {"url": options.git_url, "ref": options.git_ref}


def _resources(resources: Mapping[str, Any], options: TaskOptions) -> dict[str, Any]:
    """The template's resources with what the options say instead."""
    said = {"use_spot": options.spot, "cpus": options.cpus, "infra": options.infra}
    changed = dict(resources) | {key: value for key, value in said.items() if value is not None}
    if options.gpus is not None:
        changed["accelerators"] = _accelerators(options.gpus, resources.get("accelerators") or {})
    if changed.get("accelerators") is None:
        changed.pop("accelerators", None)
    is_kept = not changed.get("use_spot") and (options.infra or "").partition("/")[0].lower() not in CANNOT_STOP
    if "autostop" in changed and not is_kept:
        changed["autostop"] = changed["autostop"] | {"down": True}
    return changed


def _accelerators(gpus: str, kinds: Mapping[str, Any]) -> dict[str, int] | None:
    """GPU kind -> how many of a node's; several kinds mean the cheapest that can be had; None: a node without GPU."""
    parts = re.fullmatch(r"([0-9]+)|([A-Za-z][A-Za-z0-9._-]*)(?::([1-9][0-9]*))?", gpus)
    if parts is None:
        raise LaunchError(f"--gpus={gpus} is not possible; use a count, a kind or KIND:COUNT, for example 1 or H100:8")
    count, kind, of_kind = parts.groups()
    number = int(count or of_kind or "1")
    return dict.fromkeys([kind] if kind else kinds, number) if number else None


def _limits(options: TaskOptions) -> dict[str, str]:
    """The variables that `dual-policy watch` is given on the node."""
    said = {
        "MAX_RUNTIME_HOURS": options.max_runtime_hours,
        "HEARTBEAT_TIMEOUT_SECONDS": options.heartbeat_timeout_s,
    }
    return {key: f"{value:g}" for key, value in said.items() if value is not None}
